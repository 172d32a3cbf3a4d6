"""Trained networks that teach another one: it learns what they say of an image instead of the image's label.

    teachers = Teachers(["checkpoints/a.pt", "checkpoints/b.pt"], dataset, device)
    loss = F.cross_entropy(model(images), teachers(images))

Several together err less than each, and one network can learn most of that (Hinton, Vinyals and Dean, arXiv
1503.02531). It and they see the same augmented images (Beyer et al., arXiv 2106.05237).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import data
from errors import UserError
from trained import TrainedModel


class Teachers:
    """Trained networks, whose probabilities are averaged."""

    def __init__(self, paths: Sequence[Path | str], dataset: data.Dataset, device: torch.device,
                 may_know_validation: bool = False):
        """The networks of these checkpoints, which must know the dataset's classes and normalisation.

        Raises UserError for others; also, unless they `may_know_validation`, for one that was trained on the
        validation images, which its pupil is to be judged by.
        """
        self.networks = []
        for path in paths:
            trained = TrainedModel(Path(path), device, Path("runs"))
            if (trained.classes, trained.mean, trained.std) != (dataset.classes, dataset.mean, dataset.std):
                raise UserError(f"{path} knows {trained.dataset_name}, whose classes or normalisation are "
                                f"not those of this {dataset.name}; choose other --teachers")
            if trained.settings.get("train_on_all") and not may_know_validation:
                raise UserError(f"{path} was trained on the validation images, too, so they would be no test "
                                "of what it teaches; add --train-on-all, or choose other --teachers")
            self.networks.append(trained.model.requires_grad_(False))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (b, C, H, W) → class probabilities (b, K), float32."""
        return torch.stack([network(images).float().softmax(dim=-1) for network in self.networks]).mean(dim=0)
