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
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support

import checkpoint
import evaluate
import figures
from pictures import prepare_picture
from prompt import converse
from trained import TrainedModel


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
    demo = TrainedModel(path, device, arguments.runs_dir, arguments.data_dir)

    written = []
    if "image" in arguments:
        written += classify_pictures(demo, arguments.image)
    elif not arguments.interactive:
        written += test(demo)
    if written and not arguments.no_show:
        show([path for path in written if path.suffix == ".png"])
    if arguments.interactive:
        converse(demo)


# -------------------------------------------------------------------------------------------- the test set


def test(demo: TrainedModel) -> list[Path]:
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


def classify_pictures(demo: TrainedModel, paths: list[Path]) -> list[Path]:
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
