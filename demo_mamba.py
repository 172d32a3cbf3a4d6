"""Show what a trained Vision Mamba can do: pictures, numbers, a prompt.

    python demo_mamba.py                                  the newest checkpoint on its test set
    python demo_mamba.py --image four.png photo.jpg       your own pictures
    python demo_mamba.py --interactive                    ask it, one image at a time

Everything is written into RUNS_DIR/<run name>/demo and listed at the end. Of the first command:
confusion.png, predictions.png, mistakes.png, class_scores.png, performance.png, performance.txt and
report.json; of the second, image-<name>.png for each picture.
"""

from __future__ import annotations

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)
from errors import ArgumentParser, UserError, run_script  # isort: skip  (Ctrl-C is one line from here on)

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn

import checkpoint
import data
import evaluate
import figures


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Show what a trained Vision Mamba can do: pictures, numbers, a prompt.",
        epilog="Without --image and --interactive the model is tested on its dataset's test set.")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", default=argparse.SUPPRESS,
                        help="the trained model (default: the newest in --checkpoints-dir)")
    parser.add_argument("--checkpoints-dir", type=Path, metavar="DIR", default=Path("checkpoints"),
                        help="where train_mamba.py saves its models")
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", default=Path("runs"),
                        help="results go into DIR/<run name>/demo")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", default=Path("data"),
                        help="where datasets are kept, and fetched to where missing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto is CUDA where there is one, else the CPU")
    parser.add_argument("--image", type=Path, nargs="+", metavar="FILE", default=argparse.SUPPRESS,
                        help="classify your own pictures of one digit on a plain background: any size, grey "
                             "or colour, dark on light or light on dark (default: none)")
    parser.add_argument("--interactive", action="store_true",
                        help="ask for test image numbers and picture files, and answer in the terminal")
    parser.add_argument("--no-show", action="store_true", help="open no windows, only write the files")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # a terminal without ✗ or █ is no reason to stop
    device = evaluate.pick_device(arguments.device)
    path = getattr(arguments, "checkpoint", None) or checkpoint.newest(arguments.checkpoints_dir)
    demo = Demo(path, device, arguments.runs_dir, arguments.data_dir)

    written = []
    if "image" in arguments:
        written += classify_pictures(demo, arguments.image)
    elif not arguments.interactive:
        written += test(demo)
    if written and not arguments.no_show:
        show([path for path in written if path.suffix == ".png"])
    if arguments.interactive:
        converse(demo)


