"""data.py: splits apart, batches right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import augment
import data
from errors import UserError

DATA_DIR = Path(__file__).parent.parent / "data"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.skipif(not (DATA_DIR / "MNIST" / "raw").is_dir(), reason="MNIST is not in data/")
def test_real_mnist():
    mnist = data.load("mnist", DATA_DIR)
    counts = {"train": [5434, 6212, 5465, 5622, 5343, 4963, 5436, 5702, 5357, 5466],
              "val": [489, 530, 493, 509, 499, 458, 482, 563, 494, 483],
              "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]}
    for name, count in counts.items():
        split = getattr(mnist, name)
        assert split.images.shape == (sum(count), 1, 28, 28) and split.images.dtype == torch.uint8
        assert split.labels.bincount().tolist() == count
    assert len(mnist.train.labels) == 55_000 and len(mnist.val.labels) == 5_000
    pixels = augment.normalize(mnist.train.images, mnist.mean, mnist.std)
    assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3


# Splits


def test_digits_splits():
    digits = data.load("digits", "unused")
    entry = data.DATASETS["digits"]
    splits = (digits.train, digits.val, digits.test)
    assert [len(split.labels) for split in splits] == [1200, 237, 360]
    for images, labels in splits:
        assert images.shape[1:] == (entry.in_channels, entry.image_size, entry.image_size)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(len(entry.classes)))
    assert digits.train.images.max() == 255
    # Together every image of the source once, as often as it is there, so that no two splits share one.
    together = torch.cat([split.images for split in splits]).flatten(1).numpy()
    pixels, _ = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    assert sorted(map(bytes, together)) == sorted(map(bytes, np.rint(pixels * 255 / 16).astype(np.uint8)))
    normal = augment.normalize(digits.train.images, digits.mean, digits.std)
    assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 1) < 1e-3


def test_digits_split_never_changes():
    labels = data.load("digits", "unused").test.labels
    assert labels[:12].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]


def test_as_many_images_are_held_out_as_asked_for():
    usual = data.load("digits", "unused")
    images = torch.cat([usual.train.images, usual.val.images])
    for number in (0, 1, 500, len(images) - 1):
        digits = data.load("digits", "unused", hold_out=number)
        assert len(digits.val.labels) == number
        assert torch.equal(torch.cat([digits.train.images, digits.val.images]), images)
        assert torch.equal(digits.test.images, usual.test.images)
    with pytest.raises(UserError, match="leaves none to train on; lower it"):
        data.load("digits", "unused", hold_out=len(images))


def test_limit_train():
    whole, few = data.load("digits", "unused"), data.load("digits", "unused", limit_train=7)
    assert torch.equal(few.train.images, whole.train.images[:7])
    assert torch.equal(few.train.labels, whole.train.labels[:7])
    assert torch.equal(few.val.images, whole.val.images) and torch.equal(few.test.images, whole.test.images)
    # However high the limit, no validation image is trained on.
    assert len(data.load("digits", "unused", limit_train=10**6).train.labels) == 1200
    with pytest.raises(UserError, match="1 or more"):
        data.load("digits", "unused", limit_train=0)


def test_unknown_dataset_lists_the_known():
    with pytest.raises(UserError, match=r"mnist, fashion-mnist, .*folder"):
        data.load("minst", "unused")


# Batches


def numbered(n: int, device: str = "cpu") -> data.Split:
    """n images of 1 x 1, each with its number as pixel and label."""
    numbers = torch.arange(n, device=device)
    return data.Split(numbers.to(torch.uint8).reshape(n, 1, 1, 1), numbers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, batch_size", [(10, 4), (8, 4), (3, 8)])
def test_batches_cover_each_image_once(device, n, batch_size):
    split = numbered(n, device)
    for shuffle in (True, False):
        generator = seeded(0, device) if shuffle else None
        batches = list(data.epoch_batches(split, batch_size, generator, shuffle))
        assert len(batches) == data.num_batches(split, batch_size)
        seen = [label for _, labels in batches for label in labels.tolist()]
        assert len(seen) == len(set(seen)) == n
        assert shuffle or seen == sorted(seen)
        for images, labels in batches:
            assert images.dtype == torch.uint8 and images.device == split.images.device
            assert torch.equal(images.flatten().long(), labels)


def test_order_is_the_generators():
    def order(generator):
        return torch.cat([labels for _, labels in data.epoch_batches(numbered(50), 8, generator)]).tolist()

    generator = seeded(1)
    first, second = order(generator), order(generator)
    assert first == order(seeded(1)) and first != second and first != order(seeded(2))


def test_batch_size_below_one():
    with pytest.raises(UserError, match="batch size"):
        next(data.epoch_batches(numbered(4), 0, seeded()))
