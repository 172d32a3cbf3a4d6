"""Image datasets as tensors that live on the device: the registry, splits, batches.

    dataset = load("mnist", "data", device="cuda")
    for images, labels in epoch_batches(dataset.train, 256, generator):
        ...

MNIST is 55 MB as uint8, so a split is one tensor: no worker processes and no copies in the loop. A new
dataset is a function that reads it and an entry in DATASETS.

Shapes: b images in a batch, N in a split, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from mnist import Arrays, read_mnist


class Split(NamedTuple):
    images: Tensor  # (N, C, H, W) uint8, 0 to 255
    labels: Tensor  # (N,) int64, an index into the dataset's classes


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # a channel, of training pixels scaled to [0, 1]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split


@dataclass(frozen=True)
class Entry:
    """What is known of a dataset before it is read."""

    classes: tuple[str, ...]
    in_channels: int
    image_size: int  # pixels a side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int  # the default for a model, pixels a side
    validation: int  # that many images at the end of the training set are held out
    read: Callable[[Path], Arrays]  # takes the data folder

# ---------------------------------------------------------------------------------------------
# Digits: 1,797 images of 8 x 8 that come with scikit-learn; a whole run in seconds, offline
# ---------------------------------------------------------------------------------------------

DIGITS_TEST = 360


def read_digits(data_dir: Path) -> Arrays:
    """scikit-learn's digits, shuffled once for all, because neighbours were written by one hand.

    Nothing is read from `data_dir`. Raises UserError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"digits cannot be read: {error}; run: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    # RandomState and not default_rng: NumPy promises that its stream never changes.
    order = np.random.RandomState(0).permutation(len(labels))
    images = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)[order]  # ink 0 to 16
    labels = labels.astype(np.uint8)[order]
    return images[:-DIGITS_TEST], labels[:-DIGITS_TEST], images[-DIGITS_TEST:], labels[-DIGITS_TEST:]

# ---------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------

DATASETS = {
    "mnist": Entry(classes=tuple("0123456789"), in_channels=1, image_size=28, mean=(0.1307,), std=(0.3081,),
                   patch_size=4, validation=5000, read=read_mnist),
    "digits": Entry(classes=tuple("0123456789"), in_channels=1, image_size=8, mean=(0.3058,), std=(0.3755,),
                    patch_size=2, validation=237, read=read_digits),
}


def load(name: str, data_dir: Path | str, device: torch.device | str = "cpu",
         limit_train: int | None = None) -> Dataset:
    """Dataset `name` as tensors on `device`, of the training images only the first `limit_train`.

    The validation images are the last of the training set, the same whatever the limit.
    Raises UserError for an unknown name, a limit below 1, and files that are damaged or out of reach.
    """
    if name not in DATASETS:
        raise UserError(f"there is no dataset {name!r}; choose from: {', '.join(DATASETS)}")
    if limit_train is not None and limit_train < 1:
        raise UserError(f"cannot train on {limit_train} images; the limit must be 1 or more")
    entry = DATASETS[name]
    images, labels, test_images, test_labels = entry.read(Path(data_dir))
    held_out = len(labels) - entry.validation
    keep = held_out if limit_train is None else min(limit_train, held_out)

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        # np.array copies: the arrays may be read-only views of a file's bytes.
        return Split(torch.from_numpy(np.array(images)).to(device),
                     torch.from_numpy(labels.astype(np.int64)).to(device))

    return Dataset(name, entry.classes, entry.mean, entry.std, train=split(images[:keep], labels[:keep]),
                   val=split(images[held_out:], labels[held_out:]), test=split(test_images, test_labels))


# ---------------------------------------------------------------------------------------------
# Batches. Nothing below copies from the host or waits for the device.
# ---------------------------------------------------------------------------------------------


def num_batches(split: Split, batch_size: int, drop_last: bool = False) -> int:
    """How many batches `epoch_batches` yields. Raises UserError for a batch size below 1."""
    if batch_size < 1:
        raise UserError(f"cannot make batches of {batch_size} images; the batch size must be 1 or more")
    full, rest = divmod(len(split.labels), batch_size)
    return full + (rest > 0 and not drop_last)


def epoch_batches(split: Split, batch_size: int, generator: torch.Generator | None, shuffle: bool = True,
                  drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image of `split` once, as (images (b, C, H, W) uint8, labels (b,) int64) on its device.

    `generator` is on the split's device and gives the order; it may be None without `shuffle`. The last
    batch is smaller where the batch size does not divide N, or left out with `drop_last`.
    """
    batches = num_batches(split, batch_size, drop_last)
    n_images = len(split.labels)
    if shuffle:
        order = torch.randperm(n_images, generator=generator, device=split.labels.device)
    for start in range(0, batches * batch_size, batch_size):
        chosen = order[start:start + batch_size] if shuffle else slice(start, start + batch_size)
        yield split.images[chosen], split.labels[chosen]
