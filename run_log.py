"""What a training run leaves behind: `runs/<run-name>/` for TensorBoard, and metrics.jsonl for programs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import data
import figures
from errors import UserError


class RunLog:
    """Writes one run's metrics and pictures.

    metrics.jsonl holds one JSON object an epoch: epoch (from 1), train_loss, train_accuracy, val_loss,
    val_accuracy, test_accuracy (fractions), learning_rate, images_per_second and seconds of that epoch.
    """

    def __init__(self, folder: Path, first_epoch: int, first_step: int) -> None:
        """Begin, or go on at epoch `first_epoch` and step `first_step` (both from 0): what was logged later
        than that, by a run that was interrupted, is dropped.

        Raises UserError where the folder cannot be written.
        """
        self.path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["epoch"] <= first_epoch]
            self.path.write_text("".join(f"{line}\n" for line in kept))
            self.writer = SummaryWriter(folder, purge_step=first_step if first_step else None)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error}; choose another --runs-dir") from error
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged; move it away, or choose another --run-name") from error

    def step(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/learning_rate", learning_rate, step)
        self.writer.add_scalar("train/gradient_norm", gradient_norm, step)

    def epoch(self, step: int, metrics: dict) -> None:
        """Append one epoch's metrics; `step` is where they belong in TensorBoard."""
        for name in ("train_accuracy", "val_accuracy", "test_accuracy"):
            self.writer.add_scalar(f"accuracy/{name.removesuffix('_accuracy')}", metrics[name], step)
        self.writer.add_scalar("val/loss", metrics["val_loss"], step)
        self.writer.add_scalar("speed/images_per_second", metrics["images_per_second"], step)
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def test(self, step: int, split: data.Split, probabilities: Tensor, classes: tuple[str, ...]) -> None:
        """Per-class accuracy, the confusion matrix and the worst mistakes; probabilities (N, classes)."""
        labels, predictions = split.labels.cpu(), probabilities.argmax(1)
        correct = (labels == predictions).double()
        for index, name in enumerate(classes):
            if (labels == index).any():
                self.writer.add_scalar(f"class_accuracy/{name}", correct[labels == index].mean(), step)
        self.writer.add_figure("test/confusion", figures.confusion(labels, predictions, classes), step)
        self.writer.add_figure("test/mistakes", figures.mistakes(split.images.cpu(), labels, probabilities,
                                                                 classes), step)

    def deltas(self, step: int, deltas: list[Tensor]) -> None:
        """How far the scan of each block steps: the histogram of log10 Δ, one tensor a block."""
        for index, delta in enumerate(deltas):
            self.writer.add_histogram(f"log10_delta/block_{index + 1}", torch.log10(delta.clamp(min=1e-9)), step)

    def close(self, settings: dict, metrics: dict) -> None:
        """Write the run's hyperparameters beside its final metrics (TensorBoard's HParams tab)."""
        plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in settings.items()}
        results = {f"final/{name}": value for name, value in metrics.items() if name.endswith("accuracy")}
        if results:
            self.writer.add_hparams(plain, results, run_name=".")
        self.writer.close()
