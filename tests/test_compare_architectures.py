"""benchmarks/compare_architectures.py: what it writes, what it does with a failure, and its fit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import evaluate
from benchmarks import compare_architectures as compare
from benchmarks import tables
from errors import run_script


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) → status, the JSON file's content if it is there, stdout and stderr."""
    monkeypatch.setattr(compare, "DEPTH", 1)
    monkeypatch.setattr(compare, "WIDTH", 32)
    output = tmp_path / "out" / "times.json"
    precision = torch.get_float32_matmul_precision()

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["compare_architectures.py", "--device", "cpu", "--output",
                                          str(output), *map(str, arguments)])
        status = 0
        try:
            run_script(compare.main)
        except SystemExit as ended:
            status = ended.code
        return status, json.loads(output.read_text()) if output.exists() else None, *capsys.readouterr()

    yield call
    torch.set_float32_matmul_precision(precision)


def test_it_writes_times_memory_and_plots(run, tmp_path):
    status, result, out, _ = run("--sizes", "4x2", "16x1", "--repeats", 1)
    assert status == 0
    assert {(row["network"], row["tokens"]) for row in result["rows"]} == {
        (network, tokens) for network in ("mamba", "mamba-8", "transformer", "transformer-4x", "lstm")
        for tokens in (4, 16)}
    assert all(row["median_ms"] > 0 and row["peak_mib"] > 0 and row["error"] is None
               for row in result["rows"])
    ours = result["parameters"]["mamba"]
    assert all(abs(result["parameters"][name] - ours) <= 0.05 * ours for name in ("transformer", "lstm"))
    assert result["parameters"]["transformer-4x"] > 1.2 * ours
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "times.json", "times_time.png", "times_memory.png"}
    assert "times_time.png" in out

    status, merged, *_ = run("--sizes", "9x1", "--repeats", 1, "--networks", "lstm", "--merge")
    assert status == 0 and [row["tokens"] for row in merged["rows"]] == [4] * 5 + [9] + [16] * 5


def test_a_failure_is_recorded_and_the_rest_goes_on(run, monkeypatch):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no kernel\nfor this")
    monkeypatch.setattr(compare, "mamba", lambda d_state=16: Broken())
    monkeypatch.setattr(compare, "matched_size", lambda *_: 16)
    status, result, out, _ = run("--sizes", "4x1", "--repeats", 1)
    assert status == 0 and "no kernel for this" in out
    failed, also_failed, *others = result["rows"]
    assert also_failed["error"] == failed["error"] == "RuntimeError: no kernel for this"
    assert failed["median_ms"] is None
    assert all(row["error"] is None and row["median_ms"] > 0 for row in others)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--sizes", "5x1"], "square number"), (["--sizes", "4"], "square number"),
    (["--sizes", "0x1"], "square number"), (["--repeats", 0], "at least 1"),
    (["--networks", "cnn"], "invalid choice")])
def test_a_wrong_command_is_one_line(arguments, says, run):
    status, result, _, err = run(*arguments)
    assert status == 2 and result is None and says in err and err.count("\n") == 1


def test_the_exponent_is_of_one_sequence_from_784_tokens_on():
    rows = [{"network": "a", "variant": compare.CAPTURED, "tokens": tokens, "batch": batch,
             "median_ms": 1e-3 * tokens**1.5 * batch if tokens > 500 else 1.0}
            for tokens, batch in ((49, 64), (784, 64), (3136, 16), (12544, 2))]
    assert compare.exponents(rows) == {"a, captured": pytest.approx(1.5)}
    assert compare.exponents(rows[:2]) == {}


def test_the_memory_counts_what_a_step_holds(seed):
    step = compare.Step("lstm", nn.Sequential(nn.Linear(compare.WIDTH, 4096), nn.ReLU(),
                                              nn.Linear(4096, compare.WIDTH)), compare.Size(1024, 1),
                        torch.device("cpu"))
    hidden = 1024 * 4096 * 4 / 2**20  # 16 MiB: the hidden layer and its gradient are held at once
    assert 2 * hidden <= evaluate.peak_mib(step, torch.device("cpu")) <= 4 * hidden


def test_of_each_attention_the_faster_counts():
    rows = [compare.Row("transformer", compare.CAPTURED, 49, 2, time, attention=attention)
            for attention, time in (("flash", 2.0), ("cudnn", 1.0))]
    failed = rows[1]._replace(median_ms=None, error="no kernel")
    assert compare.fastest([compare.Row("mamba", compare.CAPTURED, 49, 2), *rows])[1:] == rows[1:]
    assert compare.fastest([rows[0], failed]) == compare.fastest([failed, rows[0]]) == rows[:1]
    cuda = compare.rows_to_measure(["lstm", "transformer"], compare.Size(49, 2), torch.device("cuda"), True)
    assert [row.attention for row in cuda] == [None, "flash", "cudnn", "flash"]


def test_its_table_has_a_row_for_each_network(tmp_path, monkeypatch):
    rows = [{"network": "mamba", "variant": compare.CAPTURED, "tokens": tokens, "batch": 2, "median_ms": time,
             "peak_mib": 10.4, "attention": kind}
            for tokens, time, kind in ((49, 1.234, "cudnn"), (196, None, None))]
    found = {"machine": {"gpu": "GPU", "torch": "2"}, "depth": 4, "width": 128, "precision": "bfloat16",
             "parameters": {"mamba": 12345}, "rows": rows, "exponents": {"mamba, captured": 1.014}}
    monkeypatch.setattr(tables, "result", lambda name: found)
    table = tables.architectures()
    assert "| | parameters | 49 × 2 | 196 × 2 | exponent |" in table
    assert table.endswith("| mamba, captured | 12,345 | 1.23 / 10 c | – | 1.01 |")
