"""The model in a terminal: ask for an image, see it and its probabilities in characters."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

from errors import UserError, one_line, printable
from trained import TrainedModel


def converse(demo: TrainedModel) -> None:
    """Ask for images until q or the end of input. A wrong answer costs one line."""
    while True:
        try:
            answer = input("test image number or picture file (q ends): ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if answer.lower() == "q":
            return
        try:
            image, truth = fetch_image(demo, answer)
        except UserError as error:
            print(one_line(error))
            continue
        row = demo.probabilities(image)[0]
        print(terminal_picture(image[0]))
        print(terminal_bars(row, demo.classes, truth))


def fetch_image(demo: TrainedModel, answer: str) -> tuple[Tensor, int | None]:
    """The image (1, C, H, W) that `answer` names and its class where it is known. Raises UserError."""
    if not answer:
        raise UserError("nothing was asked; type a number such as 7, a file name, or q")
    try:
        number = int(answer)
    except ValueError:
        if len(answer) > 2 and answer[0] == answer[-1] and answer[0] in "'\"":  # as file managers copy a path
            answer = answer[1:-1]
        return demo.picture(Path(os.path.expanduser(answer))), None
    images, labels = demo.dataset.test
    if not 0 <= number < len(labels):
        raise UserError(f"there is no test image {number}; choose from 0 to {len(labels) - 1}")
    return images[number:number + 1], int(labels[number])


def terminal_picture(image: Tensor) -> str:
    """A (C, H, W) uint8 image in characters: two pixels, one above the other, in each character.

    In a terminal the upper half block is drawn in the upper pixel's grey on the lower pixel's; elsewhere,
    or where NO_COLOR is set, one of five shades stands for both.
    """
    grey = image.float().mean(dim=0).numpy()
    grey = grey.repeat(math.ceil(20 / len(grey)), axis=0).repeat(math.ceil(20 / len(grey)), axis=1)
    pairs = grey[:len(grey) // 2 * 2].reshape(-1, 2, grey.shape[1])
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        levels = 232 + np.rint(pairs * 23 / 255).astype(int)  # the 24 greys of a 256-colour terminal
        return "\n".join("".join(f"\x1b[38;5;{upper};48;5;{lower}m▀" for upper, lower in pair.T) + "\x1b[0m"
                         for pair in levels)
    shades = np.rint(pairs.mean(axis=1) * 4 / 255).astype(int)
    return "\n".join("".join(" ░▒▓█"[shade] for shade in line).rstrip() for line in shades)


def terminal_bars(probabilities: np.ndarray, classes: tuple[str, ...], truth: int | None) -> str:
    classes = tuple(map(printable, classes))
    best, width = int(probabilities.argmax()), max(map(len, classes))
    lines = [f"{name:>{width}} {'█' * round(40 * value):<40} {100 * value:5.1f}%"
             for name, value in zip(classes, probabilities.tolist(), strict=True)]
    verdict = "" if truth is None else " ✓" if best == truth else f" ✗, it is {classes[truth]}"
    return "\n".join([*lines, f"predicted {classes[best]}{verdict}"])
