"""Anyone's picture of a digit made into one as MNIST has them: centred, scaled, light on dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import UserError
from picture_file import open_picture, to_rgb

MIN_CONTRAST = 24  # of 255; less is paper without ink


def prepare_picture(path: Path | str, size: int) -> Tensor:
    """A picture file of one digit as the model knows them: `prepare_grey` of it.

    Raises UserError for a file that is missing, empty, no picture, above 64 megapixels or without ink.
    """
    return prepare_grey(read_grey(Path(path)), size, str(path))


def prepare_grey(grey: np.ndarray, size: int, name: str) -> Tensor:
    """One digit, (H, W) float32 of 0 to 255, as the model knows it: (1, 1, size, size) uint8, light on dark.

    The steps are those of MNIST's makers (LeCun, Cortes and Burges, "The MNIST database"; LeCun et al.
    1998), after the background is found:

    1. The median of the border is the background, the shade furthest from it is the ink: stretch from 0
       (background) to 255 (ink), which inverts dark on light, and drop the faintest tenth, paper's grain.
    2. Crop the box around the ink and scale it, keeping its proportions, to fit 20 × 20.
    3. Put it into 28 × 28 with its centre of mass in the middle.

    For scikit-learn's 8 × 8 digits, which fill their square, the box is the square itself.

    Raises UserError, about `name`, where there is no ink.
    """
    background, contrast = _paper_and_ink(grey)
    if abs(contrast) < MIN_CONTRAST:
        raise UserError(f"{name} shows no digit: it is one even shade; use a picture with dark and light")
    ink = ((grey - background) / contrast - 0.1).clip(0, 0.8) / 0.8

    rows, columns = np.flatnonzero((ink > 0.25).any(axis=1)), np.flatnonzero((ink > 0.25).any(axis=0))
    ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    box = round(size * 20 / 28) if size >= 28 else size
    scale = box / max(ink.shape)
    height, width = (max(1, round(scale * side)) for side in ink.shape)
    whole = Image.fromarray(np.rint(255 * ink).astype(np.uint8))
    digit = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC), np.float32).copy()
    digit *= 255 / max(digit.max(), 1)  # a thin line fades when made small

    top, left = (size - height) / 2, (size - width) / 2
    if box < size:  # the centre of mass on the pixel that it has in MNIST, 14 of 0 to 27
        top = size // 2 - (digit.sum(axis=1) @ np.arange(height)) / digit.sum()
        left = size // 2 - (digit.sum(axis=0) @ np.arange(width)) / digit.sum()
    top, left = (min(max(round(start), 0), size - side) for start, side in ((top, height), (left, width)))
    picture = np.zeros((1, 1, size, size), np.uint8)
    picture[0, 0, top:top + height, left:left + width] = np.rint(digit)
    return torch.from_numpy(picture)


def _paper_and_ink(grey: np.ndarray) -> tuple[float, float]:
    """The shade of the background, and how much lighter (above 0) or darker the ink is."""
    edge = max(1, min(grey.shape) // 32)
    border = (grey[:edge], grey[-edge:], grey[:, :edge], grey[:, -edge:])
    background = float(np.median(np.concatenate([strip.ravel() for strip in border])))
    return background, max(grey.max() - background, grey.min() - background, key=abs)


def read_grey(path: Path) -> np.ndarray:
    """A picture file as (H, W) float32, 0 to 255, at most 1024 pixels a side.

    It is turned upright (EXIF), and transparent parts are laid on a background. Where ink and paper are as
    bright as each other, it is red, green or blue alone, whichever tells them apart best. Raises UserError.
    """
    image = open_picture(path)
    grey = _small(_to_grey(image))
    if abs(_paper_and_ink(grey)[1]) < MIN_CONTRAST:
        channel = max(map(_small, to_rgb(image).split()), key=lambda channel: abs(_paper_and_ink(channel)[1]))
        if abs(_paper_and_ink(channel)[1]) >= 2 * MIN_CONTRAST:  # alone it has more noise than three together
            return channel
    return grey


def _small(image: Image.Image) -> np.ndarray:
    image.thumbnail((1024, 1024))
    return np.asarray(image, np.float32)


def _to_grey(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("L")
    grey, alpha = (np.asarray(band, np.float32) for band in image.convert("RGBA").convert("LA").split())
    alpha /= 255
    if alpha.mean() > 0.5:  # a picture with holes: fill them with its own background
        paper = np.median(grey[alpha > 0.5])
    else:  # strokes on nothing: lay them on what they stand out from
        paper = 255 if (grey * alpha).sum() < 127.5 * alpha.sum() else 0
    return Image.fromarray(np.rint(grey * alpha + paper * (1 - alpha)).astype(np.uint8))
