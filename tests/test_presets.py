"""presets.py: every preset is a command line that could have been typed, and flags win over it."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

import train_mamba
from flags import parse_arguments
from mamba_ssm_simple import VisionMamba2
from presets import PRESETS


def settings(*arguments: object) -> dict:
    """What these flags of train_mamba.py mean."""
    return vars(parse_arguments([*map(str, arguments)]))


def typed(name: str, value: object) -> list[str]:
    """The flag that gives the setting `name` its value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", "x".join(map(str, value)) if isinstance(value, tuple) else str(value)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_its_flags_say(preset):
    flags = [word for pair in PRESETS[preset].settings.items() for word in typed(*pair)]
    assert settings("--preset", preset) == settings(*flags) | {"preset": preset}
    assert PRESETS[preset].reason


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flag_wins_over_every_preset(preset):
    given = settings("--epochs", 7, "--preset", preset, "--lr", 0.125, "--scan", "row", "--augment", "affine")
    assert (given["epochs"], given["lr"], given["scan"]) == (7, 0.125, "row")
    assert given["preset"] == preset and given["augment"] == "affine"
    assert settings("--preset", preset, "--no-augment")["augment"] == "none"


@pytest.mark.parametrize(("preset", "most"), [("tiny", 100_000), ("best", 1_000_000), ("cifar", 4_000_000),
                                              ("imagenet", 7_000_000)])
def test_a_preset_keeps_its_number_of_parameters(preset, most):
    _, model = train_mamba.build_model(argparse.Namespace(**settings("--preset", preset)), 10, 1,
                                       torch.device("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) <= most


def test_a_permutation_is_the_same_in_every_process_and_no_pixel_is_lost(seed):
    plain, permuted, other = (VisionMamba2(d_model=8, num_blocks=1, patch_size=1, scan="raster",
                                           permute_seed=order).eval() for order in (None, 92916, 1))
    plain.load_state_dict(permuted.state_dict())
    other.load_state_dict(permuted.state_dict())
    images = torch.rand(2, 1, 7, 5)
    with torch.inference_mode():  # and afterwards a backward with the same order
        logits = permuted(images)
    assert not torch.allclose(logits, other(images)) and not torch.allclose(logits, plain(images))
    order = torch.from_numpy(np.random.RandomState(92916).permutation(35))
    torch.testing.assert_close(plain(images.flatten(2)[..., order].reshape(2, 1, 7, 5)), logits)
    images.requires_grad_()
    permuted(images).sum().backward()
    assert (images.grad != 0).all()
    mean = torch.compile(permuted.forward, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(mean, logits)
