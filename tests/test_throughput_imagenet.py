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
    assert [(row["network"], row["variant"], row["image_size"]) for row in found["rows"]] == [
        (name, variant, size) for size in (32, 48) for variant in ("plain", "checkpointing")
        for name in throughput_imagenet.NETWORKS]
    assert all(row["error"] is None and row["images_per_second"] > 0 and row["spread"] >= 0
               for row in found["rows"])
    assert out.count("images/s") == 12
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "| mamba, checkpointing |" in tables.imagenet()
    assert "32×32, batch 2 | 48×48, batch 2 |" in tables.imagenet()


def test_a_part_of_it_is_measured_again_and_the_rest_kept(run):
    first, _ = run(*SMALL, "--networks", "mamba", "transformer", "--repeats", "1")
    second, out = run(*SMALL, "--sizes", "48", "--networks", "mamba", "--variants", "plain", "--merge")
    assert out.count("images/s") == 1
    *kept, new = second["rows"]
    assert (new["network"], new["variant"], new["image_size"]) == ("mamba", "plain", 48)
    assert kept == [row for row in first["rows"] if not throughput_imagenet.same(
        row, throughput_imagenet.Row("mamba", "plain", 48, 2, 0))]
    with pytest.raises(SystemExit, match="2"):
        run(*SMALL, "--d-model", "24", "--merge")


@pytest.mark.parametrize("wrong", [("--variants", "captured"), ("--sizes", "0"), ("--networks", "lstm"),
                                   ("--output", "/")])
def test_wrong_commands_are_refused(wrong, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*SMALL, *wrong)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failure_is_recorded_and_the_rest_goes_on(run, tmp_path, monkeypatch):
    builders = throughput_imagenet.builders
    written = []

    def broken():
        raise torch.cuda.OutOfMemoryError("no\nmemory")

    def show(row):
        output = tmp_path / "results" / "throughput_imagenet.json"
        written.append(len(json.loads(output.read_text())["rows"]) if output.exists() else 0)

    monkeypatch.setattr(throughput_imagenet, "count_on_meta", lambda make: 0)
    monkeypatch.setattr(throughput_imagenet, "show", show)
    monkeypatch.setattr(throughput_imagenet, "builders", lambda *sizes: builders(*sizes) | {"mamba": broken})
    found, _ = run(*SMALL, "--sizes", "32", "--networks", "mamba", "transformer")
    errors = [row["error"] for row in found["rows"]]
    assert errors == ["OutOfMemoryError: no memory", None] * 2
    assert found["rows"][0]["images_per_second"] is None and found["rows"][1]["images_per_second"] > 0
    assert written == [0, 1, 2, 3], "the file is written after every line"


@pytest.mark.parametrize("network", ["mamba", "transformer"])
def test_every_variant_computes_the_same_gradients(network, seed):
    make = throughput_imagenet.builders(16, 2, 8)[network]
    gradients = {}
    for variant in ("plain", "checkpointing", "compiled", "compiled-checkpointing"):
        step = throughput_imagenet.Step(make, variant, 32, 2, torch.device("cpu"))
        if "compiled" in variant:  # what is compiled, without the minute that a C++ compiler takes
            torch.compiler.reset()
            for block in step.model.blocks:
                block.compile(backend="aot_eager", dynamic=False)
        step.check_finite()
        gradients[variant] = [parameter.grad for parameter in step.model.parameters()]
    for found in gradients.values():
        for gradient, expected in zip(found, gradients["plain"], strict=True):
            torch.testing.assert_close(gradient, expected)


def test_the_networks_of_the_preset_are_as_large_as_ours():
    preset = throughput_imagenet.PRESETS["imagenet"].settings
    makers = throughput_imagenet.builders(*(preset[name] for name in ("d_model", "num_blocks", "patch_size")))
    ours, *others = (count_on_meta(make) for make in makers.values())
    assert 5e6 < ours < 8e6
    assert all(abs(other - ours) < 0.05 * ours for other in others)
