"""profile_step.py: the table of shares, and that nothing is left behind."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import torch

import profile_step
import train_mamba


@pytest.fixture
def table(tmp_path, monkeypatch, capfd):
    """table(*flags) → {group: percent} that --profile prints for a small model."""
    def call(*flags: str) -> dict[str, float]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(profile_step, "ROUNDS", 1)  # of a model as small as this one no share is judged
        small = "--dataset digits --device cpu --d-model 32 --num-blocks 2 --d-state 4"
        monkeypatch.setattr(sys, "argv", ["train_mamba.py", "--profile", *shlex.split(small), *flags])
        precision = torch.get_float32_matmul_precision()
        train_mamba.main()
        torch.set_float32_matmul_precision(precision)
        done = capfd.readouterr()
        assert re.search(r"^[\d,.]+ ms a step of 64 images\n\Z", done.out, re.MULTILINE), done.out
        assert not list(tmp_path.iterdir()), "it wrote something"
        return {name.strip(): float(share) for name, share in re.findall(r"^(.+?) +([\d.]+) %", done.out,
                                                                         re.MULTILINE)}
    return call


@pytest.mark.parametrize(("model", "own"), [("mamba", {"scan", "convolutions"}), ("lstm", {"LSTM"}),
                                            ("transformer", {"attention"})])
def test_the_shares_sum_to_all_of_a_step(model, own, table):
    shares = table("--model", model)
    assert shares.pop("together") == 100.0
    assert sum(shares.values()) == pytest.approx(100, abs=0.6)
    assert shares.keys() <= set(profile_step.GROUPS)
    assert shares.keys() >= own | {"matrix products", "norms", "optimiser", "augmentation, data", "other"}
    assert shares["other"] < 25  # of a model as small as this one Python takes more than of a real one
    assert all(shares[name] > 0.5 for name in own)


def test_what_a_backward_does_is_its_forwards(seed):
    """A softplus has no group of its own; one that lies in a range belongs to that, forward and backward."""
    x = torch.randn(100, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("scan"):
            y = torch.nn.functional.softplus(x)
        (y * 2).sum().backward()
    events = profiler.events()
    groups = profile_step.group_of_each(events)
    found = {event.name: groups[id(event)] for event in events}
    assert found["aten::softplus"] == found["aten::softplus_backward"] == "scan"
    assert found["aten::mul"] == profile_step.ELEMENTWISE
