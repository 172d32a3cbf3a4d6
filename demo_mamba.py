"""Show what a trained Vision Mamba can do: pictures, numbers, a page to draw on.

    python demo_mamba.py                                  the newest checkpoint on its test set
    python demo_mamba.py --report                         the same in one HTML file
    python demo_mamba.py --explain                        what the scan selects and remembers
    python demo_mamba.py --serve                          a page to draw digits on
    python demo_mamba.py --image four.png photos/         your own pictures
    python demo_mamba.py --interactive                    ask it, one image at a time
    python demo_mamba.py --compare a b                    two runs or more side by side
    python demo_mamba.py --export model.onnx              for ONNX Runtime

Pictures and numbers are written into RUNS_DIR/<run name>/demo and listed at the end, the report to
RUNS_DIR/<run name>/report.html. A run's name is that of its checkpoint's file.
"""

from __future__ import annotations

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)
from errors import ArgumentParser, UserError, as_flag, image_size, one_line, printable, run_script  # isort: skip  (Ctrl-C is one line from here on)

import argparse
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

import checkpoint
import comparison
import evaluate
import explain
import export
import figures
import report
import robustness
import scan_figures
import serve
from folder import pictures_below
from prompt import converse
from trained import TrainedModel


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Show what a trained Vision Mamba can do: pictures, numbers, a page to draw on.",
        epilog="Without a flag that says what to show, the model is tested on its dataset's test set.")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", default=argparse.SUPPRESS,
                        help="the trained model (default: the newest in --checkpoints-dir)")
    parser.add_argument("--checkpoints-dir", type=Path, metavar="DIR", default=Path("checkpoints"),
                        help="where train_mamba.py saves its models")
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", default=Path("runs"),
                        help="results go into DIR/<run name>/demo")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", default=argparse.SUPPRESS,
                        help="where datasets are kept, and fetched to where missing, or the pictures "
                             "(default: where they were when the model was trained)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto is CUDA where there is one, else the CPU")
    parser.add_argument("--image", type=Path, nargs="+", metavar="FILE", default=argparse.SUPPRESS,
                        help="classify your own pictures, or those in a folder, of any size, grey or colour; "
                             "for MNIST and its like one digit on a plain background, dark on light or light "
                             "on dark (default: none)")
    parser.add_argument("--image-size", type=image_size, metavar="PIXELS", default=argparse.SUPPRESS,
                        help="side that images are brought to, or HEIGHTxWIDTH (default: as it was trained)")
    parser.add_argument("--interactive", action="store_true",
                        help="ask for test image numbers and picture files, and answer in the terminal")
    parser.add_argument("--explain", action="store_true",
                        help="draw where the scan writes and how far its state remembers, for a digit of "
                             "each class, and animate the state")
    parser.add_argument("--report", action="store_true",
                        help="test and explain, all of it in one file, RUNS_DIR/<run name>/report.html")
    parser.add_argument("--serve", action="store_true",
                        help="a page to draw digits on, in your browser; needs requirements-demo.txt")
    parser.add_argument("--port", type=port_number, default=7860, help="of the page")
    parser.add_argument("--export", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                        help="write the classifier as FILE.onnx and compare it with PyTorch; needs "
                             "requirements-demo.txt (default: none)")
    parser.add_argument("--compare", nargs="+", metavar="RUN", default=argparse.SUPPRESS,
                        help="names of runs, or checkpoints: their accuracy, time, memory and confusion "
                             "matrices side by side, in RUNS_DIR/comparison (default: none)")
    parser.add_argument("--no-show", action="store_true", help="open no windows, only write the files")
    return parser.parse_args()


def port_number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, but is {text!r}")
    return int(text)


