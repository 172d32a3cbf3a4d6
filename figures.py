"""Pictures of a classifier's work: arrays in, a matplotlib Figure out.

    images         (N, C, H, W) uint8, C = 1 (grey) or 3 (colour)
    labels         (N,) the true classes
    predictions    (N,) the predicted classes
    probabilities  (N, classes), each row sums to 1
    classes        the classes' names

Arrays may be torch tensors on the CPU or NumPy arrays. No function touches pyplot's global state: in a
notebook a Figure shows itself, in a script `save` writes it. Nothing is told by colour alone: a wrong
prediction also carries a cross and a dashed frame, and every shade stays apart in grey print.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import seaborn
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from errors import UserError, printable

DPI = 150
MARGIN = 0.14  # inches
INK, MUTED, FAINT, PALE = "#22272e", "#6b7480", "#c9ced6", "#eef1f4"
CLASS_LETTERS = 24  # of a class's name beside a chart
MOST_NUMBERS = 50  # classes of a matrix with a number in each cell
RIGHT, WRONG = "#2a6496", "#c2410c"  # blue and burnt orange: apart for every common colour blindness
SERIES = ("#2a6496", "#c2410c", "#9a7209", "#5b4b8a", "#4d7c4d")
ERRORS = LinearSegmentedColormap.from_list("errors", ["#fff4ea", "#fdba80", "#e8702a", "#8f2d0a"])

# How fonts begin that Linux, Windows and macOS have for the scripts that DejaVu Sans lacks.
FALLBACKS = ("Noto Sans CJK", "Noto Sans SC", "Source Han Sans", "WenQuanYi", "Droid Sans Fallback",
             "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang", "Hiragino Sans",
             "Apple SD Gothic Neo", "Arial Unicode MS")


def fonts() -> list[str]:
    """DejaVu Sans and what is installed of FALLBACKS: of a font that is missing matplotlib warns at every
    word."""
    installed = font_manager.get_font_names()
    found = ([name for name in installed if name.startswith(start)] for start in FALLBACKS)
    return ["DejaVu Sans", *(min(names) for names in found if names)]


logging.getLogger("matplotlib.font_manager").addFilter(  # they need not be there in bold
    lambda record: "Failed to find font weight" not in str(record.msg))
STYLE = {
    "font.family": fonts(),  # the first comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "text.parse_math": False,  # a class, a run and a file may have a $ in their names
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """While it holds, what is drawn and saved looks as the pictures here."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that no font has
        yield


styled = style()  # a decorator: the style holds while the function below it draws


@styled
def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG (or what the name's ending says). Raises UserError where it cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor="white")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another "
                        "--runs-dir") from error


