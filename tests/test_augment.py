"""augment.py: normalisation and random moves right, within their limits, without waiting for the device."""

from __future__ import annotations

import math

import pytest
import torch

import augment
import data

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def test_normalize():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).reshape(2, 2, 1, 1)
    got = augment.normalize(images, (0.0, 0.5), (1.0, 0.5))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.flatten(), torch.tensor([0.0, 1.0, 0.2, -0.2]))
    torch.testing.assert_close(augment.normalize(images / 255, (0.0, 0.5), (1.0, 0.5)), got)
    with pytest.raises(ValueError):
        augment.normalize(images, (0.5,), (0.5,))


STILL = {"degrees": 0, "translate": 0, "scale": (1, 1), "shear": 0}


def blobs(n: int = 64, height: int = 28, width: int = 28, device: str = "cpu") -> torch.Tensor:
    """(n, 1, height, width) float, the same smooth spot in the middle of each image."""
    y = torch.arange(height, device=device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    return torch.exp(-(x**2 + 2 * y**2) / 20).expand(n, 1, height, width)


def angles(images: torch.Tensor) -> torch.Tensor:
    """(n,) radians from the x axis down to the long axis of each image's spot, by its second moments."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2,
                          indexing="ij")
    xx, yy, xy = ((images[:, 0] * weight).sum((1, 2)) for weight in (x * x, y * y, x * y))
    return torch.atan2(2 * xy, xx - yy) / 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (3, 3, 32, 32), (2, 1, 12, 20)])
def test_affine_of_no_strength_changes_nothing(device, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    got = augment.random_affine(images, seeded(0, device), **STILL)
    torch.testing.assert_close(got, images / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_affine_differs_by_image_and_follows_the_generator(device):
    images = blobs(device=device)
    got = augment.random_affine(images, seeded(3, device))
    assert got.shape == images.shape and got.dtype == torch.float32 and got.device == images.device
    assert len(got.flatten(1).unique(dim=0)) == len(images)
    assert torch.equal(got, augment.random_affine(images, seeded(3, device)))
    assert not torch.equal(got, augment.random_affine(images, seeded(4, device)))
    assert got.min() >= 0 and got.max() <= 1 + 1e-6


@needs_gpu
def test_loop_never_waits_for_the_device():
    split = data.Split(torch.zeros(100, 3, 28, 28, dtype=torch.uint8, device="cuda"),
                       torch.zeros(100, dtype=torch.int64, device="cuda"))
    generator = seeded(0, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, _ in data.epoch_batches(split, 32, generator):
            augment.normalize(augment.augment(images, "elastic", generator), (0.5,) * 3, (0.5,) * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_affine_keeps_the_mass_inside():
    images = blobs()
    mass = images.sum((1, 2, 3))
    unscaled = augment.random_affine(images, seeded(), scale=(1, 1)).sum((1, 2, 3))
    torch.testing.assert_close(unscaled, mass, rtol=0.02, atol=0)
    for zoom in (0.9, 1.1):  # zooming in makes the spot larger
        zoomed = augment.random_affine(images, seeded(), scale=(zoom, zoom)).sum((1, 2, 3))
        torch.testing.assert_close(zoomed, mass * zoom**2, rtol=0.02, atol=0)


@pytest.mark.parametrize("height, width", [(28, 28), (28, 56)])
def test_affine_stays_within_its_limits_and_uses_them(height, width):
    images = blobs(500, height, width)
    turned = angles(augment.random_affine(images, seeded(), **STILL | {"degrees": 10})).rad2deg()
    assert 9.5 < turned.max() < 10.2 and -10.2 < turned.min() < -9.5  # in pixels, whatever the aspect

    moved = augment.random_affine(images, seeded(), **STILL | {"translate": 0.1})[:, 0]
    mass = moved.sum((1, 2))
    for size, dim in ((width, 1), (height, 2)):
        centre = (moved.sum(dim) * (torch.arange(size) - (size - 1) / 2)).sum(1) / mass
        assert 0.09 * size < centre.max() < 0.101 * size and -0.101 * size < centre.min() < -0.09 * size

    sheared = augment.random_affine(images, seeded(), **STILL | {"shear": 5})
    torch.testing.assert_close(sheared.sum(3), images.sum(3), rtol=0.01, atol=0.01)  # rows only slide
    assert angles(sheared).abs().max() > 0.03


def test_affine_fills_with_background():
    ones = torch.ones(8, 1, 28, 28)
    got = augment.random_affine(ones, seeded(), **STILL | {"scale": (0.5, 0.5)})
    assert got[..., 0, :].max() == 0 and got[..., 14, 14].min() > 0.999


# ---- Elastic, erasing, and all together


def test_a_field_has_the_strength_and_the_smoothness_it_is_asked_for(device):
    field = augment.elastic_field(400, 24, 32, seeded(1, device), strength=0.05, smoothness=1 / 8)
    assert field.shape == (2, 400, 24, 32)
    pixels = 0.05 * (24 * 32) ** 0.5
    assert torch.allclose(field.std((1,)), field.new_tensor(pixels), rtol=0.25)  # edges, too
    assert field.std().item() == pytest.approx(pixels, rel=0.05)
    # The autocorrelation of blurred noise: exp(−distance² / 4σ²), σ = 4 pixels along x.
    for distance in (2, 4, 8):
        correlation = (field[..., distance:] * field[..., :-distance]).mean() / field.square().mean()
        assert correlation.item() == pytest.approx(math.exp(-distance**2 / 64), abs=0.06)


def test_elastic_moves_pixels_as_its_field_says(device):
    images = torch.rand(3, 2, 9, 11, device=device)
    field = torch.zeros(2, 3, 9, 11, device=device)
    field[0, 1], field[1, 2] = 2, -1
    got = augment.random_affine(images, seeded(0, device), **STILL, field=field)
    torch.testing.assert_close(got[0], images[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1, :, :, :-2], images[1, :, :, 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[2, :, 1:], images[2, :, :-1], atol=1e-5, rtol=0)


def test_erasing_takes_a_rectangle_from_a_fraction_of_the_images(device):
    images = torch.ones(2000, 1, 28, 28, device=device)
    erased = 1 - augment.random_erase(images, seeded(2, device), 0.3)[:, 0]
    hit = erased.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.3, abs=0.05)
    for mask in erased[hit][:100]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask.bool(), rows[:, None] & columns), "a rectangle"
        assert mask.sum() <= 0.25 * 28 * 28
    assert torch.equal(augment.random_erase(images, seeded(2, device), 0.0), images)


def test_augment_does_what_its_kind_says(device):
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, device=device)
    still = augment.augment(images, "none", seeded(0, device))
    assert torch.equal(still, images.float() / 255)
    affine = augment.augment(images, "affine", seeded(0, device))
    assert torch.equal(affine, augment.random_affine(images, seeded(0, device)))
    elastic = augment.augment(images, "elastic", seeded(0, device))
    assert elastic.shape == images.shape and not torch.allclose(elastic, affine)
    assert elastic.min() >= 0 and elastic.max() <= 1
    nothing = augment.augment(images, "elastic", seeded(0, device), strength=0.0)
    torch.testing.assert_close(nothing, still, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no augmentation 'shake'"):
        augment.augment(images, "shake", seeded(0, device))


def test_a_part_of_a_batch_is_erased_as_the_whole_is(device):
    """However it is shared, the processes' generators stay the same."""
    images = torch.rand(9, 1, 12, 12, device=device)
    generator = seeded(0, device)
    whole, after = augment.random_erase(images, generator, 0.9), generator.get_state()
    assert not torch.equal(whole, images)
    for part in (slice(0, 5), slice(5, 9)):
        generator = seeded(0, device)
        own = augment.augment(images[part], "none", generator, erase=0.9, batch=9, part=part)
        assert torch.equal(own, whole[part])
        assert torch.equal(generator.get_state(), after)
