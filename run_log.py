"""What a training run leaves behind: `runs/<run-name>/` for TensorBoard, and in it metrics.jsonl."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import augment
import checkpoint
import data
import explain
import figures
import metrics_file
from errors import UserError

PICTURES_SHARE = 0.1           # of a run's time
OWNER, LOCK = ".run", ".lock"  # hidden files in a run's folder
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that knows none


class Ration:
    """Holds something slow to about `share` of the time since now: `if due(...): with spending(): ...`."""

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic):
        self.share, self.clock = share, clock
        self.began = clock()
        self.times, self.spent = 0, 0.0  # how often it was done, in how many seconds

    def due(self, last: bool) -> bool:
        """Whether to do it now: the first time, the `last` time, and when its share allows once more."""
        once_more = self.spent + self.spent / max(1, self.times)
        due = last or self.times == 0 or once_more <= self.share * (self.clock() - self.began)
        self.times += due
        return due

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        started = self.clock()
        yield
        self.spent += self.clock() - started


class RunLog:
    """Writes one run's metrics and pictures. Use it by `with`, which writes out what is still in memory."""

    def __init__(self, folder: Path, first_epoch: int, first_step: int, run_id: str) -> None:
        """Begin, or go on after `first_epoch` epochs and `first_step` steps: what was logged later than that,
        by a run that was interrupted, is dropped. From now on the folder is that of `run_id`: see `owner`.

        Raises UserError where the folder cannot be written.
        """
        self.path = folder / metrics_file.NAME
        self.drawing = Ration(PICTURES_SHARE)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines if metrics_file.epoch_of(line) <= first_epoch]
            if kept != lines or not lines:
                with checkpoint.whole_file(self.path) as file:
                    file.write("".join(kept).encode())
            (folder / OWNER).write_text(run_id + "\n")
            self.writer = SummaryWriter(folder, purge_step=first_step + 1)
        except (OSError, UnicodeError) as error:
            raise UserError(f"cannot write {self.path}: {error}; choose another --runs-dir") from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.writer.close()

    def flush(self) -> None:
        """Put what was logged until now where a kill of the process cannot reach it."""
        self.writer.flush()

    def step(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/learning_rate", learning_rate, step)
        self.writer.add_scalar("train/gradient_norm", gradient_norm, step)

    def epoch(self, step: int, metrics: dict) -> None:
        """Append one epoch's metrics; `step` is where they belong in TensorBoard."""
        for name in ("train_accuracy", "val_accuracy", "test_accuracy"):
            if metrics[name] is not None:
                self.writer.add_scalar(f"accuracy/{name.removesuffix('_accuracy')}", metrics[name], step)
        if metrics["val_loss"] is not None:
            self.writer.add_scalar("val/loss", metrics["val_loss"], step)
        self.writer.add_scalar("speed/images_per_second", metrics["images_per_second"], step)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}; mend it and go on by --resume") from error

    def draws(self, last: bool) -> bool:
        """Whether this epoch gets pictures: see `Ration`. They can take longer than an epoch on a GPU."""
        return self.drawing.due(last)

    def test(self, step: int, split: data.Split, probabilities: Tensor, classes: tuple[str, ...],
             draw: bool) -> None:
        """Per-class accuracy and, to `draw`, the confusion matrix and the worst mistakes; probabilities
        (N, classes)."""
        labels, predictions = split.labels.cpu(), probabilities.argmax(1)
        correct = (labels == predictions).double()
        for index, name in enumerate(classes):
            if (labels == index).any():
                self.writer.add_scalar(f"class_accuracy/{name}", correct[labels == index].mean(), step)
        if draw:
            with self.drawing.spending(), figures.style():  # TensorBoard draws them once more
                confusion = figures.confusion(labels, predictions, classes)
                mistakes = figures.mistakes(split.images.cpu(), labels, probabilities, classes)
                self.writer.add_figure("test/confusion", confusion, step)
                self.writer.add_figure("test/mistakes", mistakes, step)

    def scans(self, step: int, model: nn.Module, images: Tensor, dataset: data.Dataset) -> None:
        """What the scans of `model` did with `images`, shown to it normalised by `dataset`: histograms of
        log10 Δ, its maps and what the state remembers."""
        with self.drawing.spending():
            scans = explain.record(model, augment.normalize(images, dataset.mean, dataset.std))
            for scan in scans:
                log10 = torch.log10(scan.delta.clamp(min=1e-9))
                self.writer.add_histogram(f"log10_delta/{scan.name}", log10, step)
            for name, figure in explain.draw(images.cpu(), scans).items():
                self.writer.add_figure(f"scan/{Path(name).stem}", figure, step)

    def hparams(self, step: int, settings: dict, metrics: dict) -> None:
        """The run's settings beside its final metrics (TensorBoard's HParams tab)."""
        plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in settings.items()}
        results = {f"final/{name}": value for name, value in metrics.items()
                   if name.endswith("accuracy") and value is not None}
        self.writer.add_hparams(plain, results, run_name=".", global_step=step)


@contextlib.contextmanager
def claim(folder: Path, last: Path, new: bool) -> Iterator[None]:
    """A run's folder, made where it is missing, and its checkpoint `last` for this process alone.

    Two hidden files are locked, and taken away afterwards; those of a process that was killed are in nobody's
    way. Raises UserError where another process has one of them, where a `new` run would find one begun, or
    where they cannot be written.
    """
    with contextlib.ExitStack() as held:
        for place, name in ((last.parent, f".{last.name}{LOCK}"), (folder, LOCK)):
            try:
                place.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(place / name, timeout=0))
                held.callback(_remove, place / name)  # while it is held
            except Timeout as error:
                raise UserError(f"another process trains {folder.name} now; wait for it, stop it, or begin a "
                                "run of your own by another --run-name") from error
            except NotImplementedError:  # an older filelock's word for a file system that knows no locks
                pass
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise UserError(f"cannot write {place}: {error.strerror or error}; choose another folder "
                                    "by --runs-dir and --checkpoints-dir") from error
        if new and is_begun(folder):
            raise UserError(f"{folder} exists; choose another --run-name")
        yield


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps an open file
        path.unlink()


def is_begun(folder: Path) -> bool:
    """Whether there is anything of a run in its folder, or something else that is no folder."""
    if not folder.is_dir():
        return folder.exists()
    return any(path.name != LOCK for path in folder.iterdir())


def owner(folder: Path) -> str | None:
    """The `run_id` of the run whose log the folder has; None where it tells of none."""
    try:
        return (folder / OWNER).read_text().strip()
    except (OSError, UnicodeError):
        return None


class NoLog(contextlib.AbstractContextManager):
    """The log of a process that is not the one that writes: the same methods, and nothing comes of them."""

    def __exit__(self, *_) -> None:
        pass

    def flush(self) -> None:
        pass

    def draws(self, last: bool) -> bool:
        return False

    def step(self, *_) -> None:
        pass

    epoch = test = scans = hparams = step