@styled
def confusion(labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str]) -> Figure:
    """Counts and row percentages of every (true, predicted) pair.

    The diagonal is left pale and only the errors are coloured, on their own scale: one error in a
    thousand would vanish beside the diagonal on a common scale.
    """
    count, classes = len(classes), [_short(name, CLASS_LETTERS) for name in classes]
    matrix = confusion_matrix(np.asarray(labels), np.asarray(predictions), labels=range(count))
    totals = matrix.sum(axis=1, keepdims=True)
    share = 100 * matrix / np.maximum(totals, 1)
    diagonal = np.eye(count, dtype=bool)
    worst = share[~diagonal].max(initial=0.0) or 1.0

    numbers = count <= MOST_NUMBERS
    side = max(5.0, 0.68 * count) if numbers else min(0.2 * count, 20)
    gap = min(1.5, 0.05 * 72 * side / count)  # points between cells, which may be few pixels wide
    figure = _figure(side + 1.4, side + 0.5)
    axes = figure.subplots()
    seaborn.heatmap(share, mask=diagonal | (matrix == 0), cmap=ERRORS, vmin=0, vmax=worst, square=True,
                    linewidths=gap, linecolor="white", xticklabels=False, yticklabels=False, ax=axes,
                    cbar_kws={"label": "errors, % of the true class", "shrink": 0.6, "aspect": 30})
    for index in range(count):
        axes.add_patch(Rectangle((index, index), 1, 1, facecolor=PALE, edgecolor="white", linewidth=gap))
    for row, column in np.ndindex(matrix.shape if numbers else (0, 0)):
        number = matrix[row, column]
        if row != column and number == 0:
            axes.text(column + 0.5, row + 0.5, "·", color=FAINT, ha="center", va="center")
            continue
        colour = "white" if row != column and share[row, column] > 0.65 * worst else INK
        axes.text(column + 0.5, row + 0.42, f"{number:,}", color=colour, ha="center", va="center",
                  weight="bold" if row == column else "normal")
        percent = f"{share[row, column]:.1f}%" if totals[row, 0] else "no images"
        axes.text(column + 0.5, row + 0.74, percent, color=colour, ha="center", va="center", fontsize=6)

    axes.set(xlabel="predicted", ylabel="true")
    turn = (40 if numbers else 60) if max(map(len, classes)) > (6 if numbers else 2) else 0
    axes.tick_params(length=0)
    named = np.arange(0, count, -(-count // 100))  # more names have no room
    axes.set_xticks(named + 0.5, [classes[index] for index in named], rotation=turn,
                    ha="right" if turn else "center", rotation_mode="anchor")
    axes.set_yticks(named + 0.5, [classes[index] for index in named], va="center")
    bar = axes.collections[0].colorbar
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.ax.locator_params(nbins=5)
    right, total = int(np.trace(matrix)), int(matrix.sum())
    _title(figure, "Confusion matrix", f"{right:,} of {total:,} right ({_percent(right, total)}); "
           + ("each cell: images and percent of its row" if numbers else "the darker, the more of its row"))
    return figure


@styled
def predictions(images: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str],
                most: int = 40) -> Figure:
    """The first `most` images with the predicted class and its probability; wrong ones are crossed."""
    images, labels, probabilities = (np.asarray(array[:most]) for array in (images, labels, probabilities))
    predicted = probabilities.argmax(axis=1)
    figure, cells = _grid(len(images), columns=8, side=0.86, text_lines=3)
    for cell, image, label, guess, row in zip(cells, images, labels, predicted, probabilities, strict=True):
        right = guess == label
        _picture(cell, image, wrong=not right)
        second = f"{100 * row[guess]:.1f}%" + ("" if right else f"\nis {_short(classes[label])}")
        _caption(cell, f"{'' if right else '✗ '}{_short(classes[guess])}", second, right)
    right = int((predicted == labels).sum())
    _title(figure, "Predictions", f"predicted class and its probability; {right} of these {len(images)} right"
           + ("" if right == len(images) else ", wrong ones crossed and dashed"))
    return figure


@styled
def mistakes(images: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str],
             most: int = 25) -> Figure:
    """The wrong predictions, the most confident first, each with the runner-up and the truth."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)  # images: only those shown are read
    order = np.argsort(-probabilities, axis=1, kind="stable")
    wrong = np.flatnonzero(order[:, 0] != labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")]
    shown = wrong[:most]
    if len(shown) == 0:
        figure = _figure(6, 2.6)
        figure.text(0.5, 0.6, "✓", fontsize=40, color=RIGHT, ha="center", va="center")
        figure.text(0.5, 0.3, "No mistakes", fontsize=13, weight="bold", ha="center", va="center")
        figure.text(0.5, 0.17, f"all {len(labels):,} images are right", color=MUTED, ha="center", va="center")
        return figure

    figure, cells = _grid(len(shown), columns=5, side=1.25, text_lines=3, subtitle_lines=2)
    for cell, index in zip(cells, shown, strict=True):
        first, second = order[index, :2]
        _picture(cell, images[index], wrong=True)
        truth = f"is {_short(classes[labels[index]])} ({100 * probabilities[index, labels[index]]:.1f}%)"
        runner_up = f"then {_short(classes[second])} ({100 * probabilities[index, second]:.1f}%)"
        _caption(cell, f"✗ {_short(classes[first])} ({100 * probabilities[index, first]:.1f}%)",
                 f"{runner_up}\n{truth}", right=False)
    which = "" if len(shown) == len(wrong) else f", the {len(shown)} most confident shown"
    _title(figure, "Mistakes", f"{len(wrong):,} of {len(labels):,} wrong "
           f"({_percent(len(wrong), len(labels))}){which}\n"
           "under each image: prediction, runner-up, truth, with their probabilities")
    return figure


@styled
def hardest(images: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str],
            most: int = 25) -> Figure:
    """The images where the first two classes are closest, right or wrong, each with both and the truth."""
    images, labels, probabilities = (np.asarray(array) for array in (images, labels, probabilities))
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=1)
    shown = np.argsort(ranked[:, 0] - ranked[:, 1], kind="stable")[:most]
    figure, cells = _grid(len(shown), columns=5, side=1.25, text_lines=3, subtitle_lines=2)
    for cell, index in zip(cells, shown, strict=True):
        (first, second), right = order[index, :2], order[index, 0] == labels[index]
        _picture(cell, images[index], wrong=not right)
        runner_up = f"or {_short(classes[second])} ({100 * ranked[index, 1]:.1f}%)?"
        _caption(cell, f"{'' if right else '✗ '}{_short(classes[first])} ({100 * ranked[index, 0]:.1f}%)",
                 f"{runner_up}\nis {_short(classes[labels[index]])}", right)
    right = int((order[shown, 0] == labels[shown]).sum())
    _title(figure, "The hardest images", f"where prediction and runner-up are closest; {right} of these "
           f"{len(shown)} right\nunder each image: prediction, runner-up, truth")
    return figure


def calibration(labels: ArrayLike, probabilities: ArrayLike,
                bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Confidence against accuracy: (mean confidence, accuracy, images) of each bin, and the expected
    calibration error (Guo et al., arXiv 1706.04599, eq. 3), all in fractions.

    The bins are of equal width in the confidence of the predicted class; an empty one has NaN for both.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, hits, bins) / count
    error = float(np.nansum(count * np.abs(accuracy - mean)) / max(len(labels), 1))
    return mean, accuracy, count, error


def wilson(share: ArrayLike, count: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The 95% interval of a binomial `share` of `count` trials: Wilson's score interval (JASA 22, 1927). It
    stays in 0 to 1 and has a width also where all trials ended alike."""
    share, count = np.asarray(share, np.float64), np.asarray(count, np.float64)
    z2 = 1.959964 ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count) / (1 + z2 / count)
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)  # against rounding


