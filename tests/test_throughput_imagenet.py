"""benchmarks/throughput_imagenet.py: networks of the same size, what it writes, what a failure does."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from baselines import count_on_meta
from benchmarks import tables, throughput_imagenet
from errors import run_script

SMALL = ("--device", "cpu", "--sizes", "32", "48", "--batch-size", "2", "--d-model", "16", "--num-blocks",
         "2", "--patch-size", "8", "--repeats", "2")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) → the JSON file's content and stdout."""
    output = tmp_path / "results" / "throughput_imagenet.json"
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(throughput_imagenet, "CLASSES", 7)

    def call(*arguments: str) -> tuple[dict, str]:
        arguments = ["throughput_imagenet.py", *arguments, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        run_script(throughput_imagenet.main)
        return json.loads(output.read_text()), capsys.readouterr().out

    yield call
    torch.set_float32_matmul_precision(precision)


def test_it_measures_every_network_and_its_table_is_made(run, tmp_path, monkeypatch):
    found, out = run(*SMALL)
    assert [(row["network"], row["checkpointing"], row["image_size"]) for row in found["rows"]] == [
        (name, checkpointing, size) for size in (32, 48)
        for name in ("mamba", "transformer", "transformer-4x") for checkpointing in (False, True)]
    assert all(row["error"] is None and row["images_per_second"] > 0 and row["spread"] >= 0
               for row in found["rows"])
    assert out.count("images/s") == 12
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "| mamba, plain, checkpointing |" in tables.imagenet()
    assert "32×32, batch 2 | 48×48, batch 2 |" in tables.imagenet()


def test_a_failure_is_recorded_and_the_rest_goes_on(run, monkeypatch):
    builders = throughput_imagenet.builders

    def broken():
        raise torch.cuda.OutOfMemoryError("no\nmemory")

    monkeypatch.setattr(throughput_imagenet, "count_on_meta", lambda make: 0)
    monkeypatch.setattr(throughput_imagenet, "builders",
                        lambda *sizes: {"mamba": broken, "transformer": builders(*sizes)["transformer"]})
    found, _ = run(*SMALL[:3], *SMALL[4:])
    errors = [row["error"] for row in found["rows"]]
    assert errors == ["OutOfMemoryError: no memory"] * 2 + [None] * 2
    assert found["rows"][0]["images_per_second"] is None and found["rows"][2]["images_per_second"] > 0


def test_the_networks_of_the_preset_are_as_large_as_ours():
    preset = throughput_imagenet.PRESETS["imagenet"].settings
    makers = throughput_imagenet.builders(*(preset[name] for name in ("d_model", "num_blocks", "patch_size")))
    ours, *others = (count_on_meta(make) for make in makers.values())
    assert 5e6 < ours < 8e6
    assert all(abs(other - ours) < 0.05 * ours for other in others)
