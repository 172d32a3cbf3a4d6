"""benchmarks/load_test.py: a smaller load leaves nothing over, and what is left over is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
import data
from benchmarks import load_test
from errors import UserError, run_script
from mamba_ssm_simple import VisionMamba2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def load(tmp_path, monkeypatch, capsys):
    """load(*arguments) → the rows of load_test.py, with a small model."""
    entry = data.DATASETS["digits"]
    config = {"num_classes": 10, "d_model": 8, "num_blocks": 1, "patch_size": 2, "d_state": 2}
    checkpoint.save(tmp_path / "small.pt", {
        "architecture": "mamba", "config": config, "model": VisionMamba2(**config).state_dict(),
        "dataset": {"name": "digits", "classes": list(entry.classes), "mean": list(entry.mean),
                    "std": list(entry.std)}, "epoch": 1, "metrics": {}, "settings": {}})
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["load_test.py", "--checkpoint", "small.pt", "--output",
                                          "found.json", *arguments])
        load_test.main()
        return json.loads((tmp_path / "found.json").read_text())["rows"]

    return call


@pytest.fixture
def process_of_before():
    """A child that is there before the load begins, as a pool of workers may be, and after it has ended."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        assert process.poll() is None
        process.kill()


def test_nothing_piles_up(load, monkeypatch, tmp_path, process_of_before):
    monkeypatch.setattr(load_test, "LOOKS", 10)
    rows = load("--starts", "5", "--classifications", "1000", "--loads", "starts", "pictures", "drawings")
    assert [(row["load"], row["count"]) for row in rows] == [("starts", 5), ("pictures", 1000),
                                                             ("drawings", 1000)]
    for row in rows:
        assert row["temporary_files"] == row["processes"] == row["open_files"] == 0, row
        assert row["grown"] < load_test.GROWTH and row["first_mib"] > 50, row
    assert {path.name for path in tmp_path.iterdir()} == {"small.pt", "found.json"}


def test_what_piles_up_is_seen(load, monkeypatch, capsys, process_of_before):
    kept = []

    def careless(folder: Path, _):
        def once() -> None:
            kept.append((bytearray(10**8), open(folder / "tmp" / f"{len(kept)}", "w"),  # noqa: SIM115
                         subprocess.Popen(["true"])))
            for place in range(0, 10**8, 4096):  # a page that is not written to takes no memory
                kept[-1][0][place] = 1
        return once

    monkeypatch.setattr(load_test, "pictures", careless)
    with pytest.raises(UserError, match="something piles up"):
        load("--classifications", "5", "--loads", "pictures")
    row, = json.loads(Path("found.json").read_text())["rows"]
    for _, file, process in kept:
        file.close()
        process.wait()
    assert (row["temporary_files"], row["processes"], row["open_files"]) == (5, 5, 3)
    assert row["grown"] > load_test.GROWTH
    assert "5 temporary files, 5 processes, 3 open files left" in capsys.readouterr().out


def test_a_training_that_fails_is_told(load, monkeypatch, capsys):
    monkeypatch.setattr(load_test, "TRAINING", ["--dataset", "digits", "--epochs", "0"])
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: load("--loads", "commands", "--starts", "5"))
    assert "a training ended with status 2, saying: error: argument --epochs" in capsys.readouterr().err