@styled
def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15) -> Figure:
    """The reliability diagram: how often the model is right when it is so sure, with Wilson's 95% intervals,
    and of how many images."""
    mean, accuracy, count, error = calibration(labels, probabilities, bins)
    edges = 100 * np.linspace(0, 1, bins + 1)
    figure = _figure(5.2, 5.2)
    chart, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    chart.plot([0, 100], [0, 100], color=FAINT, linestyle="--", linewidth=1.4)
    chart.text(97, 8, "dashed: as sure as right", color=MUTED, fontsize=8, ha="right")
    full = count > 0
    right, low, high = accuracy[full], *wilson(accuracy[full], count[full])
    spread = 100 * np.stack([right - low, high - right])
    chart.errorbar(100 * mean[full], 100 * right, yerr=spread, color=RIGHT, marker="o", markersize=5,
                   linewidth=1.6, elinewidth=1, ecolor=MUTED, capsize=2)
    chart.set(ylabel="right, %", ylim=(-3, 103), xlim=(0, 100))
    below.bar(edges[:-1], count, width=0.9 * 100 / bins, align="edge", color=RIGHT, log=True)
    below.set(xlabel="confidence in the predicted class, %", ylabel="images", ylim=(0.6, 2 * count.max()))
    below.yaxis.set_major_formatter("{x:,.0f}")  # a logarithmic axis would write 10² in mathtext
    below.minorticks_off()
    for axes in (chart, below):
        axes.grid(axis="y", color=PALE, linewidth=1.2)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        seaborn.despine(ax=axes, left=True)
    _title(figure, "Confidence against accuracy",
           f"expected calibration error {100 * error:.2f}% ({bins} bins, {count.sum():,} images);\n"
           "thin bars: Wilson's 95% intervals")
    return figure


