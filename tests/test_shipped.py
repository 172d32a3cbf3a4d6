"""checkpoints/vision_mamba2_mnist.pt: what is said of the model in the box is in it, and true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import checkpoint
import data
import evaluate
import mnist

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "vision_mamba2_mnist.pt"


@pytest.fixture(scope="module")
def contents() -> dict:
    return checkpoint.load(SHIPPED)


@pytest.fixture
def mnist_there() -> data.Dataset:
    """MNIST from data/, if it is all there; nothing is fetched for a test."""
    folder = ROOT / "data" / "MNIST" / "raw"
    if any(mnist.verified_bytes(folder, name) is None for name in mnist.MNIST_MD5):
        pytest.skip("MNIST is not in data/")
    return data.load("mnist", ROOT / "data")


def test_it_is_small_and_says_how_it_was_made(contents):
    assert SHIPPED.stat().st_size <= 3e6
    settings, metrics = contents["settings"], contents["metrics"]
    assert settings["dataset"] == contents["dataset"]["name"] == "mnist" and isinstance(settings["seed"], int)
    assert contents["epoch"] == metrics["epoch"] == settings["epochs"], "the last epoch, not the luckiest"
    assert 0.99 < metrics["test_accuracy"] < 1
    for name in ("d_model", "num_blocks", "d_state", "patch_size", "scan"):
        assert contents["config"][name] == settings[name]
    evaluate.rebuild(contents, "cpu")
    torch.load(SHIPPED, weights_only=True)  # without a GPU, too


def test_its_accuracy_is_the_one_that_it_names(contents, mnist_there, device):
    model = evaluate.rebuild(contents, device)
    probabilities = evaluate.predict(model, mnist_there.test, mnist_there, device)
    hits = (probabilities.argmax(1) == mnist_there.test.labels).sum().item()
    named = contents["metrics"]["test_accuracy"] * len(mnist_there.test.labels)
    assert len(mnist_there.test.labels) == 10_000
    assert abs(hits - named) <= 2, "but for two images, which other kernels may see otherwise"
