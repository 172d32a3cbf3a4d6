"""Image datasets: the registry, splits, batches.

    dataset = load("mnist", "data", device="cuda")
    for images, labels in epoch_batches(dataset.train, 256, generator):
        ...

MNIST is 55 MB as uint8, so a split is one tensor on the device: no worker processes and no copies in the
loop. Folders of pictures that do not fit into memory are streamed from their files (streaming.py); the loop
is the same. A new dataset is a function that reads it and an entry in DATASETS.

Shapes: b images in a batch, N in a split, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import folder
from errors import UserError
from mnist import Arrays, read_mnist
from readers import Torchvision, read_digits
from streaming import PictureFiles

MEMORY_BUDGET = 2.0  # GiB; a folder whose pictures take more is streamed


class Split(NamedTuple):
    images: Tensor | PictureFiles  # (N, C, H, W) uint8, 0 to 255
    labels: Tensor  # (N,) int64, an index into the dataset's classes


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # a channel, of training pixels scaled to [0, 1]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split  # the same as `val` where the pictures' owner made no test set

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train.images.shape[1:])

    @property
    def streamed(self) -> bool:
        """Whether the training images are read from their files, batch by batch."""
        return isinstance(self.train.images, PictureFiles)


@dataclass(frozen=True)
class Entry:
    """What is known of a dataset before it is read."""

    classes: tuple[str, ...]  # none: the names of the folders
    in_channels: int
    image_size: int  # pixels a side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int  # the default for a model, pixels a side
    validation: int  # that many images at the end of the training set are held out
    read: Callable[[Path], Arrays] | None  # takes the data folder; None: pictures in folders
    flip: bool = False  # whether a mirrored image is one of the same class
    drawn: bool = True  # light strokes on a dark ground, which a user's picture is made into


# ---------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------

DIGITS = tuple("0123456789")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
             "t10k-labels-idx1-ubyte")


CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""


def idx_files(name: str) -> tuple[str, ...]:
    return tuple(f"{name}/raw/{file}" for file in IDX_FILES)


DATASETS = {
    "mnist": Entry(classes=DIGITS, in_channels=1, image_size=28, mean=(0.1307,), std=(0.3081,),
                   patch_size=4, validation=5000, read=read_mnist),
    "fashion-mnist": Entry(
        classes=("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                 "ankle boot"),
        in_channels=1, image_size=28, mean=(0.2860,), std=(0.3530,), patch_size=4, validation=5000, flip=True,
        read=Torchvision("FashionMNIST", idx_files("FashionMNIST"))),
    "kmnist": Entry(
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        in_channels=1, image_size=28, mean=(0.1918,), std=(0.3483,), patch_size=4, validation=5000,
        read=Torchvision("KMNIST", idx_files("KMNIST"))),
    "emnist": Entry(
        classes=tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
        in_channels=1, image_size=28, mean=(0.1751,), std=(0.3332,), patch_size=4, validation=18800,
        read=Torchvision(
            "EMNIST", tuple(f"EMNIST/raw/emnist-balanced-{part}-{kind}-ubyte" for part in ("train", "test")
                            for kind in ("images-idx3", "labels-idx1")),
            train={"split": "balanced", "train": True}, test={"split": "balanced", "train": False},
            transposed=True)),
    "cifar10": Entry(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        in_channels=3, image_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
        patch_size=4, validation=5000, flip=True, drawn=False,
        read=Torchvision("CIFAR10", tuple(f"cifar-10-batches-py/{file}" for file in (
            *(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")))),
    "cifar100": Entry(
        classes=tuple(CIFAR100.split()),
        in_channels=3, image_size=32, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
        patch_size=4, validation=5000, flip=True, drawn=False,
        read=Torchvision("CIFAR100", ("cifar-100-python/train", "cifar-100-python/test",
                                      "cifar-100-python/meta"))),
    "svhn": Entry(
        classes=DIGITS, in_channels=3, image_size=32, mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970), patch_size=4, validation=5000, drawn=False,
        read=Torchvision("SVHN", ("train_32x32.mat", "test_32x32.mat"), train={"split": "train"},
                         test={"split": "test"})),
    "digits": Entry(classes=DIGITS, in_channels=1, image_size=8, mean=(0.3058,), std=(0.3755,),
                    patch_size=2, validation=237, read=read_digits),
    "folder": Entry(classes=(), in_channels=3, image_size=64, mean=(0.485, 0.456, 0.406),
                    std=(0.229, 0.224, 0.225), patch_size=8, validation=0, drawn=False, read=None),
}


def names(classes: Sequence[str]) -> str:
    """The first few classes, for people."""
    return ", ".join(classes[:5]) + (f" and {len(classes) - 5} more classes" if len(classes) > 5 else "")


def load(name: str, data_dir: Path | str, device: torch.device | str = "cpu", limit_train: int | None = None,
         image_size: tuple[int, int] | None = None, memory_budget: float = MEMORY_BUDGET,
         workers: int | None = None, augment: bool = False, flip: bool = False,
         hold_out: int | None = None) -> Dataset:
    """Dataset `name` on `device`, of the training images only the first `limit_train`.

    Args:
        image_size: (H, W) that images are brought to; None for the dataset's own.
        memory_budget: GiB. A folder whose pictures take more is streamed: `Dataset.streamed`.
        workers: processes that read what is streamed; None for as many as cores, less one.
        hold_out: images held out for validation; None for the dataset's own number, 0 to train on all.
        augment, flip: the training pictures that are streamed come in random crops, and mirrored at random.

    The validation images are the last of the training set, the same whatever the limit; `folder` has a split
    of its own. Raises UserError for an unknown name, a limit below 1, and files that are damaged, out of
    reach or do not fit the entry.
    """
    if name not in DATASETS:
        raise UserError(f"there is no dataset {name!r}; choose from: {', '.join(DATASETS)}")
    if limit_train is not None and limit_train < 1:
        raise UserError(f"cannot train on {limit_train} images; the limit must be 1 or more")
    entry = DATASETS[name]
    if entry.read is None:
        if hold_out is not None:
            raise UserError(f"{name} has validation images of its own, no more and no fewer; leave out "
                            "--hold-out and --train-on-all")
        size = image_size or (entry.image_size, entry.image_size)
        return load_folder(name, entry, Path(data_dir), device, limit_train, size, memory_budget,
                           {"workers": workers, "crop": augment, "flip": flip})
    images, labels, test_images, test_labels = entry.read(Path(data_dir))
    for array, numbers in ((images, labels), (test_images, test_labels)):
        check_arrays(name, entry, array, numbers)
    if len(labels) <= entry.validation:
        raise UserError(f"{name} in {data_dir} has {len(labels):,} training images, which is not the whole "
                        "set; put the original files there")
    rest = len(labels) - (entry.validation if hold_out is None else hold_out)
    if rest < 1:
        raise UserError(f"{name} has {len(labels):,} training images, of which --hold-out {hold_out} leaves "
                        "none to train on; lower it")
    keep = rest if limit_train is None else min(limit_train, rest)

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        # np.array copies: the arrays may be read-only views of a file's bytes.
        images = torch.from_numpy(np.array(images))
        if image_size is not None and image_size != tuple(images.shape[2:]):
            from torchvision.transforms.v2.functional import resize  # a second of import, when it is needed

            images = resize(images, list(image_size), antialias=True)
        return Split(images.to(device), torch.from_numpy(labels.astype(np.int64)).to(device))

    return Dataset(name, entry.classes, entry.mean, entry.std, train=split(images[:keep], labels[:keep]),
                   val=split(images[rest:], labels[rest:]), test=split(test_images, test_labels))


def check_arrays(name: str, entry: Entry, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise UserError where images or labels are not what the entry says."""
    shape = (entry.in_channels, entry.image_size, entry.image_size)
    if images.shape[1:] != shape or images.dtype != np.uint8:
        raise UserError(f"{name} has images of (channels, height, width) {images.shape[1:]}, {images.dtype}, "
                        f"but they must be {shape}, uint8; put the original files there")
    if len(images) != len(labels) or labels.min() < 0 or labels.max() >= len(entry.classes):
        raise UserError(f"{name} has {len(images):,} images and {len(labels):,} labels from {labels.min()} "
                        f"to {labels.max()} for {len(entry.classes)} classes; put the original files there")


