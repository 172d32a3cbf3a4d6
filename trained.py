"""A trained model and what is known of its images, for every way of showing it.

    model = TrainedModel(Path("checkpoints/mine.pt"), torch.device("cpu"), Path("runs"), Path("data"))
    model.probabilities(model.dataset.test.images[:8])
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import augment
import checkpoint
import data
import evaluate
from errors import UserError


class TrainedModel:
    """A trained model and what is known of its images; the dataset itself is loaded when first asked for."""

    def __init__(self, path: Path, device: torch.device, runs_dir: Path, data_dir: Path) -> None:
        """Raises UserError where the checkpoint cannot be used."""
        contents = checkpoint.load(path)
        self.path, self.device, self.data_dir = path, device, data_dir
        self.architecture, self.epoch = contents["architecture"], contents["epoch"]
        self.model: nn.Module = evaluate.rebuild(contents, device)
        try:
            self.dataset_name = contents["dataset"]["name"]
            self.classes, self.mean, self.std = (tuple(contents["dataset"][key])
                                                 for key in ("classes", "mean", "std"))
            self.run_name = str(contents["settings"].get("run_name") or path.stem)
            entry = data.DATASETS[self.dataset_name]
            self.shape = (entry.in_channels, entry.image_size, entry.image_size)
            logits = self.logits(torch.zeros(1, *self.shape, dtype=torch.uint8))
        except Exception as error:  # a damaged entry fails in as many ways as there are types
            raise UserError(f"{path} names a dataset that does not fit its model or this version "
                            f"({type(error).__name__}); train it anew") from error
        if logits.shape != (1, len(self.classes)):
            raise UserError(f"{path} names {len(self.classes)} classes, but its model has "
                            f"{logits.shape[-1]}; train it anew")
        if not checkpoint.is_run_name(self.run_name):
            raise UserError(f"{path} has the run name {self.run_name!r}, which is no folder's name; "
                            "train it anew")
        self.folder = runs_dir / self.run_name / "demo"
        self._dataset: data.Dataset | None = None

    @property
    def dataset(self) -> data.Dataset:
        """The dataset, on the CPU, with the mean and std that the model was trained with."""
        if self._dataset is None:
            dataset = data.load(self.dataset_name, self.data_dir, device="cpu")
            self._dataset = dataclasses.replace(dataset, mean=self.mean, std=self.std)
        return self._dataset

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 → (b, classes) float32, on the CPU"""
        return self.model(self.normalize(images)).float().cpu()

    def normalize(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 → what the model was trained on, float32, on its device"""
        return augment.normalize(images.to(self.device), self.mean, self.std)

    def probabilities(self, images: Tensor) -> np.ndarray:
        return self.logits(images).softmax(dim=-1).numpy()