@styled
def robustness(curves: dict[str, dict], examples: dict[str, ArrayLike] | None = None) -> Figure:
    """Accuracy against each kind of spoiling.

    curves    {name: {"unit", "strengths", "accuracy" (fractions), "images"}}, as `robustness.measure` gives
    examples  {name: (strengths, C, H, W) uint8}: what each strength looks like, drawn above its point
    """
    figure = _figure(9, 5.4)
    for axes, (name, curve) in zip(figure.subplots(2, 2, sharey=True).flat, curves.items(), strict=True):
        strengths, accuracy = np.asarray(curve["strengths"], float), 100 * np.asarray(curve["accuracy"])
        places = np.arange(len(strengths))
        axes.plot(places, accuracy, color=RIGHT, marker="o", markersize=4.5, linewidth=1.6)
        for place, value in zip(places, accuracy, strict=True):
            axes.annotate(f"{value:.0f}", (place, value), (0, -13 if value > 25 else 7), ha="center",
                          textcoords="offset points", fontsize=7.5, color=INK)
        for place, image in zip(places, np.asarray(examples[name]) if examples else (), strict=False):
            small = axes.inset_axes((place - 0.36, 108, 0.72, 30), transform=axes.transData)
            _picture(small, image, wrong=False)
        axes.set_xticks(places, [f"{strength:g}" for strength in strengths])
        axes.set(ylim=(0, 140 if examples else 104), xlim=(-0.5, len(places) - 0.5), xlabel=curve["unit"])
        axes.set_yticks(range(0, 101, 25), [f"{value}%" for value in range(0, 101, 25)])
        axes.set_title(name, fontsize=10, weight="bold", loc="left", color=INK)
        axes.grid(axis="y", color=PALE, linewidth=1.2)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        seaborn.despine(ax=axes, left=True, bottom=True)
    count = next(iter(curves.values()))["images"]
    _title(figure, "When it breaks",
           f"accuracy on {count:,} test images that are turned, noisy, blurred or moved")
    return figure


@styled
def class_scores(labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str]) -> Figure:
    """Precision, recall and F1 of every class: F1 lies between the other two, so a line joins them.

    A class without images has no scores; without predictions its precision is 0, as scikit-learn has it.
    """
    scores = 100 * np.stack(precision_recall_fscore_support(
        np.asarray(labels), np.asarray(predictions), labels=range(len(classes)), zero_division=0)[:3])
    support = np.bincount(np.asarray(labels), minlength=len(classes))
    scores[:, support == 0] = np.nan
    rows, classes = np.arange(len(classes)), [_short(name, CLASS_LETTERS) for name in classes]

    figure = _figure(7.2 + 0.08 * max(10, *map(len, classes)), 1.3 + 0.34 * len(classes))
    chart, table = figure.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
    chart.hlines(rows, scores[:2].min(axis=0), scores[:2].max(axis=0), color=FAINT, linewidth=3, zorder=1)
    for values, marker in zip(scores[:2], "><", strict=True):
        chart.scatter(values, rows, marker=marker, s=42, facecolor="white", edgecolor=INK, zorder=2)
    chart.scatter(scores[2], rows, marker="o", s=34, color=RIGHT, zorder=3)
    low = np.nanmin(scores, initial=100)
    low = 0 if low < 50 else np.floor(low - 0.1 * (100 - low) - 0.01)
    chart.set_xlim(low, 100 + 0.03 * (100 - low))
    chart.set_ylim(len(classes) - 0.4, -1.4)
    chart.set_yticks(rows, classes)
    chart.tick_params(length=0)
    chart.grid(axis="x", color=PALE, linewidth=1.2)
    chart.set_axisbelow(True)
    seaborn.despine(ax=chart, left=True, bottom=True)
    chart.set_xlabel("percent" if low == 0 else f"percent (the axis starts at {low:g})")

    table.axis("off")
    for place, name, values in zip((0.27, 0.52, 0.74, 1), ("▷ precision", "◁ recall", "● F1", "images"),
                                   (*scores, support), strict=True):
        table.text(place, -1, name, ha="right", va="center", fontsize=8, color=MUTED)
        for row, value in zip(rows, values, strict=True):
            text = f"{value:,}" if name == "images" else "–" if np.isnan(value) else f"{value:.2f}"
            table.text(place, row, text, ha="right", va="center", fontsize=8,
                       weight="bold" if name == "● F1" else "normal")
    _title(figure, "Scores of each class", f"mean F1 {np.nanmean(scores[2]):.2f}%")
    return figure


