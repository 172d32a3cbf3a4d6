"""Your own pictures: one folder a class, the split into training, validation and test made and remembered.

    pictures/cats/1.jpg  pictures/dogs/7.png ...                           split by split.json, made here
    pictures/train/cats/1.jpg ... pictures/val/cats/7.png ... [test/]      split by hand, as ImageNet is
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import UserError, printable
from picture_file import ENDINGS, read_rgb

HELD_OUT = 0.1  # of each class for validation, and as much again for the test
SPLIT_FILE = "split.json"
Pictures = list[tuple[str, int]]  # (path below the folder, with /; index of the class)


@dataclass(frozen=True)
class Folder:
    """Which pictures are there; none of them is opened yet."""

    root: Path
    classes: tuple[str, ...]
    train: Pictures
    val: Pictures
    test: Pictures  # the same list as `val` where the folder has train/ and val/ alone, as ImageNet does


def find(root: Path) -> Folder:
    """The pictures below `root` and their split.

    Without train/ and val/, a tenth of each class is taken for validation and a tenth for the test, at random
    but always the same, and written into split.json: pictures that come later are trained on.

    Raises UserError for a folder that is missing or empty, has one class only, too few pictures to hold any
    out, or a class in val/ or test/ that train/ lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give by --data-dir one with a folder for each class")
    parts = {name: root / name for name in ("train", "val", "test") if _subfolders(root / name)}
    if not parts:
        classes, pictures = _classes(root, root)
        return Folder(root, classes, *_split(root, classes, pictures))
    if "train" not in parts:
        raise UserError(f"{root} has {' and '.join(f'{name}/' for name in parts)} but no train/; name the "
                        "folder of training pictures train")
    classes, train = _classes(parts.pop("train"), root)
    held_out = {}
    for name, folder in parts.items():
        own, pictures = _classes(folder, root)
        unknown = [each for each in own if each not in classes]
        if unknown:
            raise UserError(f"{folder} has the class {unknown[0]!r}, which {root / 'train'} lacks; add "
                            "pictures of it there, or remove it")
        held_out[name] = [(path, classes.index(own[index])) for path, index in pictures]
    if "val" not in held_out:
        train, held_out["val"], test = _split(root, classes, train)
        if held_out.setdefault("test", test) is not test:  # there is a test/, so none is cut off
            train = sorted(train + test)
    return Folder(root, classes, train, held_out["val"], held_out.get("test", held_out["val"]))


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; none where it is missing."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _classes(folder: Path, root: Path) -> tuple[tuple[str, ...], Pictures]:
    """The classes of `folder`, those with a picture, and their pictures, both sorted by name."""
    classes, pictures = [], []
    for name in _subfolders(folder):
        found = sorted(path.relative_to(root).as_posix() for path in pictures_below(folder / name))
        if found:
            pictures += [(path, len(classes)) for path in found]
            classes.append(name)
    if not classes:
        raise UserError(f"there are no pictures in {folder}; it needs a folder for each class, such as "
                        f"{folder / 'cats' / '1.jpg'}")
    if len(classes) == 1:
        raise UserError(f"{folder} has one class only, {classes[0]!r}, and nothing to tell it from; add a "
                        "folder with pictures of another")
    try:
        "".join(classes).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a folder in {folder} has a name that is no text; rename it") from error
    return tuple(classes), pictures


def pictures_below(folder: Path) -> list[Path]:
    """The files in `folder` and the folders in it whose names end as pictures' do, sorted."""
    return sorted(Path(where, file) for where, _, files in os.walk(folder) for file in files
                  if file[0] != "." and os.path.splitext(file)[1].lower() in ENDINGS)


# ---- The split --------------------------------------------------------------------------------------------


def _split(root: Path, classes: tuple[str, ...], pictures: Pictures) -> tuple[Pictures, Pictures, Pictures]:
    """Training, validation and test: as split.json says; without one, as made now and written into it."""
    path = root / SPLIT_FILE
    chosen = _read_split(path) if path.exists() else _choose(len(classes), pictures)
    val, test = ([picture for picture in pictures if picture[0] in chosen[name]] for name in ("val", "test"))
    held_out = chosen["val"] | chosen["test"]
    train = [picture for picture in pictures if picture[0] not in held_out]
    for name, part in (("validation", val), ("test", test), ("training", train)):
        if not part:
            raise UserError(f"{root} has no pictures for {name}; add pictures, at least 3 in a class"
                            + (f", and delete {path}" if path.exists() else ""))
    if not path.exists():
        text = json.dumps({name: sorted(paths) for name, paths in chosen.items()}, indent=0)
        try:
            path.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            print(f"warning: cannot write {path} ({error.strerror}), so the split is made anew each time",
                  file=sys.stderr)
    return train, val, test


def _read_split(path: Path) -> dict[str, set[str]]:
    try:
        chosen = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        return {name: {str(each) for each in chosen[name]} for name in ("val", "test")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); mend it, or delete it to split "
                        "anew "
                        "(models trained before have then seen some of the new test pictures)") from error


def _choose(classes: int, pictures: Pictures) -> dict[str, set[str]]:
    """A tenth of each class, at least one of three pictures, for validation and as many for the test."""
    chosen: dict[str, set[str]] = {"val": set(), "test": set()}
    for index in range(classes):
        own = [path for path, label in pictures if label == index]
        random.Random(index).shuffle(own)
        count = max(round(HELD_OUT * len(own)), int(len(own) >= 3))
        chosen["val"].update(own[:count])
        chosen["test"].update(own[count:2 * count])
    return chosen


# ---- Reading ----------------------------------------------------------------------------------------------


def read_all(root: Path, paths: Iterable[str], size: tuple[int, int], keep: bool = True) -> list:
    """Each picture as (3, H, W) uint8; None for a broken one. By threads: Pillow decodes outside the lock.

    Broken ones are named on stderr and counted. With `keep` false they are only checked: True or None.
    """
    def read(path: str) -> np.ndarray | bool | None:
        try:
            image = read_rgb(root / path, size)
            return image if keep else True
        except UserError as error:
            tqdm.write(f"skipped: {printable(error)}", file=sys.stderr)
            return None

    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        images = list(tqdm(pool.map(read, paths), desc="read pictures", total=len(paths), unit="picture",
                           leave=False, disable=None))
    broken = sum(image is None for image in images)
    if broken:
        print(f"{broken:,} of {len(paths):,} pictures skipped, because they cannot be read", file=sys.stderr)
    return images
