"""readers.py and the registry: every published format, from small files made here; damage is one line."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as torchvision_datasets
from scipy.io import savemat

import data
from errors import UserError
from mnist import write_idx

COUNT = {"train": 12, "test": 5}


@pytest.fixture
def small(monkeypatch):
    """Makes the registry hold out 2 images of a dataset: small(name)."""
    def shrink(name: str) -> data.Entry:
        entry = dataclasses.replace(data.DATASETS[name], validation=2)
        monkeypatch.setitem(data.DATASETS, name, entry)
        return entry
    return shrink


def random_arrays(entry: data.Entry, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, C, H, W) and labels of a training and a test part."""
    rng = np.random.default_rng(seed)
    side, classes = entry.image_size, len(entry.classes)
    return {part: (rng.integers(0, 256, (count, entry.in_channels, side, side), np.uint8),
                   rng.permutation(np.append(rng.integers(0, classes, count - 1), classes - 1)))
            for part, count in COUNT.items()}


def assert_read(name: str, place: Path, arrays: dict) -> None:
    """The dataset in `place` is `arrays`, of which the last two of training are for validation."""
    dataset = data.load(name, place)
    images, labels = arrays["train"]
    parts = {"train": (images[:-2], labels[:-2]), "val": (images[-2:], labels[-2:]), "test": arrays["test"]}
    for part, (pixels, classes) in parts.items():
        split = getattr(dataset, part)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        np.testing.assert_array_equal(split.images.numpy(), pixels)
        np.testing.assert_array_equal(split.labels.numpy(), classes)
    assert dataset.shape == images.shape[1:] and dataset.classes == data.DATASETS[name].classes


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# ---- IDX: the sets that look like MNIST

IDX_SETS = {"fashion-mnist": ("FashionMNIST", 10), "kmnist": ("KMNIST", 10), "emnist": ("EMNIST", 47)}


def idx_paths(name: str, place: Path) -> dict[tuple[str, str], Path]:
    """Where the original files of a set lie, by part and kind, written out by hand."""
    raw = place / IDX_SETS[name][0] / "raw"
    if name == "emnist":
        return {(part, kind): raw / f"emnist-balanced-{part}-{kind}-ubyte"
                for part in COUNT for kind in ("images-idx3", "labels-idx1")}
    return {(part, kind): raw / f"{'t10k' if part == 'test' else part}-{kind}-ubyte"
            for part in COUNT for kind in ("images-idx3", "labels-idx1")}


def write_idx_set(name: str, place: Path, arrays: dict) -> dict[tuple[str, str], Path]:
    paths = idx_paths(name, place)
    for part, (images, labels) in arrays.items():
        pixels = images[:, 0].swapaxes(1, 2) if name == "emnist" else images[:, 0]  # EMNIST lies on its side
        paths[part, "images-idx3"].parent.mkdir(parents=True, exist_ok=True)
        write_idx(paths[part, "images-idx3"], pixels)
        write_idx(paths[part, "labels-idx1"], labels.astype(np.uint8))
    return paths


