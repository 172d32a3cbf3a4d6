"""Pixels on their way to the model: scaled, normalised, and moved at random while training.

    images = normalize(random_affine(images, generator), dataset.mean, dataset.std)

Every function takes a batch on any device and never waits for it. Shapes: b images, C channels, H height,
W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels scaled to float32 in [0, 1]; float images, taken to be there already, as they are."""
    return images if images.is_floating_point() else images.float() / 255


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std of each channel, (b, C, H, W) float32, of uint8 pixels or floats in [0, 1].

    Raises ValueError where the number of channels differs.
    """
    channels = to_unit(images).unbind(1)
    # Numbers and not tensors of them: making a tensor on the device would wait for a copy.
    return torch.stack([(x - m) / s for x, m, s in zip(channels, mean, std, strict=True)], dim=1)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (b, C, H, W), half of them mirrored left to right; `generator` is on their device."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def random_affine(images: Tensor, generator: torch.Generator, degrees: float = 10, translate: float = 0.1,
                  scale: tuple[float, float] = (0.9, 1.1), shear: float = 5) -> Tensor:
    """Each image sheared, rotated, scaled about its centre and moved, all by random amounts of its own.

    images     (b, C, H, W) uint8, or float32 in [0, 1]
    generator  on the images' device
    degrees    rotation is uniform in [-degrees, degrees]
    translate  shift in x and in y is uniform in [-translate, translate], a fraction of W and of H
    scale      zoom is uniform between the two
    shear      horizontal shear is uniform in [-shear, shear], in degrees

    Returns (b, C, H, W) float32 in [0, 1], sampled bilinearly. What comes from outside the image is 0,
    the background before normalisation and grey after it: augment first, then normalise.
    """
    images = to_unit(images)
    b, _, height, width = images.shape
    device = images.device
    angle, zoom, slant, right, down = torch.rand(5, b, 1, 1, generator=generator, device=device)
    angle = (2 * angle - 1) * math.radians(degrees)
    slant = torch.tan((2 * slant - 1) * math.radians(shear))
    zoom = scale[0] + (scale[1] - scale[0]) * zoom

    # Sampling asks where an output pixel comes from, so the steps are undone in reverse order. In pixels
    # from the centre, and elementwise: F.affine_grid's matmul would be rounded by TF32 and autocast.
    x = torch.arange(width, device=device) - (width - 1) / 2  # (W,)
    y = torch.arange(height, device=device)[:, None] - (height - 1) / 2  # (H, 1)
    x = x - (2 * right - 1) * translate * width  # (b, 1, W)
    y = y - (2 * down - 1) * translate * height  # (b, H, 1)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    x, y = cos * x + sin * y, cos * y - sin * x  # (b, H, W)
    x = x - slant * y
    grid = torch.stack([2 * x / width, 2 * y / height], dim=-1)  # (b, H, W, 2), -1 and 1 at the edges
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