class Demo:
    """A trained model and what is known of its images; the dataset itself is loaded when first asked for."""

    def __init__(self, path: Path, device: torch.device, runs_dir: Path, data_dir: Path) -> None:
        """Raises UserError where the checkpoint cannot be used."""
        contents = checkpoint.load(path)
        self.path, self.device, self.data_dir = path, device, data_dir
        self.architecture, self.epoch = contents["architecture"], contents["epoch"]
        self.model: nn.Module = evaluate.rebuild(contents, device)
        try:
            self.dataset_name = contents["dataset"]["name"]
            self.classes, self.mean, self.std = (tuple(contents["dataset"][key])
                                                 for key in ("classes", "mean", "std"))
            self.run_name = str(contents["settings"].get("run_name") or path.stem)
            entry = data.DATASETS[self.dataset_name]
            self.shape = (entry.in_channels, entry.image_size, entry.image_size)
            logits = self.logits(torch.zeros(1, *self.shape, dtype=torch.uint8))
        except Exception as error:  # a damaged entry fails in as many ways as there are types
            raise UserError(f"{path} names a dataset that does not fit its model or this version "
                            f"({type(error).__name__}); train it anew") from error
        if logits.shape != (1, len(self.classes)):
            raise UserError(f"{path} names {len(self.classes)} classes, but its model has "
                            f"{logits.shape[-1]}; train it anew")
        if not checkpoint.is_run_name(self.run_name):
            raise UserError(f"{path} has the run name {self.run_name!r}, which is no folder's name; "
                            "train it anew")
        self.folder = runs_dir / self.run_name / "demo"
        self._dataset: data.Dataset | None = None

    @property
    def dataset(self) -> data.Dataset:
        """The dataset, on the CPU, with the mean and std that the model was trained with."""
        if self._dataset is None:
            dataset = data.load(self.dataset_name, self.data_dir, device="cpu")
            self._dataset = dataclasses.replace(dataset, mean=self.mean, std=self.std)
        return self._dataset

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 → (b, classes) float32, on the CPU"""
        return self.model(data.normalize(images.to(self.device), self.mean, self.std)).float().cpu()

    def probabilities(self, images: Tensor) -> np.ndarray:
        return self.logits(images).softmax(dim=-1).numpy()


# -------------------------------------------------------------------------------------------- the test set


def test(demo: Demo) -> list[Path]:
    """Test the model, measure it, print a summary; returns the files written."""
    images, labels = demo.dataset.test
    probabilities = evaluate.predict(demo.model, demo.dataset.test, demo.dataset, demo.device).numpy()
    costs = evaluate.measure(demo.model, demo.shape, demo.device)
    labels, predicted = labels.numpy(), probabilities.argmax(axis=1)
    right = int((predicted == labels).sum())
    scores = precision_recall_fscore_support(labels, predicted, labels=range(len(demo.classes)),
                                             zero_division=0)

    report = {
        "checkpoint": str(demo.path),
        "run_name": demo.run_name,
        "architecture": demo.architecture,
        "epoch": demo.epoch,
        "dataset": demo.dataset_name,
        "device": evaluate.device_name(demo.device),
        "torch": torch.__version__,
        "test": {"accuracy": right / len(labels), "right": right, "images": len(labels),
                 "macro_f1": float(scores[2].mean())},
        "classes": {name: {"precision": float(precision), "recall": float(recall), "f1": float(f1),
                           "images": int(images)}
                    for name, precision, recall, f1, images in zip(demo.classes, *scores, strict=True)},
        "performance": costs,
    }
    numbers = performance_lines(costs)
    title = f"{demo.run_name} on {report['device']}, float32"
    performance = "\n".join([f"{title}, PyTorch {torch.__version__}", "",
                             *(f"{name:<32}{value:>20}" for name, value in numbers), "", PERFORMANCE_NOTES])

    accuracy = f"{100 * right / len(labels):.2f}% ({right:,} of {len(labels):,} {demo.dataset_name} images)"
    summary = [
        f"test accuracy {accuracy}",
        f"{demo.path} ({demo.architecture}, epoch {demo.epoch}) on {report['device']}",
        "",
        f"{'class':<12}{'precision':>10}{'recall':>10}{'F1':>10}{'images':>10}",
        *(f"{name:<12}{100 * row['precision']:>10.2f}{100 * row['recall']:>10.2f}{100 * row['f1']:>10.2f}"
          f"{row['images']:>10,}" for name, row in report["classes"].items()),
        "",
        *(f"{name:<32}{value:>20}" for name, value in numbers),
    ]
    print("\n".join(summary), flush=True)

    folder, shown = demo.folder, [(name, value) for name, value in numbers if not name.startswith("images/s")]
    pictures = {
        "confusion.png": figures.confusion(labels, predicted, demo.classes),
        "predictions.png": figures.predictions(images, labels, probabilities, demo.classes),
        "mistakes.png": figures.mistakes(images, labels, probabilities, demo.classes),
        "class_scores.png": figures.class_scores(labels, predicted, demo.classes),
        "performance.png": figures.performance(shown, costs["images_per_second"], title),
    }
    for name, figure in pictures.items():
        figures.save(figure, folder / name)
    write_text(folder / "performance.txt", performance)
    write_text(folder / "report.json", json.dumps(report, indent=2))
    return list_written(folder, [*pictures, "performance.txt", "report.json"])


PERFORMANCE_NOTES = """\
Multiply-adds: matrix products, convolutions and 3 for each token, channel and state of the selective
scan; elementwise operations (normalisation, activations, exponentials) are not counted.
Times: the median of repeated forward passes after a warm-up, images already on the device.
Memory: on CUDA the most that PyTorch's allocator held while timing; elsewhere the most that the whole
process ever held, Python, its libraries and the dataset included.
"""


def performance_lines(costs: dict) -> list[tuple[str, str]]:
    lines = [
        ("parameters", f"{costs['parameters']:,}"),
        ("multiply-adds per image", f"{costs['multiply_adds'] / 1e6:,.2f} million"),
        ("latency, batch 1", f"{costs['latency_ms']:,.2f} ms"),
    ]
    if costs["peak_memory_mib"] is not None:
        lines.append((f"peak memory, {costs['peak_memory_of']}", f"{costs['peak_memory_mib']:,.0f} MiB"))
    return lines + [(f"images/s, batch {batch:,}", f"{rate:,.0f}")
                    for batch, rate in costs["images_per_second"].items()]


# ------------------------------------------------------------------------------------------- your pictures

MAX_PIXELS = 64 * 2**20
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MIN_CONTRAST = 24  # of 255; less is paper without ink


def prepare_picture(path: Path | str, size: int) -> Tensor:
    """A picture of one digit as the model knows them: (1, 1, size, size) uint8, light on dark.

    The steps are those of MNIST's makers (LeCun, Cortes and Burges, "The MNIST database"; LeCun et al.
    1998), after the background is found:

    1. Turn it upright (EXIF), lay transparent parts on a background, make it grey.
    2. The median of the border is the background, the shade furthest from it is the ink: stretch from 0
       (background) to 255 (ink), which inverts dark on light, and drop the faintest tenth, paper's grain.
    3. Crop the box around the ink and scale it, keeping its proportions, to fit 20 × 20.
    4. Put it into 28 × 28 with its centre of mass in the middle.

    For scikit-learn's 8 × 8 digits, which fill their square, the box is the square itself.

    Raises UserError for a file that is missing, empty, no picture, above 64 megapixels or without ink.
    """
    grey = _read_grey(Path(path))
    edge = max(1, min(grey.shape) // 32)
    border = (grey[:edge], grey[-edge:], grey[:, :edge], grey[:, -edge:])
    background = float(np.median(np.concatenate([strip.ravel() for strip in border])))
    contrast = max(grey.max() - background, grey.min() - background, key=abs)
    if abs(contrast) < MIN_CONTRAST:
        raise UserError(f"{path} shows no digit: it is one even shade; use a picture with dark and light")
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


def _read_grey(path: Path) -> np.ndarray:
    """A picture file as (H, W) float32, 0 to 255, at most 1024 pixels a side. Raises UserError."""
    too_large = UserError(f"{path} has more than {MAX_PIXELS // 2**20} megapixels; make it smaller")
    if not path.is_file():
        raise UserError(f"{path} is a folder; name the pictures in it" if path.is_dir() else
                        f"there is no picture {path}; check the name")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes; we refuse them
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise too_large
                grey = _to_grey(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... for damaged files
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__}); use a PNG or JPEG file"
                        ) from error
    grey.thumbnail((1024, 1024))
    return np.asarray(grey, np.float32)


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which Pillow would cut off at 255
        values = np.nan_to_num(np.asarray(image, np.float32))
        low, high = values.min(), values.max()
        return Image.fromarray(np.uint8(255 * (values - low) / max(high - low, 1e-6)))
    if not image.has_transparency_data:
        return image.convert("L")
    grey, alpha = (np.asarray(band, np.float32) for band in image.convert("RGBA").convert("LA").split())
    alpha /= 255
    if alpha.mean() > 0.5:  # a picture with holes: fill them with its own background
        paper = np.median(grey[alpha > 0.5])
    else:  # strokes on nothing: lay them on what they stand out from
        paper = 255 if (grey * alpha).sum() < 127.5 * alpha.sum() else 0
    return Image.fromarray(np.rint(grey * alpha + paper * (1 - alpha)).astype(np.uint8))


def classify_pictures(demo: Demo, paths: list[Path]) -> list[Path]:
    """Print a line and write a bar chart for each picture; returns the files written."""
    images = torch.cat([prepare_picture(path, demo.shape[1]) for path in paths])
    names = picture_names(paths)
    rows = demo.probabilities(images)
    for path, name, image, row in zip(paths, names, images, rows, strict=True):
        first, second = np.argsort(-row, kind="stable")[:2]
        figures.save(figures.bars(image, row, demo.classes, printable(path.name)), demo.folder / name)
        print(f"{printable(path)}: {demo.classes[first]} ({100 * row[first]:.1f}%), "
              f"then {demo.classes[second]} ({100 * row[second]:.1f}%)")
    return list_written(demo.folder, names)


def picture_names(paths: list[Path]) -> list[str]:
    """A file name for each picture's chart, no two the same even where case does not count."""
    names = []
    for path in paths:
        stem = re.sub(r"[^\w.-]+", "_", printable(path.stem))[:80]
        name, number = f"image-{stem}.png", 2
        while name.lower() in (taken.lower() for taken in names):
            name, number = f"image-{stem}-{number}.png", number + 1
        names.append(name)
    return names


