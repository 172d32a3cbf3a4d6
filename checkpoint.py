"""One checkpoint format: saved whole or not at all, checked before it is read, loaded without running code.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries:

    format        2
    architecture  "mamba"
    config        the arguments that rebuild the model
    model         its state_dict
    dataset       {"name", "classes", "mean", "std", "shape"}; older ones have no shape
    epoch         epochs finished
    metrics       the metrics of that epoch
    settings      the command line it was trained with

Checkpoints of train_mamba.py have a run_id, too, which tells runs of one name apart.
<run-name>.last.pt has, to go on from, also the states of optimizer, scaler, rng and
augmentation, averaged (the state_dict of the weights' average, or None), and how far the run is: step,
best_accuracy, sums, images and seconds of the epoch begun.
The learning rate's schedule is a function of step. <run-name>.last.pt.previous is the one before.

The file is what torch.save writes, a zip archive, and ends in an archive comment with the format's number
and the SHA-256 of all that stands before. So every damage is seen before anything is loaded, and torch.load
and zip programs read the file as any other.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from errors import UserError

FORMAT = 2
REQUIRED = ("format", "architecture", "config", "model", "dataset", "epoch", "metrics", "settings")
SEAL = b"\nvision-mamba-2 checkpoint format %05d sha256 "  # then the digest of all before it and a newline
DIGEST_SIZE = 65
SEAL_SIZE = len(SEAL % 0) + DIGEST_SIZE


# ---- Files whole or not at all ----------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write and read that becomes `path` at the end of the `with`, flushed to the disk, or never.

    It is written under a temporary name, always the same, so that what a kill leaves is gone after the next
    save. With `keep`, the file that was at `path` goes there; a kill just then leaves `keep` alone.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        if os.name == "posix":  # the renaming must reach the disk, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_json(path: Path, found: dict) -> None:
    """Write `found` whole or not at all. Raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


# ---- Checkpoints ------------------------------------------------------------------------------------------


def save(path: Path, contents: dict, keep_previous: bool = False) -> None:
    """Write a checkpoint; with `keep_previous` the one that was there stays beside it, see `previous`.

    A full disk or a kill at any moment leaves a usable one: the new or that before.
    Raises UserError where the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, previous(path) if keep_previous else None) as file:
            torch.save({"format": FORMAT, **on_cpu(contents)}, file)
            # The last two bytes of a zip archive say how long the comment after them is.
            file.seek(-2, os.SEEK_END)
            file.write(SEAL_SIZE.to_bytes(2, "little") + SEAL % FORMAT)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").hexdigest().encode() + b"\n")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write checkpoint {path}: {error}; free space or choose another "
                        "--checkpoints-dir") from error


def on_cpu(contents: object) -> object:
    """`contents`, its tensors on the CPU, so that torch.load needs no device to read them."""
    if isinstance(contents, torch.Tensor):
        return contents.cpu()
    if isinstance(contents, dict):
        moved = copy.copy(contents)  # a state_dict has more than its items
        moved.update((key, on_cpu(value)) for key, value in contents.items())
        return moved
    if isinstance(contents, list | tuple):
        return type(contents)(map(on_cpu, contents))
    return contents


def load(path: Path) -> dict:
    """Read a checkpoint made by `save`, its tensors on the CPU.

    Only tensors and plain values are ever unpickled (`weights_only=True`), so a hostile file does
    nothing. Raises UserError for a file that is missing, damaged, foreign or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train one with: python train_mamba.py")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles; we refuse them
            number = _check_seal(path, file)
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True) if number == FORMAT else None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; choose another file") from error
    except Exception as error:  # torch raises pickle, zip, runtime and key errors for what is not ours
        raise UserError(f"{path} is not a checkpoint of this project: it holds more than tensors and plain "
                        f"values ({type(error).__name__}), and nothing in it was run; choose another file"
                        ) from error
    if contents is None:
        raise UserError(f"{path} has checkpoint format {number}, this version reads {FORMAT}; "
                        "use the version of the project that wrote it")
    if (not isinstance(contents, dict) or any(key not in contents for key in REQUIRED)
            or not isinstance(contents["epoch"], int) or not isinstance(contents["settings"], dict)):
        raise UserError(f"{path} is not a checkpoint of this project; choose one that train_mamba.py wrote")
    return contents


def _check_seal(path: Path, file: BinaryIO) -> int:
    """The format's number, once the checksum is found right. Raises UserError where it is not."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - SEAL_SIZE))
    seal = re.fullmatch(SEAL.replace(b"%05d", rb"(\d{5})") + b"([0-9a-f]{64})\n", file.read())
    if seal is None:
        raise UserError(f"{path} is not a checkpoint of this version or is damaged: it does not end as one; "
                        "choose another file")
    digest = hashlib.sha256()
    file.seek(0)
    for left in range(size - DIGEST_SIZE, 0, -2**20):
        digest.update(file.read(min(left, 2**20)))
    if digest.hexdigest() != seal[2].decode():
        raise UserError(f"{path} is damaged: its checksum is wrong; choose another file")
    return int(seal[1])


# ---- Finding one ------------------------------------------------------------------------------------------


def previous(path: Path) -> Path:
    """Where the checkpoint before `path` is kept. (Not *.pt, which is for names of runs.)"""
    return path.with_name(path.name + ".previous")


def exists(path: Path) -> bool:
    """Whether there is anything for `load_good` to read."""
    return path.exists() or previous(path).exists()


def load_good(path: Path) -> dict:
    """`path` or, where that is damaged or missing, the one before, with a line on stderr that says so.

    Raises UserError where neither can be read, for the first.
    """
    try:
        return load(path)
    except UserError as error:
        try:
            contents = load(previous(path))
        except UserError:
            raise error from None
        cause = str(error).partition(";")[0]
        print(f"{cause}; going on from the one before, {previous(path)}", file=sys.stderr)
        return contents


def newest(folder: Path, unfinished: bool = False) -> Path:
    """The checkpoint in `folder` changed last: the best of a run, or (`unfinished`) the last, to go on from.

    Of an unfinished run, one that only the checkpoint before is left of counts, too: see `load_good`.
    Raises UserError where there is none.
    """
    if unfinished:
        found = {}
        for path in (*Path(folder).glob("*.last.pt.previous"), *Path(folder).glob("*.last.pt")):
            found[path.with_name(path.name.removesuffix(".previous"))] = path
    else:
        found = {path: path for path in Path(folder).glob("*.pt") if not path.name.endswith(".last.pt")}
    found = {path: there for path, there in found.items() if there.is_file() and path.name[0] != "."}
    if not found:
        raise UserError(f"no {'.last.pt' if unfinished else '.pt'} checkpoint in {folder}; "
                        "train one with: python train_mamba.py")
    return max(found, key=lambda path: found[path].stat().st_mtime)


def run_of(path: Path) -> str:
    """The name of the run whose checkpoint `path` is, by the file's name."""
    return path.name.removesuffix(".previous").removesuffix(".pt").removesuffix(".last")


def is_run_name(name: str) -> bool:
    """Whether a run's folder and its two checkpoints can be called `name`: one part of a path, not hidden."""
    plain = re.fullmatch(r"\w[\w .,=@+-]*", name) is not None and len(name.encode()) <= 200
    return plain and not name.endswith((" ", ".", ".last"))
