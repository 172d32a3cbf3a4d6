"""A trained model and what is known of its images, for every way of showing it.

    model = TrainedModel(Path("checkpoints/mine.pt"), torch.device("cpu"), Path("runs"), Path("data"))
    model.probabilities(model.dataset.test.images[:8])
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

import augment
import checkpoint
import data
import evaluate
from errors import UserError
from picture_file import read_rgb
from pictures import prepare_grey, prepare_picture


class TrainedModel:
    """A trained model and what is known of its images; the dataset itself is loaded when first asked for."""

    def __init__(self, path: Path, device: torch.device, runs_dir: Path, data_dir: Path | None = None,
                 image_size: tuple[int, int] | None = None) -> None:
        """`data_dir` and `image_size`, (H, W) that images are brought to, are as in training where None.

        Raises UserError where the checkpoint cannot be used.
        """
        contents = checkpoint.load(path)
        self.path, self.device = path, device
        self.config: dict = contents["config"]
        self.architecture, self.epoch = contents["architecture"], contents["epoch"]
        self.model: nn.Module = evaluate.rebuild(contents, device)
        try:
            self.dataset_name = contents["dataset"]["name"]
            self.classes, self.mean, self.std = (tuple(contents["dataset"][key])
                                                 for key in ("classes", "mean", "std"))
            self.data_dir = Path(data_dir or contents["settings"].get("data_dir") or "data")
            self.entry = data.DATASETS[self.dataset_name]
            size = self.entry.image_size  # of checkpoints that were saved without a shape
            channels, *size = contents["dataset"].get("shape", (self.entry.in_channels, size, size))
            self.shape = (channels, *(image_size or size))
            logits = self.logits(torch.zeros(1, *self.shape, dtype=torch.uint8))
        except Exception as error:  # a damaged entry fails in as many ways as there are types
            raise UserError(f"{path} names a dataset that does not fit its model or this version "
                            f"({type(error).__name__}); train it anew") from error
        if logits.shape != (1, len(self.classes)):
            raise UserError(f"{path} names {len(self.classes)} classes, but its model has "
                            f"{logits.shape[-1]}; train it anew")
        # By the file's name and not by the one in it, which is another run's where the file was renamed.
        self.run_name = re.sub(r"[^\w .,=@+-]", "_", checkpoint.run_of(path))
        if not checkpoint.is_run_name(self.run_name):
            raise UserError(f"{path} has no name that a folder could have; rename it")
        self.folder = runs_dir / self.run_name / "demo"
        self._dataset: data.Dataset | None = None

    @property
    def dataset(self) -> data.Dataset:
        """The dataset, on the CPU, with the mean and std that the model was trained with."""
        if self._dataset is None:
            dataset = data.load(self.dataset_name, self.data_dir, device="cpu", image_size=self.shape[1:])
            if dataset.classes != self.classes:
                raise UserError(f"{self.path} tells {data.names(self.classes)} apart, but {self.data_dir} "
                                f"has {data.names(dataset.classes)}; give by --data-dir the folder that it "
                                "was trained on")
            self._dataset = dataclasses.replace(dataset, mean=self.mean, std=self.std)
        return self._dataset

    def picture(self, path: Path | str) -> Tensor:
        """A picture file as the model knows its images: (1, C, H, W) uint8. Raises UserError."""
        if not self.entry.drawn:
            return torch.from_numpy(read_rgb(Path(path), self.shape[1:])[None].copy())
        return self._sized(prepare_picture(path, self.entry.image_size))

    def drawing(self, grey: np.ndarray, name: str) -> Tensor:
        """A digit (H, W) float32 of 0 to 255, likewise; `name` is what a UserError calls it."""
        return self._sized(prepare_grey(grey, self.entry.image_size, name))

    def _sized(self, digit: Tensor) -> Tensor:
        return resize(digit, list(self.shape[1:]), antialias=True)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 → (b, classes) float32, on the CPU"""
        return self.model(self.normalize(images)).float().cpu()

    def normalize(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 → what the model was trained on, float32, on its device"""
        return augment.normalize(images.to(self.device), self.mean, self.std)

    def probabilities(self, images: Tensor) -> np.ndarray:
        return self.logits(images).softmax(dim=-1).numpy()