# ----------------------------------------------------------------------------------------------- the prompt


def converse(demo: Demo) -> None:
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
            print(" ".join(str(error).split()))
            continue
        row = demo.probabilities(image)[0]
        print(terminal_picture(image[0]))
        print(terminal_bars(row, demo.classes, truth))


def fetch_image(demo: Demo, answer: str) -> tuple[Tensor, int | None]:
    """The image (1, C, H, W) that `answer` names and its class where it is known. Raises UserError."""
    if not answer:
        raise UserError("nothing was asked; type a number such as 7, a file name, or q")
    try:
        number = int(answer)
    except ValueError:
        return prepare_picture(Path(answer).expanduser(), demo.shape[1]), None
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
    best, width = int(probabilities.argmax()), max(map(len, classes))
    lines = [f"{name:>{width}} {'█' * round(40 * value):<40} {100 * value:5.1f}%"
             for name, value in zip(classes, probabilities.tolist(), strict=True)]
    verdict = "" if truth is None else " ✓" if best == truth else f" ✗, it is {classes[truth]}"
    return "\n".join([*lines, f"predicted {classes[best]}{verdict}"])


# ------------------------------------------------------------------------------------------------- output


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --runs-dir"
                        ) from error


def list_written(folder: Path, names: list[str]) -> list[Path]:
    print(f"\nwritten into {folder}:\n" + "\n".join(f"  {name}" for name in names), flush=True)
    return [folder / name for name in names]


def printable(name: Path | str) -> str:
    """A file's name without the bytes that no font and no terminal can show."""
    return str(name).encode(errors="replace").decode()


def show(paths: list[Path]) -> None:
    """Open the pictures in windows where there is a screen; wait till they are closed."""
    screen = sys.platform in ("win32", "darwin") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if not (screen and sys.stdout.isatty()):
        return
    import matplotlib.pyplot as plt
    if plt.get_backend().lower() == "agg":  # no window toolkit is installed
        return
    for path in paths:
        picture = plt.imread(path)
        height, width = picture.shape[:2]
        figure = plt.figure(path.name, figsize=(width / figures.DPI, height / figures.DPI))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(picture)
        axes.axis("off")
    print("close the windows to go on")
    plt.show()


if __name__ == "__main__":
    run_script(main)