def load_folder(name: str, entry: Entry, root: Path, device: torch.device | str, limit_train: int | None,
                size: tuple[int, int], memory_budget: float, streaming: dict) -> Dataset:
    """Pictures in one folder a class (folder.py): tensors on the device, or streamed beyond the budget.

    Broken pictures are skipped, named and counted; those for training, if it is streamed, when their turn
    comes. Raises UserError for a folder that cannot be learnt from.
    """
    found = folder.find(root)
    train = found.train
    if limit_train is not None:  # the classes in turn would give the first few of them alone
        order = np.random.RandomState(0).permutation(len(train))[:limit_train]
        train = [train[number] for number in order]
    pictures = len(train) + len(found.val) + (len(found.test) if found.test is not found.val else 0)
    stream = pictures * entry.in_channels * size[0] * size[1] > memory_budget * 2**30

    def split(part: folder.Pictures, what: str) -> Split:
        keep = not (stream and what == "train")
        images = folder.read_all(root, [path for path, _ in part], size, keep=not stream) if keep else part
        part = [picture for picture, image in zip(part, images, strict=True) if image is not None]
        if not part:
            raise UserError(f"none of the pictures for {what} in {root} can be read; put others there")
        labels = torch.tensor([label for _, label in part]).to(device)
        if stream:
            moves = streaming if what == "train" else {"workers": streaming["workers"]}
            return Split(PictureFiles(root, [path for path, _ in part], size, device, **moves), labels)
        whole = np.stack([image for image in images if image is not None])
        return Split(torch.from_numpy(whole).to(device), labels)

    val = split(found.val, "validation")
    return Dataset(name, found.classes, entry.mean, entry.std, train=split(train, "train"), val=val,
                   test=val if found.test is found.val else split(found.test, "test"))