@styled
def bars(image: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], title: str) -> Figure:
    """One image, as the model sees it, beside the probabilities of all classes."""
    probabilities = np.asarray(probabilities)
    best = int(probabilities.argmax())
    rows, classes = np.arange(len(classes)), [_short(name, CLASS_LETTERS) for name in classes]
    figure = _figure(7, max(2.9, 0.9 + 0.21 * len(classes)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
    _picture(left, np.asarray(image), wrong=False)
    left.set_xlabel("as the model sees it", labelpad=6, fontsize=8)
    colours = [RIGHT if row == best else FAINT for row in rows]
    right.barh(rows, 100 * probabilities, height=0.72, color=colours)
    for row, value in zip(rows, 100 * probabilities, strict=True):
        right.text(value + 1.5, row, f"{value:.1f}%", va="center", fontsize=8,
                   weight="bold" if row == best else "normal", color=INK if row == best else MUTED)
    right.set_xlim(0, 116)  # room for the number beside a full bar
    right.set_ylim(len(classes) - 0.4, -0.6)
    right.set_yticks(rows, classes)
    right.get_yticklabels()[best].set_weight("bold")
    right.set_xticks([])
    right.tick_params(length=0)
    seaborn.despine(ax=right, bottom=True)
    _title(figure, _short(title, 54),
           f"predicted {classes[best]} with probability {100 * probabilities[best]:.1f}%")
    return figure


@styled
def performance(numbers: Sequence[tuple[str, str]], throughput: dict[str, dict[int, float]],
                subtitle: str) -> Figure:
    """What the model costs: `numbers` as (name, value) lines, `throughput` as {model: {batch size: images/s}}
    bars, the model itself first and beside it what it is compared with."""
    models, sizes = list(throughput), list(next(iter(throughput.values())))
    thick = 0.8 / len(models)
    figure = _figure(8.5, max(2.7, 0.9 + 0.36 * len(numbers), 0.9 + 0.26 * len(models) * len(sizes)))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    left.axis("off")
    left.set(xlim=(0, 1), ylim=(len(numbers) - 0.5, -0.5))
    for row, (name, value) in enumerate(numbers):
        left.text(0, row, name, va="center", color=MUTED)
        left.text(0.94, row, value, va="center", ha="right", weight="bold")
        if row:
            left.axhline(row - 0.5, xmax=0.94, color=PALE, linewidth=1)
    most = max(rate for rates in throughput.values() for rate in rates.values())
    for index, (model, rates) in enumerate(throughput.items()):
        ours = index == 0
        for group, size in enumerate(sizes):
            place = group + (index - (len(models) - 1) / 2) * thick
            right.barh(place, rates[size], height=0.85 * thick, color=RIGHT if ours else MUTED,
                       alpha=1 if ours else 0.4)
            name = f" {model}" if len(models) > 1 else ""
            right.text(rates[size] + 0.02 * most, place, f"{rates[size]:,.0f}{name}", va="center", fontsize=8,
                       weight="bold" if ours else "normal")
    right.set_yticks(range(len(sizes)), [f"batch {size:,}" for size in sizes])
    right.set(xticks=[], xlim=(0, 1.5 * most), ylim=(len(sizes) - 0.5, -0.5))
    right.set_title("images per second", fontsize=9, color=MUTED)
    right.tick_params(length=0)
    seaborn.despine(ax=right, bottom=True)
    _title(figure, "Performance", _short(subtitle, 110))
    return figure


@styled
def comparison(table: Sequence[tuple[str, Sequence[str]]], labels: ArrayLike,
               predictions: Sequence[ArrayLike], classes: Sequence[str], subtitle: str) -> Figure:
    """Models in columns: `table` as (name, a value for each model) lines, their names first.

    Below, where each is wrong: how many images of every (true, predicted) pair, on one scale for all.
    """
    models, count, lines = len(predictions), len(classes), len(table)
    classes = [_short(name, 16) for name in classes] if count <= 12 else []
    longest = max(map(len, classes), default=0)
    turn, side = 40 if longest > 3 else 0, min(max(2.6, 0.3 * count), 10)
    wide, tall = side + 0.3 + 0.07 * longest, side + 0.5 + (0.05 * longest if turn else 0)
    width = max(8, 1.9 + wide * models)
    figure = _figure(width, 1.1 + 0.27 * lines + tall)
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.27 * lines, tall))
    axes = top.subplots()
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(lines - 0.5, -0.5))
    first = 0.26
    room = int((1 - first) * width / models / 0.1)  # letters
    table = [(table[0][0], [_short(name, room) for name in table[0][1]]), *table[1:]]
    for row, (name, values) in enumerate(table):
        axes.text(0, row, name, va="center", color=MUTED)
        for column, value in enumerate(values):
            axes.text(first + (1 - first) * (column + 1) / models, row, value, va="center", ha="right",
                      weight="bold" if row == 0 else "normal")
        if row:
            axes.axhline(row - 0.5, color=PALE, linewidth=1)
    matrices = [confusion_matrix(np.asarray(labels), np.asarray(predicted), labels=range(count))
                for predicted in predictions]
    diagonal = np.eye(count, dtype=bool)
    worst = max(matrix[~diagonal].max(initial=0) for matrix in matrices) or 1
    for place, name, matrix in zip(np.ravel(bottom.subplots(1, models)), table[0][1], matrices, strict=True):
        seaborn.heatmap(matrix, mask=diagonal | (matrix == 0), cmap=ERRORS, vmin=0, vmax=worst, square=True,
                        linewidths=1, linecolor=PALE, cbar=False, annot=count <= 12, fmt="d",
                        annot_kws={"fontsize": 7}, xticklabels=classes or False, yticklabels=classes or False,
                        ax=place)
        for index in range(count):
            place.add_patch(Rectangle((index, index), 1, 1, facecolor=PALE, edgecolor="white"))
        wrong = int(matrix.sum() - np.trace(matrix))
        place.set_title(f"{_short(name, int(width / models / 0.085) - 16)}: {wrong:,} wrong", fontsize=9)
        place.set(xlabel="predicted", ylabel="true")
        place.tick_params(length=0, labelrotation=0)
        if turn:
            place.set_xticks(place.get_xticks(), classes, rotation=turn, ha="right", rotation_mode="anchor")
    _title(figure, "Models side by side", subtitle)
    return figure


