"""Pictures of what a scan selects and remembers: arrays in, a matplotlib Figure out.

    images    (b, C, H, W) uint8
    maps      a list, one for each scan, of (b, height, width): a number for each token
    orders    a list, one for each scan, of (tokens,): row · width + column of each token in reading order
    names     a list of the scans' names
    lengths   a list of tokens in one sequence; fewer than `tokens` where each row is one

`explain.record` gives them all. The colours grow from dark to light in even steps, so that they hold for
colour-blind readers and in grey print.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike
from PIL import Image
from tqdm import tqdm

from errors import UserError
from figures import FAINT, INK, MARGIN, MUTED, PALE, RIGHT, WRONG, _figure, _title, _title_height, styled

HEAT = matplotlib.colormaps["magma"]
MOST_SCANS = 12
SIDE = 0.86  # inches of a column of small pictures


def delta_maps(images: ArrayLike, maps: Sequence[ArrayLike], orders: Sequence[ArrayLike],
               lengths: Sequence[int], names: Sequence[str]) -> Figure:
    """The mean Δ of each token beside the digit, one column a scan with its order drawn above it."""
    subtitle = ("mean Δ of each token: light tokens are taken into the state more than dark ones; above,\n"
                "the order in which they are read. Each column's scale begins at its smallest Δ, not at 0.")
    return _token_maps(images, maps, orders, lengths, names, "Where the scan writes", subtitle, "{:.3g}")


def memory_maps(images: ArrayLike, maps: Sequence[ArrayLike], orders: Sequence[ArrayLike],
                lengths: Sequence[int], names: Sequence[str]) -> Figure:
    """Each token's share of the last state, fractions, one column a scan."""
    percent = [100 * np.asarray(shares) for shares in maps]
    subtitle = ("each token's share of the state after the last token, exact from Δ, A and B;\n"
                "above, the order in which the tokens are read. One logarithmic scale for each column.")
    return _token_maps(images, percent, orders, lengths, names, "What the last state holds", subtitle,
                       "{:.2g}%", logarithmic=True)


@styled
def _token_maps(images, maps, orders, lengths, names, title: str, subtitle: str, unit: str,
                logarithmic: bool = False) -> Figure:
    images, chosen = np.asarray(images), _evenly(len(maps), MOST_SCANS)
    columns, rows = len(chosen) + 1, len(images)
    aspect = images.shape[2] / images.shape[3]
    tall = min(SIDE * aspect, 2 * SIDE)  # inches of one picture; wide only as much as that leaves it
    wide, schema = tall / aspect, max(tall, SIDE / 2)
    gap, head, foot = 0.12, schema + 0.3, 0.42
    width = max(6.2, columns * (SIDE + gap) - gap + 2 * MARGIN)
    top = _title_height(subtitle.count("\n") + 1)
    height = top + head + rows * (tall + gap) + foot
    figure = _figure(width, height, layout=None)

    def place(column: int, bottom: float, high: float, wide: float = SIDE) -> Axes:
        """Axes in the middle of a column, sizes in inches."""
        left = MARGIN + column * (SIDE + gap) + (SIDE - wide) / 2
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    def column_axes(column: int) -> Axes:
        """Axes for all pictures of a column: one for each picture would take seconds to draw."""
        axes = place(column, height - top - head - rows * (tall + gap), rows * (tall + gap), wide)
        axes.set(xlim=(0, wide), ylim=(rows * (tall + gap), 0))
        axes.set_autoscale_on(False)
        _bare(axes)
        return axes

    def tile(axes: Axes, row: int, pixels: np.ndarray, **how) -> AxesImage:
        above = row * (tall + gap)
        return axes.imshow(pixels, extent=(0, wide, above + tall, above), aspect="auto",
                           interpolation="nearest", **how)

    axes = column_axes(0)
    for row, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        tile(axes, row, pixels, cmap="gray", vmin=0, vmax=255)
    for column, scan in enumerate(chosen, start=1):
        values = np.asarray(maps[scan])
        high = max(values.max(), 1e-9)
        if logarithmic:  # the faintest tokens would stretch the scale over many empty decades
            low = max(np.percentile(values, 5), 1e-4 * high)
            norm = LogNorm(low, max(high, 1.01 * low), clip=True)
        else:
            low = min(values.min(), 0.99 * high)
            norm = Normalize(low, high)
        axes = place(column, height - top - head + gap, schema, wide)
        _reading_order(axes, np.asarray(orders[scan]), lengths[scan], values.shape[1:])
        axes.set_title(names[scan], fontsize=8.5, weight="bold", pad=3)
        axes = column_axes(column)
        for row in range(rows):
            shown = tile(axes, row, np.maximum(values[row], low), cmap=HEAT, norm=norm)
        bar = place(column, height - top - head - rows * (tall + gap) - 0.02, 0.07)
        figure.colorbar(shown, cax=bar, orientation="horizontal").outline.set_visible(False)
        bar.minorticks_off()
        bar.set_xticks([])
        for side, value in ((0, low), (1, high)):
            bar.text(side, -0.5, unit.format(value), transform=bar.transAxes, fontsize=6.5, color=MUTED,
                     va="top", ha="right" if side else "left")
    left_out = len(maps) - len(chosen)
    _title(figure, title, subtitle + (f" {len(chosen)} of {len(maps)} scans shown." if left_out else ""))
    return figure


