"""tune_mamba.py: its grid, what is ranked and written; a stub tells outcomes, but for one whole command."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trials
import tune_mamba
from errors import UserError
from flags import as_flags, explicit, parse_arguments
from tests.commands import LIGHT, patched
from trials import Outcome

SMALL = "--dataset digits --epochs 1 --limit-train 64 --d-model 16 --num-blocks 1 --d-state 4 --device cpu"


@pytest.fixture
def call(command):
    """call("--grid lr=1,2 ...") → status, stdout and stderr, in an empty folder."""
    return lambda arguments: command(tune_mamba, *shlex.split(arguments))


@pytest.fixture
def trained(monkeypatch) -> list[dict]:
    """Trials come to an end that follows from their rate alone; the settings of each, in order."""
    found = []

    def train(trials, total, jobs):
        for trial in trials:
            found.append(vars(trial.settings))
            rate = trial.settings.lr
            yield trial, (Outcome([], "the loss is nan at step 1; lower it", nan=True) if rate > 1 else
                          Outcome([{"epoch": 1, "seconds": 2.0, "train_loss": 1.0, "val_loss": 10 * rate,
                                    "val_accuracy": 1 - abs(rate - 0.3), "test_accuracy": rate}]))

    monkeypatch.setattr(tune_mamba, "train", train)
    return found


def sweep(place: Path, name: str = "sweep") -> dict:
    return json.loads((place / "runs" / name / "sweep.json").read_text())


def test_every_combination_is_trained_and_the_best_on_validation_comes_first(call, trained, tmp_path):
    status, out, err = call("--grid lr=0.1,0.25,9 weight-decay=0,0.05 --name a "
                            "-- --scan row --seed 3 --hold-out 500")
    assert (status, err) == (0, "")
    assert [(found["lr"], found["weight_decay"]) for found in trained] == [
        (0.1, 0), (0.1, 0.05), (0.25, 0), (0.25, 0.05), (9, 0), (9, 0.05)]
    assert all(found["seed"] == 3 and found["scan"] == "row" for found in trained)
    assert [found["run_name"] for found in trained][:2] == ["a-lr=0.1,weight_decay=0.0",
                                                             "a-lr=0.1,weight_decay=0.05"]
    written = sweep(tmp_path, "a")
    assert [row["lr"] for row in written["trials"]] == [0.25, 0.25, 0.1, 0.1, 9, 9]
    accuracies = [row["val_accuracy"] for row in written["trials"]]
    assert accuracies[:4] == pytest.approx([0.95, 0.95, 0.8, 0.8]) and accuracies[4:] == [None, None]
    assert written["trials"][-1]["failed"] == "the loss is nan at step 1; lower it"
    assert written["grid"] == {"lr": [0.1, 0.25, 9], "weight_decay": [0, 0.05]}
    assert written["arguments"] == ["--scan", "row", "--seed", "3", "--hold-out", "500"]
    with (tmp_path / "runs" / "a" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [row["trial"] for row in written["trials"]]
    table = out.splitlines()[6:]
    assert table[0].split() == ["validation", "loss", "seconds", "lr", "weight_decay"]
    assert table[1].split() == ["95.00%", "2.5000", "2", "0.25", "0.0"]
    assert table[6].endswith("the loss is nan at step 1")
    again = table[-1].partition("python train_mamba.py ")[2]
    assert explicit(shlex.split(again)) == {"scan": "row", "seed": 3, "lr": 0.25, "weight_decay": 0,
                                            "train_on_all": True}
    assert "test" not in out + json.dumps(written)


def test_where_every_trial_fails_the_command_does_too(call, trained, tmp_path):
    status, _, err = call("--grid lr=8,9")
    assert status == 2 and "no trial came to its end; sweep-lr=8.0: the loss is nan" in err
    assert len(sweep(tmp_path)["trials"]) == 2


def test_the_folder_of_a_run_is_left_alone(call, trained, tmp_path):
    (tmp_path / "runs" / "sweep").mkdir(parents=True)
    (tmp_path / "runs" / "sweep" / "metrics.jsonl").write_text("")
    assert call("--grid lr=1")[2] == "error: runs/sweep is a run's; choose another --name\n"


def test_optuna_chooses_from_the_grid_and_goes_on_where_it_was(call, trained, tmp_path):
    pytest.importorskip("optuna")
    command = "--grid lr=0.1,0.2,0.3,0.4,9 scan=row,raster,cross image_size=28,32x28 --trials"
    status, _, err = call(f"{command} 4")
    assert (status, err) == (0, "")
    first = list(trained)
    assert len(first) == 4 and {found["lr"] for found in first} <= {0.1, 0.2, 0.3, 0.4, 9}
    assert {found["image_size"] for found in first} <= {(28, 28), (32, 28)}
    assert call(f"{command} 12")[0] == 0
    assert trained[4:8] == first and len(trained) == 4 + 12  # trials.train would find the first ones done
    names = [row["trial"] for row in sweep(tmp_path)["trials"]]
    assert names[0].startswith("sweep-image_size=") and set(names) == {found["run_name"] for found in trained}
    status, _, err = call("--grid lr=0.1,0.2 scan=row image_size=28 --trials 4")
    assert status == 2 and "optuna.log is of another grid; choose another --name" in err


def test_a_trial_that_was_cut_short_is_told_to_optuna_later(call, trained, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")

    def states() -> list[str]:
        journal = optuna.storages.journal.JournalFileBackend("runs/sweep/optuna.log")
        study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))
        return [asked.state.name for asked in study.trials]

    def cut_short(trials, total, jobs):
        yield from ()
        next(iter(trials))
        sys.exit(130)

    with monkeypatch.context() as patch:
        patch.setattr(tune_mamba, "train", cut_short)
        assert call("--grid lr=0.1,9 --trials 2")[0] == 130
    assert states() == ["RUNNING"]
    assert call("--grid lr=0.1,9 --trials 6")[0] == 0
    assert len(trained) == 6 and set(states()) == {"COMPLETE", "FAIL"}


def test_without_optuna_a_line_says_how_to_get_it(call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    status, _, err = call("--grid lr=1 --trials 2")
    assert (status, err) == (2, "error: --trials needs Optuna, which is not installed; pip install optuna\n")
    assert not list(tmp_path.iterdir())


NAMES = sorted(vars(parse_arguments([])))
VALUES = st.sampled_from(["", "1", "2", "1e-3", "0.001", "0.5", "true", "false", "row", "nan", "-1", "64x96",
                          "none", "elastic", "300s", "tiny", "9" * 5000, "٣"])
WORDS = st.one_of(st.text(max_size=20), st.builds(
    lambda name, values: f"{name}={','.join(values)}",
    st.one_of(st.sampled_from([*NAMES, "help", "no-flip", "weight-decay"]), st.text(max_size=8)),
    st.lists(st.one_of(VALUES, st.text(max_size=8)), max_size=3)))


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3))
@example(["lr=1e-3,2e-3", "bidirectional=true,false", "image-size=64,64x96", "augment=none,elastic"])
@example(["help=true"])
@example(["no_augment=true"])
@example(["augment=false,none"])
def test_any_text_is_a_grid_or_refused_in_one_line(words):
    try:
        grid = tune_mamba.parse_grid(words)
    except UserError as error:
        assert ";" in str(error)
        return
    assert len(grid) == len(words)
    for name, values in grid.items():
        assert values and all(explicit(as_flags({name: value})) == {name: value} for value in values)
    typed = [f"{name}={','.join(map(tune_mamba.in_words, values))}" for name, values in grid.items()]
    assert tune_mamba.parse_grid(typed) == grid


def test_the_whole_command_is_not_done_twice_and_its_settings_are_in_tensorboard(call, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "SCRIPT", patched(tmp_path, LIGHT))
    command = f"--grid lr=1e-2,1e30 --jobs 2 -- {SMALL} --warm-up 0"
    status, out, err = call(command)
    assert (status, err) == (0, "")
    good, bad = sweep(tmp_path)["trials"]
    assert good["trial"] == "sweep-lr=0.01" and 0 < good["val_accuracy"] < 1 and good["failed"] is None
    assert bad["failed"].startswith("the loss is nan at step 1 with learning rate 1e+30")
    assert (tmp_path / "runs" / bad["trial"] / "nan.txt").is_file(), "so that it is not tried again"
    events = EventAccumulator(str(tmp_path / "runs" / good["trial"])).Reload()
    hparams = b"".join(bytes(content) for content in events.PluginTagToContent("hparams").values())
    assert b"weight_decay" in hparams and b"final/val_accuracy" in hparams
    assert events.Scalars("final/val_accuracy")[0].value == pytest.approx(good["val_accuracy"])

    monkeypatch.setattr(trials, "SCRIPT", tmp_path / "absent.py")
    status, again, _ = call(command)
    assert status == 0 and sorted(again.splitlines()) == sorted(out.splitlines())
    assert sweep(tmp_path)["trials"] == [good, bad]
    status, _, err = call(f"--grid lr=1e-2,1e30 --trials 1 -- {SMALL} --warm-up 0")
    assert status == 2 and ("is of every combination" in err or "needs Optuna" in err)
    status, _, err = call(f"--grid lr=1e-2 -- {SMALL} --warm-up 1")
    assert status == 2 and "of a run with --warm-up 0 and not 1; choose another --name" in err