def main() -> None:
    arguments = parse_arguments()
    device = evaluate.pick_device(arguments.device)
    if "compare" in arguments:
        for flag in ("checkpoint", "image", "image_size", "export", "interactive", "explain", "report",
                     "serve"):
            if getattr(arguments, flag, False):
                raise UserError("--compare shows runs side by side and nothing else; leave "
                                f"{as_flag(flag)} out")
        written = compare_runs(arguments, device)
        if not arguments.no_show:
            show(written[:1])
        return
    path = getattr(arguments, "checkpoint", None) or checkpoint.newest(arguments.checkpoints_dir)
    demo = TrainedModel(path, device, arguments.runs_dir, getattr(arguments, "data_dir", None),
                        getattr(arguments, "image_size", None))
    # Whatever cannot work is told before anything is written.
    if "export" in arguments:
        export.check(arguments.export)
    if arguments.explain and not explain.has_scan(demo.model):
        raise UserError(f"--explain needs a mamba model, but {path} holds a {demo.architecture}; "
                        "choose another by --checkpoint")
    pictures, images, wrong = read_pictures(demo, getattr(arguments, "image", []))

    written = []
    if "export" in arguments:
        print("\n".join(export.export(demo, arguments.export)))
    if pictures:
        written += classify_pictures(demo, pictures, images)
    if arguments.report:
        written += write_report(demo)
    elif arguments.explain:
        written += explain_digits(demo, animated=True)
    if not (written or "export" in arguments or arguments.interactive or arguments.serve):
        written += test(demo)[0]
    if written and not arguments.no_show and not arguments.serve:
        show([path for path in written if path.suffix == ".png"])
    if arguments.interactive:
        converse(demo)
    if arguments.serve:
        serve.serve(demo, arguments.port, browser=not arguments.no_show)
    if wrong:  # the others are shown, but a shell must not take it for success
        raise UserError(f"{wrong} of {wrong + len(pictures)} pictures skipped; mend those named above, or "
                        "leave them out")


def compare_runs(arguments: argparse.Namespace, device: torch.device) -> list[Path]:
    """Show the runs of --compare side by side; returns the files written. Raises UserError."""
    if len(arguments.compare) < 2:
        raise UserError("--compare needs two runs or more; name them, such as --compare mamba lstm")
    paths = [Path(run) if Path(run).is_file() else arguments.checkpoints_dir / f"{run}.pt"
             for run in arguments.compare]
    models = [TrainedModel(path, device, arguments.runs_dir, getattr(arguments, "data_dir", None))
              for path in paths]
    folder = arguments.runs_dir / "comparison"
    written = comparison.compare(models, folder)
    return list_written(folder, [path.name for path in written])


# -------------------------------------------------------------------------------------------- the test set