# ---------------------------------------------------------------------------------------------
# Batches. Of tensors: nothing below copies from the host or waits for the device.
# ---------------------------------------------------------------------------------------------


def num_batches(split: Split, batch_size: int) -> int:
    """How many batches `epoch_batches` yields. Raises UserError for a batch size below 1."""
    if batch_size < 1:
        raise UserError(f"cannot make batches of {batch_size} images; the batch size must be 1 or more")
    return -(-len(split.labels) // batch_size)


def epoch_batches(split: Split, batch_size: int, generator: torch.Generator | None, shuffle: bool = True,
                  start: int = 0, part: Callable[[int], slice] = lambda size: slice(None),
                  ) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image of `split` once, as (images (b, C, H, W) uint8, labels (b,) int64) on its device.

    `generator` gives the order, and how streamed pictures are moved; it may be None without `shuffle`. The
    last batch is smaller where the batch size does not divide N. The first `start` batches are left out
    without being read. Where the split is streamed, only the images of `part(batch size)` are read and given,
    beside all of the labels.
    """
    batches = num_batches(split, batch_size)
    n_images, seed = len(split.labels), 0
    if shuffle:
        order = torch.randperm(n_images, generator=generator, device=generator.device)
    else:
        order = torch.arange(n_images, device=split.labels.device)
    chunks = [order[number * batch_size:(number + 1) * batch_size] for number in range(start, batches)]
    if isinstance(split.images, PictureFiles):
        if shuffle:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        read = split.images.batches([chosen[part(len(chosen))] for chosen in chunks], seed)
        for chosen, (images, numbers) in zip(chunks, read, strict=True):
            labels = split.labels[chosen]
            labels[part(len(chosen))] = split.labels[numbers]  # another picture may stand for a broken one
            yield images, labels
        return
    for chosen in chunks:
        yield split.images[chosen], split.labels[chosen]
