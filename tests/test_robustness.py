"""robustness.py: each corruption does what its name says, and strength 0 nothing."""

from __future__ import annotations

import pytest
import torch

import data
import robustness
from mamba_ssm_simple import VisionMamba2


@pytest.fixture
def images(seed) -> torch.Tensor:
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 9:19, 12:16] = torch.randint(100, 256, (3, 1, 10, 4), dtype=torch.uint8)
    return images


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_strength_0_changes_nothing_and_more_changes_more(name, images):
    corruption = robustness.CORRUPTIONS[name]
    assert corruption.strengths_for(images) == corruption.strengths
    spoiled = [corruption.apply(images, strength) for strength in corruption.strengths]
    assert torch.equal(spoiled[0], images)
    assert all(image.shape == images.shape and image.dtype == torch.uint8 for image in spoiled)
    assert torch.equal(corruption.apply(images, corruption.strengths[-1]), spoiled[-1])
    distances = [(image.float() - images.float()).square().mean().item() for image in spoiled]
    assert distances[0] == 0 and distances[1] > 0 and distances[-1] > distances[1]


@pytest.mark.parametrize(("size", "shifts", "blurs"), [
    ((8, 8), [0, 1, 2], [0, 0.14, 0.29, 0.43, 0.57, 0.86]),
    ((56, 90), [0, 2, 4, 6, 10, 14], [0, 1, 2, 3, 4, 6])])
def test_strengths_in_pixels_grow_with_the_image(size, shifts, blurs):
    images = torch.zeros(1, 1, *size, dtype=torch.uint8)
    strengths = {name: list(each.strengths_for(images)) for name, each in robustness.CORRUPTIONS.items()}
    assert strengths["shift"] == shifts and strengths["blur"] == blurs
    assert strengths["rotation"] == [0, 15, 30, 45, 60, 90] and strengths["noise"][-1] == 0.6
    examples = robustness.examples(images)
    assert {name: len(each) for name, each in examples.items()} == {
        name: len(each) for name, each in strengths.items()}


def test_images_may_be_low_and_wide(seed):
    images = torch.randint(0, 256, (2, 1, 8, 16), dtype=torch.uint8)
    for corruption in robustness.CORRUPTIONS.values():
        assert corruption.apply(images, corruption.strengths[-1]).shape == images.shape


def test_directions(images):
    assert torch.equal(robustness.shift(images, 2)[..., 2:, 2:], images[..., :-2, :-2])
    assert torch.equal(robustness.rotate(images, 90), images.rot90(1, (2, 3)))


def test_accuracies_are_those_of_the_spoiled_images(images):
    dataset = data.load("digits", "unused")
    model = VisionMamba2(d_model=8, num_blocks=1, d_state=2, patch_size=2).eval()
    curves = robustness.measure(model, dataset.test, dataset, "cpu", most=30)
    assert set(curves) == {"rotation", "noise", "blur", "shift"}
    unspoiled = {curve["accuracy"][0] for curve in curves.values()}
    assert len(unspoiled) == 1 and all(curve["images"] == 30 for curve in curves.values())
    assert all(len(curve["accuracy"]) == len(curve["strengths"]) for curve in curves.values())
    assert max(curves["shift"]["strengths"]) == 2, "of 8 pixels, and not 7"