def test(demo: TrainedModel, animated: bool = False) -> tuple[list[Path], dict]:
    """Test the model, measure it, print a summary; returns the files written and what report.json holds."""
    images, labels = demo.dataset.test
    probabilities = evaluate.predict(demo.model, demo.dataset.test, demo.dataset, demo.device).numpy()
    costs = evaluate.measure(demo.model, demo.shape, demo.device)
    labels, predicted = labels.numpy(), probabilities.argmax(axis=1)
    right = int((predicted == labels).sum())
    scores = precision_recall_fscore_support(labels, predicted, labels=range(len(demo.classes)),
                                             zero_division=0)

    found = {
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
        "calibration_error": figures.calibration(labels, probabilities)[3],
        "robustness": robustness.measure(demo.model, demo.dataset.test, demo.dataset, demo.device,
                                         ROBUSTNESS_IMAGES),
    }
    others = comparison.rates_of_others(demo.architecture, demo.config, demo.shape, demo.device)
    found["images_per_second_of_others"] = others
    numbers = performance_lines(costs, others)
    title = f"{demo.run_name} on {found['device']}, float32"
    performance = "\n".join([f"{title}, PyTorch {torch.__version__}", "",
                             *(f"{name:<36}{value:>16}" for name, value in numbers), "", PERFORMANCE_NOTES])

    accuracy = f"{100 * right / len(labels):.2f}% ({right:,} of {len(labels):,} {demo.dataset_name} images)"
    width = max(12, *(len(name) + 2 for name in demo.classes))
    summary = [
        f"test accuracy {accuracy}",
        f"{demo.path} ({demo.architecture}, epoch {demo.epoch}) on {found['device']}",
        "",
        f"{'class':<{width}}{'precision':>10}{'recall':>10}{'F1':>10}{'images':>10}",
        *(f"{printable(name):<{width}}{100 * row['precision']:>10.2f}{100 * row['recall']:>10.2f}"
          f"{100 * row['f1']:>10.2f}{row['images']:>10,}" for name, row in found["classes"].items()),
        "",
        *(f"{name:<36}{value:>16}" for name, value in numbers),
    ]
    print("\n".join(summary), flush=True)

    folder, shown = demo.folder, [(name, value) for name, value in numbers if not name.startswith("images/s")]
    pictures = {
        "confusion.png": figures.confusion(labels, predicted, demo.classes),
        "predictions.png": figures.predictions(images, labels, probabilities, demo.classes),
        "mistakes.png": figures.mistakes(images, labels, probabilities, demo.classes),
        "hardest.png": figures.hardest(images, labels, probabilities, demo.classes),
        "reliability.png": figures.reliability(labels, probabilities),
        "robustness.png": figures.robustness(found["robustness"], robustness.examples(images[:1])),
        "class_scores.png": figures.class_scores(labels, predicted, demo.classes),
        "performance.png": figures.performance(
            shown, {demo.architecture: costs["images_per_second"], **others}, title),
    }
    for name, figure in pictures.items():
        figures.save(figure, folder / name)
    write_text(folder / "performance.txt", performance)
    write_text(folder / "report.json", json.dumps(found, indent=2))
    written = list_written(folder, [*pictures, "performance.txt", "report.json"])
    if explain.has_scan(demo.model):
        written += explain_digits(demo, animated)
    return written, found


ROBUSTNESS_IMAGES = 500  # of the test set; times 24 ways of spoiling them
PERFORMANCE_NOTES = """\
Multiply-adds: matrix products, convolutions and 3 for each token, channel and state of the selective
scan; elementwise operations (normalisation, activations, exponentials) are not counted.
The other architectures are untrained, with as many parameters and the same stem and head.
Times: the median of repeated forward passes after a warm-up, images already on the device.
Memory: on CUDA the most that PyTorch's allocator held while timing; elsewhere the most that the whole
process ever held, Python, its libraries and the dataset included.
"""


def performance_lines(costs: dict, others: dict[str, dict[int, float]]) -> list[tuple[str, str]]:
    """(name, value) for people; `others` are the images/s of other architectures of the same size."""
    lines = [
        ("parameters", f"{costs['parameters']:,}"),
        ("multiply-adds per image", f"{costs['multiply_adds'] / 1e6:,.2f} million"),
        ("latency, batch 1", f"{costs['latency_ms']:,.2f} ms"),
    ]
    if costs["peak_memory_mib"] is not None:
        lines.append((f"peak memory, {costs['peak_memory_of']}", f"{costs['peak_memory_mib']:,.0f} MiB"))
    return lines + [(f"images/s, batch {batch:,}", f"{rate:,.0f}")
                    for batch, rate in costs["images_per_second"].items()] + [
        (f"images/s, batch {batch:,}, {other}", f"{rate:,.0f}")
        for other, rates in others.items() for batch, rate in rates.items()]


# ------------------------------------------------------------------------------------ what the scan does