@styled
def growth(curves: dict[str, Sequence[tuple[float, float]]], title: str, subtitle: str, x: str,
           y: str) -> Figure:
    """Lines through (x, y) points on two logarithmic axes: {name: points}; each is named where it ends.

    Names that share the part before a comma share a colour, and a marker tells them apart.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    families = list(dict.fromkeys(name.partition(",")[0] for name in curves))
    seen: dict[str, int] = {}
    for name, points in curves.items():
        family = name.partition(",")[0]
        variant = seen[family] = seen.get(family, -1) + 1
        axes.plot(*zip(*sorted(points), strict=True), label=name, linewidth=1.6, markersize=5,
                  color=SERIES[families.index(family) % len(SERIES)], marker="os^D"[variant % 4],
                  linestyle=("-", (0, (4, 2)), ":")[variant % 3])
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.minorticks_off()
    axes.grid(color=PALE)
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)
    seaborn.despine(ax=axes)
    _title(figure, title, subtitle)
    return figure


# --------------------------------------------------------------------------------------------- the pieces


def _figure(width: float, height: float, dpi: int = DPI, layout: str | None = "constrained") -> Figure:
    """An empty Figure, inches, that keeps whatever is drawn inside its margins where it has a layout."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    # A bare Figure makes a picture of its whole size for each word that is measured, and keeps it.
    FigureCanvasAgg(figure)
    if layout:
        figure.get_layout_engine().set(w_pad=MARGIN, h_pad=MARGIN / 2)
    return figure


