"""trials.py, with a stub in train_mamba.py's place that takes no time: what is run, and what is not again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import checkpoint
import trials
from errors import UserError
from trials import Trial, check, train

STUB = '''
import json, os, pathlib, signal, sys, time

def log(what):
    with open("log", "a") as file:
        file.write(f"{what} {name}\\n")

name = sys.argv[1:][[word.startswith("--run-name=") for word in sys.argv[1:]].index(True)].partition("=")[2]
resumed = "--resume" in sys.argv
stopped = []
deaf = name.startswith("deaf")
signal.signal(signal.SIGINT, lambda *_: log("deaf") if deaf else stopped.append(True))
log("resume" if resumed else "start")
if name.startswith("sees"):
    log(os.environ.get("CUDA_VISIBLE_DEVICES", "any"))
place = pathlib.Path("runs", name)
place.mkdir(parents=True, exist_ok=True)
os.makedirs("checkpoints", exist_ok=True)
last = pathlib.Path("checkpoints", f"{name}.last.pt")
last.write_bytes(pathlib.Path("begun.pt").read_bytes())
with open(place / "metrics.jsonl", "a") as file:
    if not resumed:
        file.write(json.dumps({"epoch": 1, "seconds": 1.5}) + "\\n")
if name.startswith("nan"):
    print("error: the loss is nan at step 7; lower it", file=sys.stderr)
    sys.exit(2)
if name.startswith("wrong"):
    print("error: no data; get some", file=sys.stderr)
    sys.exit(2)
if name.startswith("crash"):
    raise KeyError("a bug")
while (name.startswith("slow") and not resumed or deaf) and not stopped:
    time.sleep(0.02)
if stopped:
    log("saved")
    sys.exit(130)
time.sleep(0.3 if name.startswith("busy") else 0)
with open(place / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"epoch": 2, "seconds": 2.0, "val_accuracy": 0.5}) + "\\n")
last.write_bytes(pathlib.Path("done.pt").read_bytes())
log("end")
'''


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty current folder, where runs are the stub's."""
    for name, epoch in (("begun", 1), ("done", 2)):
        checkpoint.save(tmp_path / f"{name}.pt", {
            "architecture": "mamba", "config": {}, "model": {}, "dataset": {}, "epoch": epoch, "metrics": {},
            "settings": {"epochs": 2, "lr": 1e-3}})
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(trials, "SCRIPT", tmp_path / "stub.py")
    monkeypatch.setattr(trials, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(sys, "argv", ["tune_mamba.py", "--grid", "a b"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str, flags: tuple = ()) -> list[Trial]:
    return [Trial(name, ["--epochs=2", *flags]) for name in names]


def logged(place: Path) -> list[str]:
    """What the stub did since the last look."""
    path = place / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def run(found: list[Trial], jobs: int = 1) -> dict:
    return {trial.name: outcome for trial, outcome in train(found, len(found), jobs)}


def test_each_outcome_is_told_and_what_is_done_is_not_done_again(place):
    names = ("a", "nan", "wrong", "crash")
    outcomes = run(make(*names))
    assert logged(place) == ["start a", "end a", "start nan", "start wrong", "start crash"]
    assert outcomes["a"].metrics == {"epoch": 2, "seconds": 2.0, "val_accuracy": 0.5}
    assert outcomes["a"].seconds == 3.5 and outcomes["a"].failed is None
    assert outcomes["nan"].nan and outcomes["nan"].failed == "the loss is nan at step 7; lower it"
    assert outcomes["wrong"].failed == "no data; get some" and not outcomes["wrong"].nan
    reason = outcomes["crash"].failed
    assert "status 1" in reason and "KeyError: 'a bug'; see why" in reason and not outcomes["crash"].nan
    assert "train_mamba.py --epochs=2 --run-name=crash --resume" in reason

    again = run(make(*names))
    assert logged(place) == ["resume wrong", "resume crash"]
    assert (again["a"], again["nan"]) == (outcomes["a"], outcomes["nan"])


@pytest.mark.parametrize(("visible", "count", "seen"), [
    ("3,5", 2, {"3": 2, "5": 2}), ("4", 1, {"4": 4}), ("0,-1,1", 1, {"0": 4}), ("", 0, {"": 4}),
    (None, 2, {"0": 2, "1": 2}), (None, 0, {"any": 4})])
def test_runs_side_by_side_share_the_gpus(visible, count, seen, place, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    run(make(*(f"sees{number}" for number in range(4))), jobs=4)
    given = [line.rpartition(" ")[0] for line in logged(place)]
    assert {gpu: given.count(gpu) for gpu in set(given) - {"start", "end"}} == seen


def test_a_run_cut_short_goes_on(place):
    made, = make("a")
    (place / "checkpoints").mkdir()
    made.last.write_bytes((place / "begun.pt").read_bytes())
    made.folder.mkdir(parents=True)
    (made.folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 4.0}\n{"epo')
    assert made.outcome() is None and len(made.epochs()) == 1
    (made.folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 4.0}\n')  # RunLog does this
    assert run([made])["a"].seconds == 6.0
    assert logged(place) == ["resume a", "end a"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_run_at_once_and_the_next_is_asked_for_when_there_is_room(jobs, place):
    asked = []

    def ask():
        for made in make("busy1", "busy2", "busy3", "busy4"):
            asked.append(len(asked) - len(told))
            yield made

    told = []
    for _ in train(ask(), 4, jobs):
        told.append(True)
    running, most = 0, 0
    for line in logged(place):
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    assert most == jobs and max(asked) == jobs - 1


def when(condition, action) -> threading.Thread:
    """Does something as soon as something else is so; the thread to be joined."""
    def wait() -> None:
        limit = time.monotonic() + 60
        while not condition() and time.monotonic() < limit:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_every_run_and_says_how_to_go_on(number, place, capsys):
    made = make("a", "slow1", "slow2", "b")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = when(lambda: {"start slow1", "start slow2"} <= set((place / "log").read_text().splitlines()
                                                               if (place / "log").exists() else []),
                  lambda: os.kill(os.getpid(), number))
    outcomes = {}
    with pytest.raises(SystemExit, match="130"):
        for trial, outcome in train(made, 4, 2):
            outcomes[trial.name] = outcome
    thread.join()
    assert list(outcomes) == ["a"]
    lines = logged(place)
    assert {"saved slow1", "saved slow2"} <= set(lines) and "start b" not in lines
    assert capsys.readouterr().out == "stopped; go on with: python tune_mamba.py --grid 'a b'\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    assert set(run(make("a", "slow1", "slow2", "b"), 2)) == {"a", "slow1", "slow2", "b"}
    assert {"resume slow1", "resume slow2", "start b"} <= set(logged(place))


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_second_ctrl_c_ends_at_once(place):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        when(lambda: "deaf deaf" in (place / "log").read_text(), lambda: os.kill(os.getpid(), signal.SIGINT))

    thread = when(lambda: (place / "log").exists() and "start deaf" in (place / "log").read_text(), twice)
    with pytest.raises(KeyboardInterrupt):
        run(make("deaf"))
    thread.join()
    assert logged(place) == ["start deaf", "deaf deaf"]


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_who_stops_listening_stops_the_runs(place):
    outcomes = train(make("slow", "a"), 2, 2)
    assert next(outcomes)[0].name == "a"
    while "start slow" not in (place / "log").read_text():
        time.sleep(0.02)
    outcomes.close()
    assert logged(place)[-1] == "saved slow"


@pytest.mark.parametrize(("name", "flags", "says"), [
    ("a" * 300, (), "choose a shorter --name"), ("../a", (), "cannot name a run"),
    ("a", ("--lr=2e-3",), "of a run with --lr 0.001 and not 0.002; choose another --name")])
def test_names_that_cannot_be_are_refused_before_anything_runs(name, flags, says, place):
    run(make("a"))
    check(make("a"))
    with pytest.raises(UserError, match=says):
        check(make(name, flags=flags))


def test_epochs_that_are_not_where_they_should_be_are_missed(place):
    run(make("a"))
    with pytest.raises(UserError, match="give the --runs-dir"):
        check(make("a", flags=("--runs-dir=elsewhere",)))