def explain_digits(demo: TrainedModel, animated: bool) -> list[Path]:
    """Draw what the scan selects and remembers for a test image of each class; returns the files written."""
    chosen = explain.one_of_each_class(demo.dataset.test.labels)
    images = demo.dataset.test.images[chosen][:]
    scans = explain.record(demo.model, demo.normalize(images))
    pictures = explain.draw(images, scans)
    for name, figure in pictures.items():
        figures.save(figure, demo.folder / name)
    names = list(pictures)
    if animated:
        frames = explain.animate(images, scans, len(images) // 3)
        scan_figures.save_animation(frames, demo.folder / "state.gif")
        names.append("state.gif")
    return list_written(demo.folder, names)


def write_report(demo: TrainedModel) -> list[Path]:
    """Test and explain, and write all of it into one HTML file; returns the files written."""
    written, found = test(demo, animated=True)
    numbers = [("test accuracy", f"{100 * found['test']['accuracy']:.2f}% ({found['test']['right']:,} of "
                                 f"{found['test']['images']:,})"),
               ("expected calibration error", f"{100 * found['calibration_error']:.2f}%"),
               *performance_lines(found["performance"], found["images_per_second_of_others"])]
    there = {path.name: path for path in written}
    sections = [(heading, text, [there[name] for name in names if name in there])
                for heading, text, names in REPORT]
    path = demo.folder.parent / "report.html"
    report.write(path, f"{demo.run_name}: what it can do",
                 f"{demo.path.name} ({demo.architecture}, epoch {demo.epoch}), tested on "
                 f"{demo.dataset_name}; {found['device']}, PyTorch {found['torch']}", numbers,
                 [section for section in sections if section[2]])
    print(f"  {path}")
    return written


REPORT = (
    ("Confusions", "What is taken for what, and how well each class does.",
     ("confusion.png", "class_scores.png")),
    ("Predictions and mistakes", "The first test images, the most confident mistakes, and the closest calls.",
     ("predictions.png", "mistakes.png", "hardest.png")),
    ("Confidence", "Whether the model is right as often as it is sure.", ("reliability.png",)),
    ("When it breaks", "The same model on images that it was not trained for.", ("robustness.png",)),
    ("Where the scan looks", "Δ is how much a token writes into the state, and how much of what was there it "
     "lets go. The share of each token in the last state follows from Δ, A and B.",
     ("delta.png", "memory.png", "memory_reach.png", "state.gif")),
    ("What it costs", "Measured on this machine; see performance.txt for how.", ("performance.png",)),
)


# ------------------------------------------------------------------------------------------- your pictures


def read_pictures(demo: TrainedModel, named: list[Path]) -> tuple[list[Path], list[Tensor], int]:
    """The pictures that are named, or in a folder that is, and as what the model knows them.

    Those that cannot be used are told on stderr and counted. Raises UserError where no other is left.
    """
    paths, images, wrong = [], [], []
    for name in named:
        found = pictures_below(name) if os.path.isdir(name) else [name]
        if not found:
            wrong.append(f"there are no pictures in the folder {name}; choose another")
        for path in found:
            try:
                images.append(demo.picture(path))
                paths.append(path)
            except UserError as error:
                wrong.append(str(error))
    if len(wrong) == 1 and not paths:
        raise UserError(wrong[0])
    for line in wrong:
        print(f"skipped: {one_line(line)}", file=sys.stderr)
    if wrong and not paths:
        raise UserError(f"none of the {len(wrong)} pictures can be used; name others")
    return paths, images, len(wrong)


def classify_pictures(demo: TrainedModel, paths: list[Path], images: list[Tensor]) -> list[Path]:
    """Print a line and write a bar chart for each picture; returns the files written."""
    names = picture_names(paths)
    for path, name, image in zip(paths, names, images, strict=True):
        row = demo.probabilities(image)[0]
        first, second = np.argsort(-row, kind="stable")[:2]
        figures.save(figures.bars(image[0], row, demo.classes, path.name), demo.folder / name)
        print(f"{printable(path)}: {printable(demo.classes[first])} ({100 * row[first]:.1f}%), "
              f"then {printable(demo.classes[second])} ({100 * row[second]:.1f}%)")
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


def show(paths: list[Path]) -> None:
    """Open the pictures in windows where there is a screen; wait till they are closed."""
    screen = sys.platform in ("win32", "darwin") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if not (screen and sys.stdout.isatty()):
        return
    import matplotlib.pyplot as plt
    if plt.get_backend().lower() == "agg":  # no window toolkit is installed
        return
    for path in paths[:20]:  # --image may be given a folder of hundreds
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