def _reading_order(axes: Axes, order: np.ndarray, length: int, grid: tuple[int, int]) -> None:
    """Draw the way of a scan over the tokens: an arrow for each straight run, thin lines between the runs."""
    height, width = grid
    rows, columns = np.divmod(order, width)
    for start in range(0, len(order), length):
        y, x = rows[start:start + length], columns[start:start + length]
        breaks = np.flatnonzero(np.abs(np.diff(y)) + np.abs(np.diff(x)) > 1) + 1
        runs = np.split(np.arange(length), breaks)
        axes.plot(x, y, color=FAINT, linewidth=0.6 if len(runs) <= 28 else 0.2, zorder=1)
        for run in runs:
            if len(run) > 1:
                axes.annotate("", (x[run[-1]], y[run[-1]]), (x[run[0]], y[run[0]]), arrowprops={
                    "arrowstyle": "-|>", "color": RIGHT, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0,
                    "mutation_scale": 5})
        axes.plot(x[0], y[0], "o", color=RIGHT, markersize=2.6)
    axes.set(xlim=(-0.7, width - 0.3), ylim=(height - 0.3, -0.7))
    axes.set_facecolor(PALE)
    _bare(axes)


@styled
def memory_reach(shares: Sequence[ArrayLike], names: Sequence[str]) -> Figure:
    """How far each scan's last state remembers.

    shares    a list, one for each scan, of (sequences, l): each token's share of the last state, in reading
              order; drawn is their mean over the sequences, summed from the last token backwards
    """
    chosen = _evenly(len(shares), MOST_SCANS)
    figure = _figure(7, 3.9)
    axes = figure.subplots()
    longest = max(np.shape(shares[scan])[1] for scan in chosen)
    axes.plot([0, longest], [0, 100], color=FAINT, linestyle="--", linewidth=1.2, zorder=1)
    axes.text(0.99 * longest, 55, "dashed: if every token\ncounted the same", color=MUTED, fontsize=7.5,
              ha="right", va="center")
    for place, scan in enumerate(chosen):
        mean = np.asarray(shares[scan], np.float64).mean(axis=0)
        held = np.concatenate([[0], 100 * np.cumsum(mean[::-1])])
        half = int(np.argmax(held >= 50))
        colour = HEAT(0.15 + 0.65 * place / max(1, len(chosen) - 1))
        tokens = "1 token" if half == 1 else f"{half} tokens"
        axes.plot(np.arange(len(held)), held, color=colour, linewidth=1.8,
                  linestyle=("-", (0, (4, 1.2)), (0, (1.2, 1)))[place % 3],
                  label=f"{names[scan]}: half of it from the last {tokens}")
        axes.plot(half, held[half], "os^D"[place % 4], color=colour, markersize=5.5)
    axes.set(xlim=(0, longest), ylim=(0, 102), xlabel="tokens back from the last one",
             ylabel="share of the last state, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=PALE, linewidth=1.2)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3)
    axes.tick_params(length=0)
    seaborn.despine(ax=axes, left=True, bottom=True)
    _title(figure, "How far the state remembers",
           "mean over the images; markers: where half of the last state is reached")
    return figure


@styled
def state_frames(image: ArrayLike, grid: tuple[int, int], states: Sequence[ArrayLike],
                 orders: Sequence[ArrayLike], lengths: Sequence[int], names: Sequence[str],
                 most: int = 48) -> list[Image.Image]:
    """The state filling up token by token, as frames of an animation.

    image     (C, H, W) uint8
    grid      height and width of the feature map, in tokens
    states    a list, one for each scan, of (tokens, e, n): h after each token in reading order
    most      frames; of more tokens only some are shown

    For each scan, four at most: the image with the tokens not yet read darkened, its state (states down,
    channels along), and how large the state has been. The colours of a state are scaled to its own values.
    """
    image, chosen = np.asarray(image), _evenly(len(states), 4)
    states = [np.asarray(states[scan], np.float32) for scan in chosen]
    channels = _evenly(states[0].shape[1], 64)  # all of them would be narrower than a pixel
    orders, lengths, names = ([values[scan] for scan in chosen] for values in (orders, lengths, names))
    tokens = len(states[0])
    picture = image[0] if image.shape[0] == 1 else image.mean(axis=0)
    figure = _figure(6.4, 0.75 + 0.95 * len(states), dpi=100, layout=None)
    rows = figure.subplots(len(states), 3, squeeze=False, width_ratios=(1, 5.2, 1.7))
    inch = 1 / figure.get_figheight()
    figure.subplots_adjust(left=0.02, right=0.97, top=1 - 0.62 * inch, bottom=0.02, hspace=0.42, wspace=0.08)
    figure.text(0.02, 1 - 0.1 * inch, "The state filling up, token by token", weight="bold", fontsize=12,
                va="top")
    counter = figure.text(0.97, 1 - 0.13 * inch, "", color=MUTED, ha="right", va="top")
    artists = []
    for (left, middle, right), state, name in zip(rows, states, names, strict=True):
        limit = np.percentile(np.abs(state), 99.5) or 1.0
        size = np.linalg.norm(state.reshape(tokens, -1), axis=1)
        shown = left.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        heat = middle.imshow(state[0, channels].T, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto",
                             interpolation="nearest")
        middle.set_title(f"{name}: {state.shape[2]} states × {len(channels)} of {state.shape[1]:,} channels",
                         fontsize=7.5, pad=2, loc="left", color=INK)
        right.set(xlim=(0, tokens), ylim=(0, 1.08 * size.max() or 1))
        right.set_title("size of the state", fontsize=7.5, pad=2, loc="left", color=MUTED)
        line, = right.plot([], [], color=WRONG, linewidth=1.5)
        right.set_facecolor(PALE)
        for axes in (left, middle, right):
            _bare(axes)
        artists.append((shown, heat, line, size))

    frames = []
    for last in tqdm(_evenly(tokens, most), desc="state.gif", unit="frame", leave=False, disable=None):
        for (shown, heat, line, size), state, order, length in zip(artists, states, orders, lengths,
                                                                   strict=True):
            read = np.full(grid[0] * grid[1], 0.3)
            read[np.asarray(order)[:last + 1]] = 1
            light = np.asarray(Image.fromarray(read.reshape(grid).astype(np.float32)).resize(
                picture.shape[::-1], Image.Resampling.NEAREST))
            shown.set_data(np.maximum(picture, 60) * light)
            heat.set_data(state[last, channels].T)
            line.set_data(*_broken(size[:last + 1], length))
        counter.set_text(f"token {last + 1} of {tokens}")
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    return frames


def _broken(values: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """x = 1, 2, ... and y of a line through all `values` that breaks after each `length` of them."""
    breaks = np.arange(length, len(values), length)
    return tuple(np.insert(np.asarray(part, np.float64), breaks, np.nan)
                 for part in (np.arange(1, len(values) + 1), values))


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = 120) -> None:
    """Write `frames` as a GIF that begins anew after a pause. Raises UserError where it cannot be written.

    64 colours without dithering: half the size, and flat areas stay flat.
    """
    small = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(small) - 1) + [2000]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another "
                        "--runs-dir") from error


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to count − 1, evenly spaced, the last one among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
