"""The flags of train_mamba.py, for every program that gives or reads them.

    settings = parse_arguments(["--preset", "best", "--lr", "1e-3"])
    as_flags(vars(settings))    the command line that gives them again
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import augment
import data
from baselines import ARCHITECTURES
from errors import ArgumentParser, as_flag, image_size
from mamba_ssm_simple import SCANS
from presets import PRESETS

MAY_CHANGE_ON_RESUME = {"resume", "data_dir", "workers", "device", "runs_dir", "checkpoints_dir",
                        "checkpoint_every", "draw", "profile"}


def parse_arguments(given: Sequence[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
    """What the flags `given` mean (None: those of the command line), and for the others the preset.

    `saved` settings, of a run to be resumed, take the preset's place; flags that are gone since may have been
    off. Raises UserError for a wrong flag.
    """
    given = sys.argv[1:] if given is None else given
    parser = argument_parser()
    if saved is not None:
        there = vars(parser.parse_args([]))
        return parser.parse_args([*as_flags({name: value for name, value in saved.items()
                                             if name in there or not is_off(value)}), *given])
    parser.set_defaults(**PRESETS[parser.parse_args(given).preset].settings)
    return parser.parse_args(given)


def explicit(given: Sequence[str]) -> dict[str, object]:
    """The settings that these flags name, without preset and defaults. Raises UserError for a wrong flag."""
    parser, untouched = argument_parser(), object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), untouched))
    return {name: value for name, value in vars(parser.parse_args(given, namespace)).items()
            if value is not untouched}


def as_flags(settings: dict) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in settings.items():
        flag = as_flag(name)
        if isinstance(value, bool):
            words.append(flag if value else as_flag(f"no_{name}"))
        elif isinstance(value, tuple | list):
            words.append(f"{flag}={'x'.join(map(str, value))}")
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def differences(saved: dict, settings: argparse.Namespace) -> dict[str, tuple]:
    """A run's settings that are not those `saved`, each as (saved, now); a newer flag had its default.

    One that is gone since counts as None now, unless it was off.
    """
    defaults = parse_arguments([])
    fill_in(defaults)
    found = {}
    for name, value in vars(settings).items():
        there = saved.get(name, getattr(defaults, name))
        there = tuple(there) if isinstance(there, list) else there  # JSON has no tuples
        if name not in MAY_CHANGE_ON_RESUME | {"run_name"} and there != value:
            found[name] = there, value
    return found | {name: (value, None) for name, value in saved.items()
                    if name not in vars(defaults) and not is_off(value)}


def is_off(value: object) -> bool:
    """Whether a flag of that value did nothing, so that a run is the same where the flag is gone."""
    return value is None or value == 0  # as False is


def argument_parser() -> ArgumentParser:
    """Every flag with its default, which is the one of the preset `default`."""
    parser = ArgumentParser("Train VisionMamba2 on images.")
    parser.prog = "train_mamba.py"  # whichever program asks
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="default", help="; ".join(
        f"{name}: {preset.reason}" for name, preset in PRESETS.items()).replace("%", "%%")
        + "; flags that are given win over it")
    add("--dataset", choices=data.DATASETS, default="mnist",
        help="what to learn; digits needs no download; folder is your own pictures in --data-dir")
    add("--data-dir", type=Path, metavar="DIR", default=Path("data"),
        help="where datasets are kept, and fetched to where missing; for folder: the pictures, a folder a "
        "class, in train/ and val/ or to be split")
    add("--image-size", type=image_size, metavar="PIXELS", default=None,
        help="side that pictures are brought to, or HEIGHTxWIDTH (None: the dataset's own, 64 for folder)")
    add("--memory-budget", type=non_negative_float, metavar="GIB", default=data.MEMORY_BUDGET,
        help="a folder whose pictures take more memory than this is streamed from its files at every epoch")
    add("--workers", type=process_count, metavar="N", default=None,
        help="processes that read what is streamed (None: as many as cores, less one, at most 16)")
    add("--epochs", type=positive_int, metavar="N", default=20, help="passes over the training images")
    add("--batch-size", type=positive_int, metavar="N", default=64,
        help="images a step, of all processes together")
    add("--lr", type=positive_float, metavar="RATE", default=1e-3,
        help="peak learning rate of AdamW, after a warm-up and before a cosine to a hundredth of it")
    add("--warm-up", type=whole, metavar="STEPS", default=None,
        help="steps over which the rate rises linearly (None: a twentieth of all, at most 500)")
    add("--weight-decay", type=non_negative_float, metavar="RATE", default=0.05,
        help="of AdamW, on matrices alone: none on A_log, D, biases and norms")
    add("--model", choices=ARCHITECTURES, default="mamba",
        help="lstm and transformer are made to have as many parameters as mamba would have with the same "
        "flags, and the same stem, head and training")
    add("--d-model", type=positive_int, metavar="N", default=128, help="width of the tokens")
    add("--num-blocks", type=positive_int, metavar="N", default=4, help="blocks, or layers of the LSTM")
    add("--d-state", type=positive_int, metavar="N", default=8, help="states a channel of mamba")
    add("--d-conv", type=positive_int, metavar="N", default=4,
        help="taps of the convolution along the sequence before each scan of mamba: this token and the "
        "N - 1 before it")
    add("--patch-size", type=power_of_two, metavar="PIXELS", default=None,
        help="side of a token, a power of two; MNIST: 4 gives 7×7 tokens, 2 gives 14×14 (None: the dataset's "
        "own, 4 for mnist, 2 for digits)")
    add("--stem-depth", type=positive_int, metavar="N", default=1,
        help="convolutions for each halving of the image on its way to tokens; more see strokes better, and "
        "take more time")
    add("--scan", choices=SCANS, default="cross",
        help="order in which mamba reads tokens: each row its own sequence; all of them row by row; "
        "successive blocks forwards and backwards through them (alternate), or right, down, left, up (cross)")
    add("--bidirectional", action=argparse.BooleanOptionalAction, default=False,
        help="read both ways in every block; a transformer does so anyway")
    add("--position-embedding", action=argparse.BooleanOptionalAction, default=False,
        help="add sines and cosines of row and column to the tokens; a transformer has them anyway")
    add("--position-conv", action=argparse.BooleanOptionalAction, default=False,
        help="before each block of mamba a depthwise 3×3 convolution: a token sees all of its neighbours")
    add("--permute-seed", type=seed, metavar="N", default=None,
        help="show the pixels of every image in one fixed random order, a function of N (None: as they lie)")
    add("--drop-path", type=fraction, metavar="RATE", default=0.0,
        help="how often an image goes past the last block in training, past earlier ones less often")
    add("--drop-tokens", type=fraction, metavar="RATE", default=0.0,
        help="how often a token is zero in training: against learning long sequences by heart")
    add("--augment", choices=augment.KINDS, default="affine",
        help="what is done to the training images; affine: random shifts, turns, zooms and shears; elastic: "
        "these and a smooth random warp; streamed images: random crops, whichever it is")
    add("--no-augment", action="store_const", dest="augment", const="none", default=argparse.SUPPRESS,
        help="the same as --augment none (default: off)")
    add("--flip", action=argparse.BooleanOptionalAction, default=None,
        help="mirror training images at random, unless --augment is none (None: for fashion-mnist and CIFAR)")
    add("--augment-strength", type=non_negative_float, metavar="FACTOR", default=1.0,
        help="multiplies the range of all these movements, but for the crops of streamed images")
    add("--erase", type=fraction, metavar="RATE", default=0.0,
        help="fraction of the training images that lose a random rectangle")
    add("--ema", type=fraction, metavar="DECAY", default=0.0,
        help="evaluate and keep the exponential moving average of the weights, 0.999 say (0: the weights)")
    add("--mean-teacher", type=share, metavar="SHARE", default=0.0,
        help="with --ema: how much of what is learnt of an image is what the averaged weights say of it, "
        "instead of its label; 0.5, say")
    add("--seed", type=seed, metavar="N", default=0, help="of weights, order and augmentation")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto is CUDA where there is one, else the CPU")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="keep only what enters each block and compute the rest again in the backward: less memory, more "
        "time; not for lstm")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="mixed precision of matrix products; auto is bf16 on CUDA and off elsewhere")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the model: a minute more at the start, and less time for each step on CUDA")
    add("--profile", action=argparse.BooleanOptionalAction, default=False,
        help="train a few dozen steps, print the time of a step and the share of each part; write nothing")
    add("--limit-train", type=positive_int, metavar="N", default=None,
        help="use only N training images: the first, of a folder any (None: all)")
    add("--hold-out", type=positive_int, metavar="N", default=None,
        help="keep the last N training images for validation: more tell recipes apart that are nearly as "
        "good (None: the dataset's own number, 5,000 of MNIST's)")
    add("--train-on-all", action=argparse.BooleanOptionalAction, default=False,
        help="for a recipe that is chosen already: train on the validation images, too, keep the last epoch "
        "and tell the test accuracy once, after it")
    add("--run-name", metavar="NAME", default=None,
        help="names the run's folder and checkpoints (None: dataset, date and time)")
    add("--runs-dir", type=Path, metavar="DIR", default=Path("runs"),
        help="TensorBoard and metrics.jsonl go into DIR/<run-name>")
    add("--draw", action=argparse.BooleanOptionalAction, default=True,
        help="give TensorBoard pictures of mistakes, and pictures and histograms of what the scans select, "
        "after the first epoch, the last, and between them as often as a tenth of the time allows")
    add("--checkpoints-dir", type=Path, metavar="DIR", default=Path("checkpoints"),
        help="checkpoints go here")
    add("--checkpoint-every", type=interval, metavar="STEPS|SECONDSs", default="300s",
        help="save the state in mid-epoch, too: every 300s, say, or every 500 steps")
    add("--resume", type=Path, metavar="PATH", nargs="?", const=Path("newest"), default=None,
        help="go on from a .last.pt; without PATH the newest in --checkpoints-dir (None: a new run)")
    return parser


def number(kind: type, what: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """An argument's type that says, where the value does not fit, what it must be."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {what}, but is {text!r}")
        return value
    return parse


positive_int = number(int, "a whole number from 1 to a billion", lambda value: 1 <= value <= 10**9)
positive_float = number(float, "a number above 0", lambda value: 0 < value < math.inf)
non_negative_float = number(float, "a number from 0 on", lambda value: 0 <= value < math.inf)
fraction = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
share = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
whole = number(int, "a whole number from 0 to a billion", lambda value: 0 <= value <= 10**9)
power_of_two = number(int, "a power of two: 1, 2, 4, ...", lambda value: value in {2**i for i in range(16)})
interval = number(str, "steps, such as 500, or seconds, such as 300s",
                  lambda value: re.fullmatch(r"0*[1-9]\d{0,8}s?", value, re.ASCII) is not None)
process_count = number(int, "a whole number from 0 to 1024", lambda value: 0 <= value <= 1024)
seed = number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def fill_in(settings: argparse.Namespace) -> None:
    """Give the flags that were left out what their dataset says."""
    entry = data.DATASETS[settings.dataset]
    settings.image_size = settings.image_size or (entry.image_size, entry.image_size)
    settings.patch_size = settings.patch_size or entry.patch_size
    settings.flip = entry.flip if settings.flip is None else settings.flip