@pytest.mark.parametrize("name", IDX_SETS)
def test_idx_sets(name, small, seed, tmp_path):
    entry = small(name)
    assert len(entry.classes) == len(set(entry.classes)) == IDX_SETS[name][1]
    arrays = random_arrays(entry, seed)
    write_idx_set(name, tmp_path, arrays)
    assert_read(name, tmp_path, arrays)


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_packed_idx_files_put_there_by_hand_need_no_network(name, small, seed, tmp_path, monkeypatch):
    arrays = random_arrays(small(name), seed)
    resources = []
    for path in write_idx_set(name, tmp_path, arrays).values():
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        resources.append((packed.name, md5(packed)))
    kind = getattr(torchvision_datasets, IDX_SETS[name][0])
    monkeypatch.setattr(kind, "mirrors", ["file:///nowhere/"])
    monkeypatch.setattr(kind, "resources", resources)
    assert_read(name, tmp_path, arrays)


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda images, labels: images.write_bytes(images.read_bytes()[:-1]), "damaged or not the original"),
    (lambda images, labels: images.write_bytes(b""), "damaged or not the original"),
    (lambda images, labels: images.write_bytes(labels.read_bytes()), "damaged or not the original"),
    (lambda images, labels: write_idx(images, np.zeros((12, 20, 20), np.uint8)), r"must be \(1, 28, 28\)"),
    (lambda images, labels: write_idx(labels, np.full(12, 10, np.uint8)), "to 10 for 10 classes"),
    (lambda images, labels: write_idx(labels, np.zeros(11, np.uint8)), "12 images and 11 labels"),
], ids=["cut", "empty", "labels for images", "other size", "unknown class", "a label missing"])
def test_damaged_idx_files_are_one_line(spoil, says, small, seed, tmp_path):
    write_idx_set("fashion-mnist", tmp_path, random_arrays(small("fashion-mnist"), seed))
    paths = idx_paths("fashion-mnist", tmp_path)
    spoil(paths["train", "images-idx3"], paths["train", "labels-idx1"])
    with pytest.raises(UserError, match=says) as caught:
        data.load("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "channels"), [("mnist", 3), ("cifar10", 1), ("cifar10", 4)])
def test_a_wrong_number_of_channels_is_one_line(name, channels):
    entry = data.DATASETS[name]
    side = entry.image_size
    images = np.zeros((2, channels, side, side), np.uint8)
    with pytest.raises(UserError, match=rf"\({channels}, .*must be \({entry.in_channels}, ") as caught:
        data.check_arrays(name, entry, images, np.zeros(2, np.int64))
    assert "\n" not in str(caught.value)


# ---- CIFAR: pickles


def write_cifar(name: str, place: Path, arrays: dict, monkeypatch) -> dict[str, Path]:
    """CIFAR's batches, whose checksums torchvision then takes for the original ones; the files by name."""
    hundred = name == "cifar100"
    folder = place / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    kind = torchvision_datasets.CIFAR100 if hundred else torchvision_datasets.CIFAR10
    (images, labels), (test_images, test_labels) = arrays["train"], arrays["test"]
    if hundred:
        parts = {"train": (images, labels), "test": (test_images, test_labels)}
    else:
        cuts = np.array_split(np.arange(len(labels)), 5)
        parts = {f"data_batch_{number}": (images[cut], labels[cut]) for number, cut in enumerate(cuts, 1)}
        parts["test_batch"] = test_images, test_labels
    for file, (pixels, numbers) in parts.items():
        batch = {"data": pixels.reshape(len(pixels), -1),
                 "fine_labels" if hundred else "labels": numbers.tolist()}
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    meta = "meta" if hundred else "batches.meta"
    key = "fine_label_names" if hundred else "label_names"
    (folder / meta).write_bytes(pickle.dumps({key: list(data.DATASETS[name].classes)}, protocol=2))
    sums = {path.name: md5(path) for path in folder.iterdir()}
    monkeypatch.setattr(kind, "train_list", [[file, sums[file]] for file in parts if "test" not in file])
    monkeypatch.setattr(kind, "test_list", [[file, sums[file]] for file in parts if "test" in file])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": key, "md5": sums[meta]})
    monkeypatch.setattr(kind, "url", "file:///nowhere")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name, classes, small, seed, tmp_path, monkeypatch):
    entry = small(name)
    assert len(entry.classes) == len(set(entry.classes)) == classes
    arrays = random_arrays(entry, seed)
    write_cifar(name, tmp_path, arrays, monkeypatch)
    assert_read(name, tmp_path, arrays)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_pickle_that_is_not_the_original_is_never_opened(name, small, seed, tmp_path, monkeypatch):
    files = write_cifar(name, tmp_path, random_arrays(small(name), seed), monkeypatch)
    for path in files.values():
        original = path.read_bytes()
        path.write_bytes(pickle.dumps(Hostile(tmp_path / "opened")))
        with pytest.raises(UserError, match=r"damaged or not the original.*delete .* to fetch them anew"):
            data.load(name, tmp_path)
        assert not (tmp_path / "opened").exists()
        assert path.read_bytes() == pickle.dumps(Hostile(tmp_path / "opened")), "it is left as it is"
        path.write_bytes(original)


# ---- SVHN: MATLAB files


def test_svhn(small, seed, tmp_path, monkeypatch):
    arrays = random_arrays(small("svhn"), seed)
    lists = {}
    for part, (images, labels) in arrays.items():
        path = tmp_path / f"{part}_32x32.mat"
        # (H, W, C, N), and the digit 0 has the label 10
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        lists[part] = ["file:///nowhere", path.name, md5(path)]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", lists)
    assert_read("svhn", tmp_path, arrays)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"SVHN .* are damaged or not the original"):
        data.load("svhn", tmp_path)


# ---- What is missing


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist", "emnist", "cifar10", "cifar100", "svhn"])
def test_what_cannot_be_fetched_says_which_files_go_where(name, tmp_path, monkeypatch):
    reader = data.DATASETS[name].read

    def refuse(*_, **options):
        if options.get("download"):  # torchvision makes the folder first
            (tmp_path / reader.files[0]).parent.mkdir(parents=True, exist_ok=True)
            raise OSError("no route\nto it")
        raise RuntimeError("not found")

    monkeypatch.setattr(torchvision_datasets, reader.name, refuse)
    with pytest.raises(UserError, match=r"cannot be fetched .*no route to it.*go online, or put") as caught:
        data.load(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert all(file in str(caught.value) for file in reader.files) and str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"


def test_an_archive_that_is_not_the_original_is_not_unpacked(small, tmp_path, monkeypatch):
    small("cifar10")
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "url", "file:///nowhere")
    place = tmp_path / "data"
    place.mkdir()
    (tmp_path / "harm").write_text("harm")
    archive = place / torchvision_datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        for name in ("../outside", str(tmp_path / "outside"), "cifar-10-batches-py/data_batch_1"):
            file.add(tmp_path / "harm", name)
    content = archive.read_bytes()
    with pytest.raises(UserError, match="CIFAR10 cannot be fetched"):
        data.load("cifar10", place)
    assert {path.name for path in tmp_path.rglob("*")} <= {"data", "harm", archive.name}
    assert not archive.exists() or archive.read_bytes() == content


def test_images_are_brought_to_the_size_asked_for():
    whole, wide = data.load("digits", "unused"), data.load("digits", "unused", image_size=(16, 24))
    assert wide.shape == (1, 16, 24) and wide.train.images.dtype == torch.uint8
    assert abs(wide.train.images.float().mean() - whole.train.images.float().mean()) < 2
    assert torch.equal(wide.val.labels, whole.val.labels)


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_entry_is_whole(name):
    entry = data.DATASETS[name]
    assert len(entry.mean) == len(entry.std) == entry.in_channels
    assert entry.image_size % entry.patch_size == 0
    assert len(set(entry.classes)) == len(entry.classes) != 1