def _grid(count: int, columns: int, side: float, text_lines: int,
          subtitle_lines: int = 1) -> tuple[Figure, list[Axes]]:
    """A Figure with `count` pictures of `side` inches, each with room for `text_lines` below it.

    Placed by hand: a layout engine would shrink the pictures to fit the longest caption.
    """
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    step, drop = 1.34 * side, side + 0.17 * text_lines + 0.12
    width = max(6.4, columns * step - 0.34 * side + 2 * MARGIN)  # room for the subtitle
    height = _title_height(subtitle_lines) + rows * drop
    figure = _figure(width, height, layout=None)
    cells = []
    for index in range(count):
        row, column = divmod(index, columns)
        bottom = height - _title_height(subtitle_lines) - row * drop - side
        left = MARGIN + column * step
        cells.append(figure.add_axes((left / width, bottom / height, side / width, side / height)))
    return figure, cells


def _picture(axes: Axes, image: np.ndarray, wrong: bool) -> None:
    """Draw one (C, H, W) image, framed; the frame of a wrong one is dashed."""
    image = np.asarray(image)
    grey = len(image) == 1
    axes.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255,
                interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor=WRONG if wrong else FAINT, linewidth=2 if wrong else 0.8,
                  linestyle=(0, (3, 2)) if wrong else "-")


def _caption(axes: Axes, first: str, rest: str, right: bool) -> None:
    """Write below a picture: the prediction in bold, then smaller what there is to know about it."""
    place = {"xy": (0.5, 0), "xycoords": "axes fraction", "textcoords": "offset points", "ha": "center",
             "va": "top"}
    axes.annotate(first, xytext=(0, -5), weight="bold", fontsize=8.5, color=INK if right else WRONG, **place)
    axes.annotate(rest, xytext=(0, -17), fontsize=7.5, color=MUTED if right else INK, linespacing=1.35,
                  **place)


def _short(name: str, letters: int = 10) -> str:
    """A name cut to what has room, in its middle: the names of a series differ at their ends."""
    name = printable(name)
    if len(name) <= letters:
        return name
    end = (letters - 1) // 3
    return f"{name[:letters - 1 - end].rstrip(' _-')}…{name[-end:].lstrip(' _-')}"


def _title_height(subtitle_lines: int) -> float:
    return 0.5 + 0.17 * subtitle_lines


def _title(figure: Figure, title: str, subtitle: str) -> None:
    """A bold title with a quiet line or two below it, in a strip kept free of axes."""
    width, height = figure.get_size_inches()
    figure.text(MARGIN / width, 1 - 0.12 / height, title, weight="bold", fontsize=13, va="top")
    figure.text(MARGIN / width, 1 - 0.38 / height, subtitle, color=MUTED, fontsize=8.5, va="top",
                linespacing=1.4)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 1, 1 - _title_height(subtitle.count("\n") + 1) / height))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f}%"
