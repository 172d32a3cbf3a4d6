"""benchmarks/load_test.py: a smaller load leaves nothing over, and what is left over is seen."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
import data
from benchmarks import load_test
from errors import UserError, run_script
from mamba_ssm_simple import VisionMamba2

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def small(tmp_path, monkeypatch) -> None:
    """The current folder holds small.pt, a small model."""
    entry = data.DATASETS["digits"]
    config = {"num_classes": 10, "d_model": 8, "num_blocks": 1, "patch_size": 2, "d_state": 2}
    checkpoint.save(tmp_path / "small.pt", {
        "architecture": "mamba", "config": config, "model": VisionMamba2(**config).state_dict(),
        "dataset": {"name": "digits", "classes": list(entry.classes), "mean": list(entry.mean),
                    "std": list(entry.std)}, "epoch": 1, "metrics": {}, "settings": {}})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def load(small, monkeypatch):
    """load(*arguments) → the rows of load_test.py, called in this process."""
    def call(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["load_test.py", "--checkpoint", "small.pt", "--output",
                                          "found.json", *arguments])
        load_test.main()
        return json.loads(Path("found.json").read_text())["rows"]

    return call


@pytest.fixture
def process_of_before():
    """A child that is there before the load begins, as a pool of workers may be, and after it has ended."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        assert process.poll() is None
        process.kill()


# In a process of its own: what the other tests have left in the memory of theirs is used, or not, at random.
ALONE = """
import gc, sys
sys.path.insert(0, sys.argv.pop(1))
from benchmarks import load_test
gc.freeze()  # the modules, or each look would go through them
load_test.LOOKS = 10
load_test.main()
"""


def test_nothing_piles_up(small, tmp_path):
    done = subprocess.run([sys.executable, "-c", ALONE, ROOT, "--checkpoint", "small.pt", "--output",
                           "found.json", "--starts", "5", "--classifications", "200", "--loads", "starts",
                           "pictures", "drawings"], capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["load"], row["count"]) for row in rows] == [("starts", 5), ("pictures", 200),
                                                             ("drawings", 200)]
    for row in rows:
        assert row["temporary_files"] == row["processes"] == row["open_files"] == 0, row
        assert row["grown"] < load_test.GROWTH and row["first_mib"] > 50, row
    assert {path.name for path in tmp_path.iterdir()} == {"small.pt", "found.json"}


def test_what_piles_up_is_seen(load, monkeypatch, capsys, process_of_before):
    kept = []

    def careless(folder: Path, _):
        def once() -> None:
            # Of Linux's, as there may be enough of freed memory in this process.
            kept.append((mmap.mmap(-1, 10**8), open(folder / "tmp" / f"{len(kept)}", "w"),  # noqa: SIM115
                         subprocess.Popen(["true"])))
            for place in range(0, 10**8, 4096):  # a page that is not written to takes no memory
                kept[-1][0][place] = 1
        return once

    monkeypatch.setattr(load_test, "pictures", careless)
    with pytest.raises(UserError, match="something piles up"):
        load("--classifications", "5", "--loads", "pictures")
    row, = json.loads(Path("found.json").read_text())["rows"]
    for memory, file, process in kept:
        memory.close()
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
