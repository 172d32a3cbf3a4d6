"""One checkpoint format: saved whole or not at all, loaded without running any code in it.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries:

    format        1
    architecture  "mamba"
    config        the arguments that rebuild the model
    model         its state_dict
    dataset       {"name", "classes", "mean", "std"}
    epoch         epochs finished
    metrics       the metrics of that epoch
    settings      the command line it was trained with

<run-name>.last.pt has, for train_mamba.py to go on from, also the states of optimizer, scaler, rng and
augmentation, and how far the run is: step, best_accuracy, sums, images and seconds of the epoch begun.
The learning rate's schedule is a function of step.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from pathlib import Path

import torch

from errors import UserError

FORMAT = 1
REQUIRED = ("format", "architecture", "config", "model", "dataset", "epoch", "metrics", "settings")


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, then rename it to `path`.

    A full disk or a kill at any moment leaves the file that was there before untouched.
    Raises UserError where the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write checkpoint {path}: {error}; free space or choose another "
                        "--checkpoints-dir") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint made by `save`, its tensors on `device`.

    Only tensors and plain values are ever unpickled (`weights_only=True`), so a hostile file does
    nothing. Raises UserError for a file that is missing, truncated, foreign or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train one with: python train_mamba.py")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip():
                raise zipfile.BadZipFile
        contents = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and key errors for broken files
        raise UserError(f"{path} is not a checkpoint of this project or is damaged "
                        f"({type(error).__name__}); choose another file") from error
    if (not isinstance(contents, dict) or any(key not in contents for key in REQUIRED)
            or not isinstance(contents["epoch"], int) or not isinstance(contents["settings"], dict)):
        raise UserError(f"{path} is not a checkpoint of this project; choose one that train_mamba.py wrote")
    if contents["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {contents['format']}, this version reads {FORMAT}; "
                        "use the version of the project that wrote it")
    return contents


def newest(folder: Path, unfinished: bool = False) -> Path:
    """The checkpoint in `folder` changed last: the best of a run, or (`unfinished`) the last, to go on from.

    Raises UserError where there is none.
    """
    found = [path for path in Path(folder).glob("*.pt")
             if path.name.endswith(".last.pt") == unfinished and not path.name.startswith(".")]
    if not found:
        raise UserError(f"no {'.last.pt' if unfinished else '.pt'} checkpoint in {folder}; "
                        "train one with: python train_mamba.py")
    return max(found, key=lambda path: path.stat().st_mtime)


def is_run_name(name: str) -> bool:
    """Whether a run's folder and its two checkpoints can be called `name`: one part of a path, not hidden."""
    plain = re.fullmatch(r"\w[\w .,=@+-]*", name) is not None and len(name.encode()) <= 200
    return plain and not name.endswith((" ", ".", ".last"))
