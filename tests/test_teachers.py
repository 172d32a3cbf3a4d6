"""teachers.py: what they say together, who may teach, and that a training heeds them and no labels."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import train_mamba
from errors import UserError
from mamba_ssm_simple import VisionMamba2
from teachers import Teachers
from training import Training

CPU = torch.device("cpu")
SIZES = {"d_model": 16, "num_blocks": 1, "patch_size": 2, "d_state": 2}


@pytest.fixture
def digits() -> data.Dataset:
    return data.load("digits", "unused")


@pytest.fixture
def taught(tmp_path, digits, seed):
    """taught(name, **settings) → the checkpoint of a random network, and the network."""
    def make(name: str, dataset: data.Dataset = digits, **settings: object) -> tuple[Path, VisionMamba2]:
        model = VisionMamba2(**SIZES).eval()
        path = tmp_path / f"{name}.pt"
        checkpoint.save(path, {
            "architecture": "mamba", "config": SIZES, "model": model.state_dict(), "epoch": 1, "metrics": {},
            "settings": settings, "dataset": {
                "name": dataset.name, "classes": list(dataset.classes), "mean": list(dataset.mean),
                "std": list(dataset.std), "shape": list(dataset.shape)}})
        return path, model
    return make


def test_teachers_say_the_mean_of_their_probabilities(taught, digits):
    (a, first), (b, second) = taught("a"), taught("b")
    images = torch.randn(5, 1, 8, 8)
    expected = (first(images).softmax(1) + second(images).softmax(1)) / 2
    got = Teachers([a, str(b)], digits, CPU)(images)
    assert not got.requires_grad and got.dtype == torch.float32
    torch.testing.assert_close(got, expected.detach())


def test_a_teacher_of_other_classes_is_refused(taught, digits):
    other = dataclasses.replace(digits, classes=tuple("abcdefghij"))
    brighter = dataclasses.replace(digits, mean=(0.75,))
    for name, dataset in (("other", other), ("brighter", brighter)):
        path, _ = taught(name, dataset)
        with pytest.raises(UserError, match=f"{name}.pt knows digits, whose classes or normalisation"):
            Teachers([path], digits, CPU)


def test_a_teacher_that_knows_the_validation_images_teaches_only_where_they_test_nothing(taught, digits):
    path, _ = taught("a", train_on_all=True)
    with pytest.raises(UserError, match="trained on the validation images, too"):
        Teachers([path], digits, CPU)
    assert len(Teachers([path], digits, CPU, may_know_validation=True).networks) == 1


@pytest.mark.parametrize("listens", [True, False])
def test_a_training_listens_to_teachers_and_not_to_labels(listens, taught, digits, monkeypatch):
    path, _ = taught("a")
    options = ["--teachers", f"{path},{path}"] if listens else []
    monkeypatch.setattr(sys, "argv", ["train_mamba.py", "--dataset", "digits", "--no-augment", *options])
    images, labels = digits.train.images[:32], digits.train.labels[:32]
    ends = []
    for shown in (labels, (labels + 1) % 10):
        torch.manual_seed(1)
        run = Training(VisionMamba2(**SIZES), digits, train_mamba.parse_arguments(), CPU)
        run.train_step(images, shown)
        ends.append(run.model.head.weight)
    assert torch.equal(*ends) == listens


def test_one_network_learns_what_another_says(taught, digits, monkeypatch):
    path, teacher = taught("a")
    with torch.no_grad():
        teacher.head.weight *= 100  # so that it has an opinion
    contents = checkpoint.load(path)
    checkpoint.save(path, {**contents, "model": teacher.state_dict()})
    monkeypatch.setattr(sys, "argv", ["train_mamba.py", "--dataset", "digits", "--no-augment", "--teachers",
                                      str(path), "--lr", "0.02", "--epochs", "1", "--batch-size", "100"])
    run = Training(VisionMamba2(**SIZES), digits, train_mamba.parse_arguments(), CPU)
    losses = [float(run.train_step(*batch)[0]) / len(batch[1]) for epoch in range(4) for batch in
              data.epoch_batches(digits.train, 100, torch.Generator().manual_seed(epoch))]
    assert losses[-1] < 0.7 * losses[0]
