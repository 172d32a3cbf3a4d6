"""Pixels on their way to the model: scaled, normalised, and moved at random while training.

    images = normalize(augment(images, "affine", generator), dataset.mean, dataset.std)

Every function takes a batch on any device and never waits for it. Shapes: b images, C channels, H height,
W width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("none", "affine", "elastic")


def augment(images: Tensor, kind: str, generator: torch.Generator, strength: float = 1.0,
            flip: bool = False, erase: float = 0.0, batch: int | None = None,
            part: slice = slice(None)) -> Tensor:
    """What training does to a batch before it is normalised: (b, C, H, W) uint8 → float32 in [0, 1].

    kind       "none"; "affine": `random_affine`; "elastic": that and, in the same sampling, `elastic_field`
    generator  on the images' device
    strength   multiplies the range of every movement
    flip       whether images are mirrored at random, too, unless `kind` is "none"
    erase      the fraction of the images that `random_erase` takes a rectangle from
    batch, part  see `random_erase`; for the kind "none"

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no augmentation {kind!r}; choose from {', '.join(KINDS)}")
    images = to_unit(images)
    if kind != "none":
        b, _, height, width = images.shape
        field = elastic_field(b, height, width, generator, 0.04 * strength) if kind == "elastic" else None
        images = random_affine(images, generator, 10 * strength, 0.1 * strength,
                               (1 - 0.1 * strength, 1 + 0.1 * strength), 5 * strength, field)
        if flip:
            images = random_flip(images, generator)
    return random_erase(images, generator, erase, batch, part) if erase else images


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
                  scale: tuple[float, float] = (0.9, 1.1), shear: float = 5,
                  field: Tensor | None = None) -> Tensor:
    """Each image sheared, rotated, scaled about its centre and moved, all by random amounts of its own.

    images     (b, C, H, W) uint8, or float32 in [0, 1]
    generator  on the images' device
    degrees    rotation is uniform in [-degrees, degrees]
    translate  shift in x and in y is uniform in [-translate, translate], a fraction of W and of H
    scale      zoom is uniform between the two
    shear      horizontal shear is uniform in [-shear, shear], in degrees
    field      (2, b, H, W), how far in x and in y, in pixels, each pixel is fetched from besides

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
    if field is not None:
        x, y = x + field[0], y + field[1]
    grid = torch.stack([2 * x / width, 2 * y / height], dim=-1)  # (b, H, W, 2), -1 and 1 at the edges
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def elastic_field(b: int, height: int, width: int, generator: torch.Generator, strength: float = 0.04,
                  smoothness: float = 1 / 7) -> Tensor:
    """Random smooth displacements, in pixels, (2, b, H, W) float32 on the generator's device.

    White noise behind a Gaussian blur (Simard, Steinkraus and Platt, ICDAR 2003, section 2).

    strength    standard deviation of a displacement, a fraction of the image's side; theirs is about 0.05
    smoothness  standard deviation of the Gaussian, likewise; theirs is 4 pixels of 29
    """
    field = torch.randn(2, b, height, width, generator=generator, device=generator.device)
    for dim, size in ((2, height), (3, width)):
        # Around the edge, a product of a circulant matrix, so that the variance is the same everywhere.
        place = torch.arange(size, device=generator.device)
        distance = (place[:, None] - place).abs()
        distance = torch.minimum(distance, size - distance) / (smoothness * size)
        blur = torch.exp(-0.5 * distance**2)                                      # (size, size)
        blur = blur / blur[0].square().sum().sqrt()
        field = (blur @ field.transpose(2, dim)).transpose(2, dim)
    return strength * math.sqrt(height * width) * field


def random_erase(images: Tensor, generator: torch.Generator, probability: float, batch: int | None = None,
                 part: slice = slice(None)) -> Tensor:
    """A rectangle of 2 to 20% of the area taken out of a fraction of the images (arXiv 1708.04896).

    images (b, C, H, W) float32 in [0, 1]; what is taken out becomes 0, the background before normalisation.
    A rectangle may hang over the edges, and takes less then. Where the images are a `part` of a `batch` of so
    many it is drawn for all of them, so that the random numbers do not depend on how it is shared.
    """
    b, _, height, width = images.shape
    device = images.device
    drawn = torch.rand(5, b if batch is None else batch, 1, 1, generator=generator, device=device)
    chosen, area, aspect, down, right = drawn[:, part]
    area = (0.02 + 0.18 * area) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(3))
    half_height, half_width = (area * aspect).sqrt() / 2, (area / aspect).sqrt() / 2
    y = torch.arange(height, device=device)[:, None] + 0.5 - down * height
    x = torch.arange(width, device=device) + 0.5 - right * width
    inside = (y.abs() < half_height) & (x.abs() < half_width) & (chosen < probability)  # (b, H, W)
    return images.masked_fill(inside[:, None], 0)
