"""training.py: the schedule, the average of the weights, and what decays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import data
from errors import UserError
from flags import parse_arguments
from mamba_ssm_simple import VisionMamba2
from training import Training, average, parameter_groups


def training(*flags: object) -> Training:
    """A Training of a small model on scikit-learn's digits."""
    settings = parse_arguments(["--dataset", "digits", "--device", "cpu", *map(str, flags)])
    return Training(VisionMamba2(d_model=16, num_blocks=1, patch_size=2, d_state=2, stem_depth=2),
                    data.load("digits", "unused"), settings, torch.device("cpu"))


def rates(training: Training, steps: int) -> list[float]:
    found = []
    for training.step in range(steps):
        found.append(training.learning_rate())
    return found


def test_the_rate_rises_for_as_long_as_asked_and_falls_to_a_hundredth():
    run = training("--lr", 0.5, "--epochs", 2, "--batch-size", 100, "--warm-up", 4)  # 12 steps an epoch
    found = rates(run, 24)
    assert found[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5]) and max(found) == 0.5
    assert found[4:] == sorted(found[4:], reverse=True)
    run.step = 24
    assert run.learning_rate() == pytest.approx(0.005)
    assert rates(training("--lr", 0.5, "--warm-up", 0), 1) == [0.5]
    long = training("--epochs", 1000, "--batch-size", 100)  # 12,000 steps: the warm-up is 500
    assert rates(long, 500)[-1] == 1e-3


def test_a_mean_teacher_has_its_share_of_what_is_to_be_said():
    run = training("--ema", 0.9, "--mean-teacher", 0.25)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    run.averaged.head.weight.data.normal_()
    said = run.averaged(images).softmax(1)
    expected = 0.75 * torch.eye(10)[labels] + 0.25 * said
    got = run.targets(images, labels)
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad
    assert training("--ema", 0.9).targets(images, labels) is labels


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_with_a_mean_teacher_of_all_nothing_is_learnt_of_labels(share):
    ends = []
    for other in (0, 1):
        torch.manual_seed(1)
        run = training("--ema", 0.9, "--mean-teacher", share)
        run.train_step(run.dataset.train.images[:32], (run.dataset.train.labels[:32] + other) % 10)
        ends.append(run.model.head.weight)
    assert torch.equal(*ends) == (share == 1)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_preparing_changes_nothing(steps_before, monkeypatch):
    sizes, ends, update = [], [], Training.update

    def counted(trial: Training, images: torch.Tensor, labels: torch.Tensor):
        sizes.append(len(labels))
        return update(trial, images, labels)

    for prepares in (False, True):
        torch.manual_seed(1)
        run = training("--augment", "elastic", "--drop-path", 0.5, "--ema", 0.9, "--lr", 0.1)
        batch = run.dataset.train.images[:50], run.dataset.train.labels[:50]
        for step in range(steps_before + 2):
            if prepares and step == steps_before:
                with monkeypatch.context() as patch:
                    patch.setattr(Training, "update", counted)
                    run.prepare()
            run.train_step(*batch)
        ends.append(run.state())
    assert sorted(sizes) == sorted({64, len(run.dataset.train.labels) % 64})
    for name in ("model", "averaged"):
        for key, value in ends[0][name].items():
            assert torch.equal(value, ends[1][name][key]), f"{name}.{key}"
    assert str(ends[0]["optimizer"]) == str(ends[1]["optimizer"])
    assert torch.equal(ends[0]["sums"], ends[1]["sums"])
    assert torch.equal(ends[0]["augmentation"], ends[1]["augmentation"])
    assert torch.equal(ends[0]["rng"]["torch"], ends[1]["rng"]["torch"])


def test_a_state_goes_on_where_weights_lie_otherwise(seed):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(seed)
        run = training("--no-augment", "--lr", 0.1)
        run.train_step(run.dataset.train.images[:50], run.dataset.train.labels[:50])
        state = copy.deepcopy(run.state())
        run.model.stem.to(memory_format=layout)
        run.load(state)
        run.train_step(run.dataset.train.images[50:100], run.dataset.train.labels[50:100])
        ends.append(run.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-3)


def test_the_average_follows_the_weights_and_the_statistics(seed):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged = copy.deepcopy(model)
    before = {name: value.clone() for name, value in averaged.state_dict().items()}
    with torch.no_grad():
        model[0].weight += 1
    model(torch.randn(8, 3))
    average(averaged, model, torch.tensor(0.25))
    after, news = averaged.state_dict(), model.state_dict()
    for name, value in after.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * news[name])
        else:
            assert torch.equal(value, news[name])
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])


def test_the_average_of_few_steps_does_not_remember_the_random_weights():
    run = training("--ema", 0.999, "--batch-size", 50)
    assert run.evaluated is run.averaged
    for index, batch in enumerate(data.epoch_batches(run.dataset.train, 50, None, shuffle=False)):
        if index == 3:
            break
        run.train_step(*batch)
        assert float(run.average_weight) == pytest.approx(1 - (1 + index) / (10 + index))
    run.step = 10**6
    run.set_rates()
    assert float(run.average_weight) == pytest.approx(1e-3, rel=1e-3)
    plain = training()
    assert plain.evaluated is plain.model and plain.averaged is None


def test_a_scaler_steps_over_what_overflows_and_other_precisions_stop():
    run = training("--amp", "fp16")
    run.check_finite(1.0, float("inf"))
    with pytest.raises(UserError, match="the loss is nan"):
        run.check_finite(float("nan"), 1.0)
    with pytest.raises(UserError, match="gradient's norm is inf"):
        training("--amp", "bf16").check_finite(1.0, float("inf"))


def test_every_parameter_is_in_one_group_and_matrices_alone_decay():
    model = VisionMamba2(d_model=16, num_blocks=2, bidirectional=True)
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))
    kept = {id(parameter) for parameter in others["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == (parameter.ndim < 2 or name.endswith("A_log")), name
