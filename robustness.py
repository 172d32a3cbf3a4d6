"""When does it break? Accuracy on test images that are turned, noisy, blurred or moved.

    curves = measure(model, dataset.test, dataset, device, most=500)
    figures.robustness(curves)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as transforms
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

import data
import evaluate


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Turned counter-clockwise about the centre."""
    return transforms.rotate(images, degrees, InterpolationMode.BILINEAR)


def add_noise(images: Tensor, deviation: float) -> Tensor:
    """Gaussian noise of a standard deviation in 0 to 1, white being 1; the same noise in every call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return (images.float() + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, pixels: float) -> Tensor:
    """By a Gaussian of a standard deviation in pixels."""
    if pixels == 0:
        return images
    reach = min(2 * round(3 * pixels) + 1, 2 * min(images.shape[-2:]) - 1)
    for kernel in ([reach, 1], [1, reach]):  # a square one would take its side times as long
        images = transforms.gaussian_blur(images.float(), kernel, [pixels, pixels])
    return images.round().to(torch.uint8)


def shift(images: Tensor, pixels: float) -> Tensor:
    """To the right and down; what was there before leaves the image, what comes is black."""
    return transforms.affine(images, 0, [round(pixels), round(pixels)], 1, [0, 0])


@dataclass(frozen=True)
class Corruption:
    """A way to spoil images, its unit and strengths; those in pixels are of images of 28 pixels."""

    apply: Callable[[Tensor, float], Tensor]
    unit: str
    strengths: tuple[float, ...]
    decimals: int | None = None  # that strengths in pixels are rounded to; None: they are in another unit

    def strengths_for(self, images: Tensor) -> tuple[float, ...]:
        """The strengths for `images` (..., H, W): those in pixels are the same part of their shorter side as
        of 28 pixels, and fewer where rounding makes some the same."""
        if self.decimals is None:
            return self.strengths
        scale = min(images.shape[-2:]) / 28
        return tuple(sorted({round(scale * strength, self.decimals) for strength in self.strengths}))


CORRUPTIONS = {
    "rotation": Corruption(rotate, "degrees", (0, 15, 30, 45, 60, 90)),
    "noise": Corruption(add_noise, "standard deviation, white = 1", (0, 0.1, 0.2, 0.3, 0.45, 0.6)),
    "blur": Corruption(blur, "standard deviation, pixels", (0, 0.5, 1, 1.5, 2, 3), decimals=2),
    "shift": Corruption(shift, "pixels, right and down", (0, 1, 2, 3, 5, 7), decimals=0),
}


def measure(model: nn.Module, split: data.Split, dataset: data.Dataset, device: torch.device | str,
            most: int) -> dict[str, dict]:
    """Accuracy on the first `most` images of `split`, spoiled in every way of `CORRUPTIONS`.

    {name: {"unit", "strengths", "accuracy" (fractions), "images" (their number)}}
    """
    images, labels = (tensor[:most] for tensor in split)
    curves = {}
    for name, corruption in CORRUPTIONS.items():
        strengths, accuracy = corruption.strengths_for(images), []
        for strength in strengths:
            spoiled = data.Split(corruption.apply(images, strength), labels)
            probabilities = evaluate.predict(model, spoiled, dataset, device)
            accuracy.append(evaluate.accuracy(probabilities, labels))
        curves[name] = {"unit": corruption.unit, "strengths": list(strengths),
                        "accuracy": accuracy, "images": len(labels)}
    return curves


def examples(images: Tensor) -> dict[str, Tensor]:
    """`images` (1, C, H, W) uint8 at every strength of every corruption: {name: (strengths, C, H, W)}."""
    return {name: torch.cat([corruption.apply(images, strength)
                             for strength in corruption.strengths_for(images)])
            for name, corruption in CORRUPTIONS.items()}
