"""benchmarks/accuracy.py: what is trained and written; a stub tells outcomes, but for one whole command."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

import checkpoint
import presets
import trials
from benchmarks import accuracy
from mamba_ssm_simple import VisionMamba2
from tests.commands import LIGHT, patched
from trials import Outcome, Trial

SMALL = "--dataset digits --epochs 1 --limit-train 64 --d-model 16 --num-blocks 1 --d-state 4 --device cpu"
CONFIG = {"num_classes": 10, "d_model": 16, "num_blocks": 1, "in_channels": 1, "patch_size": 2, "d_state": 4}
NAN = Outcome([], "the loss is nan at step 3; lower it", nan=True)


@pytest.fixture
def call(tmp_path, monkeypatch, command):
    """call("--preset best ...") → status, stdout and stderr, of a repository that is empty."""
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    return lambda arguments: command(accuracy, *shlex.split(arguments))


def epochs(value: float, key: str = "test_accuracy") -> list[dict]:
    return [{"epoch": 1, "seconds": 3.0, "evaluation_seconds": 0.5, key: 0.1},
            {"epoch": 2, "seconds": 1.0, "evaluation_seconds": 0.5, key: value}]


@pytest.fixture
def trained(monkeypatch):
    """trained(*outcomes) → (trial, jobs) of each trial trained, which ends, in turn, as the outcomes say."""
    def set_outcomes(*outcomes: Outcome) -> list[tuple[Trial, int]]:
        found = []

        def train(trials, total, jobs):
            assert total == len(trials)
            for trial, outcome in zip(trials, outcomes, strict=False):
                found.append((trial, jobs))
                settings = {name: str(value) if isinstance(value, Path) else value
                            for name, value in vars(trial.settings).items()}
                checkpoint.save(trial.last, {
                    "architecture": "mamba", "config": CONFIG, "model": VisionMamba2(**CONFIG).state_dict(),
                    "dataset": {}, "epoch": 2, "metrics": {}, "settings": settings})
                yield trial, outcome

        monkeypatch.setattr(accuracy, "train", train)
        return found

    return set_outcomes


def written(place: Path) -> dict:
    path, = (place / "results").iterdir()
    return json.loads(path.read_text()) | {"file": path.name}


def test_a_preset_is_trained_on_all_images_and_every_figure_is_written(call, trained, tmp_path):
    found = trained(Outcome(epochs(0.97)), NAN, Outcome(epochs(0.99)))
    status, out, _ = call("--preset tiny --seeds 3 --jobs 2 -- --limit-train 64")
    assert status == 0
    assert [trial.name for trial, _ in found] == [f"accuracy-tiny-seed{seed}" for seed in range(3)]
    assert all(trial.settings.train_on_all and trial.settings.d_model == 48 and jobs == 2
               for trial, jobs in found)
    assert [trial.settings.seed for trial, _ in found] == [0, 1, 2]
    result = written(tmp_path)
    assert result["file"] == "accuracy-tiny.json"
    assert result["arguments"] == ["--preset", "tiny", "--train-on-all", "--limit-train", "64"]
    assert result["settings"].items() >= {**presets.PRESETS["tiny"].settings, "preset": "tiny",
                                          "limit_train": 64, "train_on_all": True}.items()
    assert not result["settings"].keys() & {"seed", "run_name", "data_dir", "runs_dir", "device"}
    assert result["parameters"] == sum(weight.numel() for weight in VisionMamba2(**CONFIG).parameters())
    assert [run["nan"] for run in result["runs"]] == [False, True, False] and result["nan_runs"] == 1
    assert [run.get("test_accuracy") for run in result["runs"]] == [0.97, None, 0.99]
    assert [run["training_seconds"] for run in result["runs"]] == [4, 0, 4]
    assert [run["all_evaluation_seconds"] for run in result["runs"]] == [1, 0, 1]
    assert result["training_seconds"] == 8
    assert result["test_accuracy"] == {"mean": pytest.approx(0.98), "std": pytest.approx(0.02 / 2**0.5)}
    assert result["jobs"] == 2 and result["seeds"] == 3 and result["epochs"] == 40
    assert {"cpu", "torch", "python"} <= result["machine"].keys()
    assert "accuracy-tiny-seed1: the loss is nan at step 3; lower it" in out
    assert "test accuracy 98.00 ± 1.41 % (seeds: 3, 1 of them ended in NaN), 8 s of training" in out


def test_to_choose_by_validation_the_test_set_stays_unseen(call, trained, tmp_path):
    both = epochs(0.9, "val_accuracy")
    both[-1]["test_accuracy"] = 0.8
    found = trained(Outcome(both))
    status, out, _ = call("--preset tiny --seeds 1 --validation")
    result = written(tmp_path)
    assert status == 0 and "validation accuracy 90.00 % (seeds: 1)" in out
    assert result["file"] == "validation-tiny.json" and not found[0][0].settings.train_on_all
    assert result["val_accuracy"] == {"mean": 0.9, "std": None}
    assert "test_accuracy" not in json.dumps(result) + out


def test_what_is_there_is_kept_where_a_later_seed_fails(call, trained, tmp_path):
    trained(Outcome(epochs(0.97)), Outcome([], "no data; get some"))
    status, _, err = call("--name a --seeds 3 -- --epochs 1")
    assert (status, err) == (2, "error: a-seed1 did not finish: no data; get some\n")
    result = written(tmp_path)
    assert result["file"] == "a.json" and [run["seed"] for run in result["runs"]] == [0]


def test_merge_keeps_the_seeds_in_the_file_and_trains_the_others(call, trained, tmp_path):
    trained(Outcome(epochs(0.97)), NAN)
    assert call("--name a --seeds 2 -- --epochs 2")[0] == 0
    file = tmp_path / "results" / "a.json"
    first, broken = written(tmp_path)["runs"]
    assert first["machine"] == broken["machine"] == written(tmp_path)["machine"]
    found = trained(Outcome(epochs(0.99)))
    status, out, _ = call("--name a --seeds 3 --merge -- --epochs 2")
    assert status == 0 and [trial.name for trial, _ in found] == ["a-seed2"]
    result = written(tmp_path)
    assert result["runs"][:2] == [first, broken] and [run["seed"] for run in result["runs"]] == [0, 1, 2]
    assert result["test_accuracy"]["mean"] == pytest.approx(0.98) and result["training_seconds"] == 8
    assert "98.00 ± 1.41 % (seeds: 3, 1 of them ended in NaN), 8 s" in out

    before = file.read_text()
    for arguments, complaint in (
            ("--name a --seeds 3 --merge -- --epochs 2", "has all of these seeds; choose another --name"),
            ("--name a --seeds 4 --merge -- --epochs 2 --lr 5", "with --lr 0.001 and not 5.0; choose"),
            ("--name b --seeds 4 --merge -- --epochs 2", "no seeds in")):
        status, _, err = call(arguments)
        assert status == 2 and complaint in err and len(err.splitlines()) == 1
    older = json.loads(before)
    del older["settings"]["drop_path"]
    file.write_text(json.dumps(older))
    assert "with --drop-path 0.0 and not 0.1;" in call("--name a --seeds 4 --merge -- --epochs 2 "
                                                       "--drop-path 0.1")[2]
    file.write_text(before)
    older = json.loads(before)
    for facts in (older, *older["runs"]):
        facts["machine"]["device"] = "cuda:0"
    file.write_text(json.dumps(older))
    status, _, err = call("--name a --seeds 4 --merge -- --epochs 2")
    assert status == 2 and "were trained with --device cuda and not cpu; choose another --name, or" in err
    for broken in ("[", "[]", '{"runs": []}', '{"runs": 1, "settings": {}, "jobs": 1, "machine": {}}'):
        file.write_text(broken)
        assert "no seeds in" in call("--name a --seeds 4 --merge")[2]


def test_a_file_is_replaced_only_by_what_was_trained_here(call, trained, tmp_path):
    found = trained(Outcome(epochs(0.97)), Outcome(epochs(0.98)))
    assert call("--name a --seeds 2 -- --epochs 2")[0] == 0
    before = (tmp_path / "results" / "a.json").read_text()
    for trial, _ in found:
        trial.folder.mkdir(parents=True)
        (trial.folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    trained(Outcome(epochs(0.97)), Outcome(epochs(0.98)), Outcome(epochs(0.99)))
    assert call("--name a --seeds 3 -- --epochs 2")[0] == 0
    (tmp_path / "results" / "a.json").write_text(before)
    for arguments, complaint in (
            ("--name a --seeds 1 -- --epochs 2", "would lose 1 of its seeds; add --merge"),
            ("--name a --seeds 2 -- --epochs 2 --lr 5", "another --name")):
        status, _, err = call(arguments)
        assert status == 2 and complaint in err
    shutil.rmtree(tmp_path / "checkpoints")
    assert "would lose 2 of its seeds" in call("--name a --seeds 3 -- --epochs 2")[2]
    assert (tmp_path / "results" / "a.json").read_text() == before


def test_a_merged_file_tells_where_each_seed_was_trained(call, trained, tmp_path, monkeypatch):
    trained(Outcome(epochs(0.97)))
    call("--name a --seeds 1")
    file = tmp_path / "results" / "a.json"
    older = json.loads(file.read_text())
    del older["runs"][0]["machine"], older["runs"][0]["jobs"]  # as files were written once
    file.write_text(json.dumps(older))
    monkeypatch.setattr(accuracy.timing, "cpu_name", lambda: "a newer one")
    trained(Outcome(epochs(0.99)))
    assert call("--name a --seeds 2 --merge")[0] == 0
    runs = written(tmp_path)["runs"]
    assert [run["machine"]["cpu"] for run in runs] == [older["machine"]["cpu"], "a newer one"]


def test_without_a_seed_that_ends_there_is_no_mean(call, trained, tmp_path):
    trained(NAN)
    status, out, _ = call("--preset tiny --seeds 1")
    assert status == 0 and "no seed came to its end (seeds: 1, 1 of them" in out
    assert written(tmp_path)["test_accuracy"] == {"mean": None, "std": None}


def test_validation_needs_images_that_are_held_out(call, tmp_path):
    assert call("--preset tiny --validation -- --train-on-all")[0] == 2
    assert not list(tmp_path.iterdir())


def test_the_whole_command(call, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(trials, "SCRIPT", patched(tmp_path_factory.mktemp("script"), LIGHT))
    status, _, err = call(f"--name small --seeds 2 --jobs 2 -- {SMALL} --lr 1e-2")
    assert (status, err) == (0, "")
    result = written(tmp_path)
    first, second = result["runs"]
    assert first["test_accuracy"] != second["test_accuracy"] and first["training_seconds"] > 0
    assert result["settings"]["lr"] == 0.01 and result["parameters"] > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"results", "runs", "checkpoints"}
    again = call(f"--name small --seeds 2 -- {SMALL} --lr 1e-2")  # nothing is trained
    assert again[0] == 0 and written(tmp_path)["runs"] == result["runs"]
    assert written(tmp_path)["machine"] == result["machine"] and written(tmp_path)["jobs"] == 2
    status, _, err = call(f"--name small --seeds 2 -- {SMALL} --lr 2e-2")
    assert status == 2 and "of a run with --lr 0.01 and not 0.02" in err
    assert written(tmp_path)["arguments"][-1] == "1e-2"
