"""Published datasets as arrays: torchvision reads, verifies and fetches; digits come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from errors import UserError
from mnist import Arrays, no_empty_folder_left, patient_download

DIGITS_TEST = 360


@dataclass(frozen=True)
class Torchvision:
    """Reads a dataset by torchvision's class `name`, fetched first where one of `files` is missing.

    What is fetched is verified by torchvision's checksums. CIFAR's and SVHN's files are verified at every
    reading, so that CIFAR's pickles are never opened unless they are the original ones, byte for byte.
    """

    name: str
    files: tuple[str, ...]              # in the data folder
    train: dict = field(default_factory=lambda: {"train": True})  # arguments that choose the part
    test: dict = field(default_factory=lambda: {"train": False})
    transposed: bool = False            # the files hold columns where rows should be

    def __call__(self, data_dir: Path) -> Arrays:
        """Raises UserError where the files are damaged, or missing and out of reach."""
        from torchvision import datasets  # here, because a second of import is for these sets only

        kind = getattr(datasets, self.name)
        missing = [name for name in self.files if not (data_dir / name).is_file()]
        if missing:
            self._fetch(kind, data_dir, missing)
        try:
            parts = [kind(str(data_dir), **part) for part in (self.train, self.test)]
            return tuple(array for part in parts for array in self._arrays(part))
        except Exception as error:  # torchvision asserts, unpacks and reshapes what it finds
            raise UserError(f"the files of {self.name} in {data_dir} are damaged or not the original ones "
                            f"({_line(error)}); delete {', '.join(self.files)} to fetch them anew") from error

    def _fetch(self, kind: type, data_dir: Path, missing: list[str]) -> None:
        try:
            with no_empty_folder_left((data_dir / self.files[0]).parent), patient_download():
                for part in (self.train, self.test):
                    kind(str(data_dir), download=True, **part)
        except Exception as error:  # no route, a full disk, a wrong checksum
            raise UserError(f"{self.name} cannot be fetched ({_line(error)}); go online, or put these files "
                            f"into {data_dir}: {', '.join(missing)}") from error

    def _arrays(self, part) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, C, H, W) and labels (N,) of a torchvision dataset, grey or colour."""
        images = np.asarray(part.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.transpose(0, 3, 1, 2)
        labels = part.labels if hasattr(part, "labels") else part.targets
        return images.swapaxes(2, 3) if self.transposed else images, np.asarray(labels)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


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
