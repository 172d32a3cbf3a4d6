"""train_mamba.py: called as a user calls it, stopped and resumed, and called wrongly."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import captured
import checkpoint
import data
import demo_mamba
import evaluate
import explain
import mnist
import train_mamba
from errors import UserError
from flags import MAY_CHANGE_ON_RESUME, argument_parser
from mamba_ssm_simple import VisionMamba2
from run_log import RunLog, claim
from tests.commands import Ended, patched
from training import Training

ROOT = Path(__file__).parent.parent
SMALL = shlex.split("--dataset digits --epochs 2 --batch-size 32 --lr 1e-2 --d-model 32 --num-blocks 2 "
                    "--d-state 4 --device cpu --no-draw")
STEPS = 38  # an epoch: 1,200 images in batches of 32
IMAGES = 1200
SPEED = {"seconds", "evaluation_seconds", "images_per_second"}


@pytest.fixture
def train(command):
    """Runs the script in this process and in an empty folder: train(*arguments) → status, stdout, stderr."""
    return functools.partial(command, train_mamba)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder where a run named `run` was trained without interruption, by the command itself."""
    place = tmp_path_factory.mktemp("whole")
    command = [sys.executable, ROOT / "train_mamba.py", *SMALL, "--draw", "--run-name", "run"]
    done = subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8", timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 2/2" in done.stdout
    assert done.stdout.endswith("python demo_mamba.py --checkpoint checkpoints/run.pt\n".replace("/", os.sep))
    return place


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def read_metrics(place: Path, run: str = "run") -> list[dict]:
    return [json.loads(line) for line in (place / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def read_events(place: Path, run: str = "run") -> EventAccumulator:
    return EventAccumulator(str(place / "runs" / run), size_guidance={"scalars": 0, "images": 0}).Reload()


def read_scalars(place: Path) -> dict[tuple[str, int], float]:
    events = read_events(place)
    tags = set(events.Tags()["scalars"]) - {"speed/images_per_second"}
    points = [((tag, event.step), event.value) for tag in tags for event in events.Scalars(tag)]
    assert len(dict(points)) == len(points), "a point was logged twice"
    return dict(points)


def assert_same(a: object, b: object, where: str) -> None:
    """The same values in dictionaries and lists of the same form; tensors to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - SPEED:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_run(place: Path, whole: Path) -> None:
    """`place` holds the weights, states and metrics of `whole`."""
    for name in ("run.pt", "run.last.pt"):
        ours, theirs = (checkpoint.load(folder / "checkpoints" / name) for folder in (place, whole))
        for contents in (ours, theirs):  # what may differ between them, and what tells them apart
            del contents["run_id"]
            contents["settings"] = {key: value for key, value in contents["settings"].items()
                                    if key not in MAY_CHANGE_ON_RESUME}
        assert_same(ours, theirs, name)
    assert_same(read_metrics(place), read_metrics(whole), "metrics.jsonl")


# ---- What a run leaves


def test_a_run_learns_and_writes_its_metrics(whole):
    first, second = read_metrics(whole)
    assert first["epoch"] == 1 and second["epoch"] == 2
    for metrics in (first, second):
        assert set(metrics) == {"epoch", "train_loss", "train_accuracy", "learning_rate", "val_loss",
                                "val_accuracy", "test_accuracy", *SPEED}
        assert all(0 <= metrics[f"{split}_accuracy"] <= 1 for split in ("train", "val", "test"))
        assert metrics["seconds"] * metrics["images_per_second"] == pytest.approx(IMAGES)
    assert second["train_loss"] < 0.7 * first["train_loss"]
    assert second["learning_rate"] < first["learning_rate"] <= 1e-2
    assert second["test_accuracy"] > 0.7 and second["val_accuracy"] > 0.7  # chance is 0.1


def test_tensorboard_has_every_curve_and_picture(whole):
    events = read_events(whole)
    tags = events.Tags()
    assert set(tags["scalars"]) >= {
        "train/loss", "train/learning_rate", "train/gradient_norm", "val/loss", "speed/images_per_second",
        "accuracy/train", "accuracy/val", "accuracy/test", *(f"class_accuracy/{name}" for name in range(10))}
    assert set(tags["images"]) == {"test/confusion", "test/mistakes", "scan/delta", "scan/memory",
                                   "scan/memory_reach"}
    assert set(tags["histograms"]) == {"log10_delta/block 1 →", "log10_delta/block 2 ↓"}
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 38, 40, 50, 60, 70, 76]
    assert all(event.value > 0 for event in events.Scalars("train/gradient_norm"))
    assert all(event.value > 0 for event in events.Scalars("speed/images_per_second"))
    # What TensorBoard's HParams tab reads; the plugin's data are protocol buffers with the names in them.
    hparams = {name: bytes(content) for name, content in events.PluginTagToContent("hparams").items()}
    assert any(b"batch_size" in content and b"d_model" in content for content in hparams.values())
    accuracy = events.Scalars("final/test_accuracy")[-1].value
    assert accuracy == pytest.approx(read_metrics(whole)[-1]["test_accuracy"], abs=1e-6)


def test_checkpoints_are_what_checkpoint_py_documents(whole):
    folder = whole / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"run.pt", "run.last.pt", "run.last.pt.previous"}
    contents = torch.load(folder / "run.pt", weights_only=True)
    assert set(contents) == {*checkpoint.REQUIRED, "run_id"}
    assert contents["format"] == 2 and contents["architecture"] == "mamba"
    assert set(contents["dataset"]) == {"name", "classes", "mean", "std", "shape"}
    assert contents["dataset"]["name"] == "digits" and contents["dataset"]["classes"] == list("0123456789")
    assert contents["settings"]["run_name"] == "run" and contents["settings"]["lr"] == 1e-2
    last = torch.load(folder / "run.last.pt", weights_only=True)
    assert set(last) == {*checkpoint.REQUIRED, "run_id", "optimizer", "scaler", "rng", "augmentation",
                         "averaged", "step", "best_accuracy", "sums", "images", "seconds"}
    assert last["epoch"] == 2 and last["step"] == 2 * STEPS and last["metrics"] == read_metrics(whole)[-1]


def test_the_best_checkpoint_has_the_accuracy_that_it_tells(whole):
    contents = checkpoint.load(whole / "checkpoints" / "run.pt")
    best = max(read_metrics(whole), key=lambda metrics: metrics["val_accuracy"])
    assert contents["epoch"] == best["epoch"] and contents["metrics"] == best
    model, dataset = evaluate.rebuild(contents, "cpu"), data.load("digits", "unused")
    for split, name in ((dataset.val, "val_accuracy"), (dataset.test, "test_accuracy")):
        probabilities = evaluate.predict(model, split, dataset, "cpu")
        assert evaluate.accuracy(probabilities, split.labels) == best[name]


def test_recording_deltas_changes_nothing():
    model = VisionMamba2(d_model=8, num_blocks=2, d_state=2, patch_size=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scans = explain.record(model, torch.randn(3, 1, 8, 8))
    assert_same(dict(model.state_dict()), before, "model")
    assert model.training and all((scan.delta > 0).all() for scan in scans)
    assert all(scan.delta.shape == (3, 16, 16) for scan in scans)
    assert len(scans) == 2


def test_the_demo_shows_it(whole, command, monkeypatch):
    monkeypatch.chdir(whole)
    monkeypatch.setattr(evaluate, "SECONDS", 0.01)
    done = command(demo_mamba, "--device", "cpu")
    assert (done.status, done.err) == (0, "")
    best = max(read_metrics(whole), key=lambda metrics: metrics["val_accuracy"])
    assert done.out.startswith(f"test accuracy {100 * best['test_accuracy']:.2f}%")
    report = json.loads((whole / "runs" / "run" / "demo" / "report.json").read_text())
    assert report["test"]["accuracy"] == pytest.approx(best["test_accuracy"])


def test_the_same_seed_gives_the_same_weights_and_curves_whether_pictures_are_drawn(train, tmp_path, whole):
    assert train(*SMALL, "--run-name", "run").status == 0
    assert_same_run(tmp_path, whole)
    tags = read_events(tmp_path).Tags()
    assert tags["images"] == tags["histograms"] == []


def test_another_seed_gives_others(train, tmp_path):
    few = [*SMALL, "--epochs", 1, "--limit-train", 64, "--run-name"]
    assert train(*few, "a").status == train(*few, "b", "--seed", 1).status == 0
    a, b = (checkpoint.load(tmp_path / "checkpoints" / f"{name}.pt")["model"] for name in "ab")
    assert not torch.equal(a["head.weight"], b["head.weight"])


DRAWN = [  # those whose pictures for TensorBoard are of a kind of their own
    ["--model", "lstm", "--bidirectional"], ["--scan", "row", "--bidirectional"],
    ["--scan", "raster", "--patch-size", "1", "--permute-seed", "3"],
    ["--patch-size", "4", "--d-model", "2"]]


@pytest.mark.parametrize("options", [
    *DRAWN, ["--model", "transformer"], ["--amp", "bf16"], ["--amp", "fp16", "--ema", "0.9"],
    ["--augment", "elastic", "--augment-strength", "1.5", "--erase", "0.5", "--drop-path", "0.3"],
    ["--warm-up", "0", "--augment", "affine", "--no-augment"],
    ["--batch-size", "1000", "--no-augment"], ["--limit-train", "1"],
    ["--position-conv", "--gradient-checkpointing"], ["--d-conv", "9"],
], ids=" ".join)
def test_every_kind_of_run_trains(options, train, tmp_path):
    drawn = "--draw" if options in DRAWN else "--no-draw"
    done = train(*SMALL, drawn, "--epochs", 1, "--limit-train", 65, "--run-name", "run", *options)
    assert (done.status, done.err) == (0, "")
    assert all(math.isfinite(value) for value in read_metrics(tmp_path)[0].values())


# ---- Stopping and going on


# Step 20 waits for the end of stdin, so that the epoch is not over before the Ctrl-C comes.
HELD = """
from training import Training

step = Training.train_step

def held(training, *batch):
    if training.step == 20:
        sys.stdin.read()
    return step(training, *batch)

Training.train_step = held
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
def test_ctrl_c_and_resume_as_a_user_does_it(train, whole, tmp_path):
    command = [sys.executable, patched(tmp_path, HELD), *SMALL, "--run-name", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8") as process:
        head = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert head.startswith("run: digits, 1,200 training images") and process.returncode == 130
    assert "Traceback" not in err and err.strip().startswith("stopping as soon as")
    assert out == "stopped in epoch 1; go on with: python train_mamba.py --resume checkpoints/run.last.pt\n"
    assert checkpoint.load(tmp_path / "checkpoints" / "run.last.pt")["step"] < STEPS

    older = tmp_path / "checkpoints" / "older.last.pt"
    shutil.copy(whole / "checkpoints" / "run.last.pt", older)
    os.utime(older, (0, 0))
    done = train("--resume")  # here, in a process that knows nothing of the one that was stopped
    assert (done.status, done.err) == (0, "")
    assert_same_run(tmp_path, whole)


def interrupt_step(patch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    """Ctrl-C, once or twice, while step `number` of the run is computed."""
    step = Training.train_step

    def train_step(training: Training, *batch):
        result = step(training, *batch)
        for _ in range(times if training.step == number else 0):
            signal.raise_signal(signal.SIGINT)
        return result
    patch.setattr(Training, "train_step", train_step)


def interrupt_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the model is evaluated."""
    predict = evaluate.predict

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        patch.setattr(evaluate, "predict", predict)
        return predict(*arguments)
    patch.setattr(evaluate, "predict", interrupted)


@pytest.mark.parametrize(("interrupt", "line", "steps"), [
    pytest.param(lambda patch: interrupt_step(patch, STEPS + 7), "stopped in epoch 2", STEPS + 7,
                 id="mid-epoch"),
    pytest.param(lambda patch: interrupt_step(patch, STEPS), "stopped after epoch 1", STEPS, id="last step"),
    pytest.param(interrupt_evaluation, "stopped after epoch 1", STEPS, id="evaluation"),
    pytest.param(lambda patch: interrupt_step(patch, STEPS + 15, times=2), "", STEPS, id="at once"),
])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(interrupt, line, steps, train, tmp_path, whole):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        done = train(*SMALL, "--run-name", "run", "--runs-dir", "logs")
    assert done.status == 130 and "Traceback" not in done.err
    assert done.out.splitlines()[-1].startswith(line or "epoch 1/2")
    assert line or done.err.endswith("interrupted\n")
    assert checkpoint.load(tmp_path / "checkpoints" / "run.last.pt")["step"] == steps

    with (tmp_path / "logs" / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_l')  # as a kill may leave it
    command = done.out.splitlines()[-1].partition("train_mamba.py ")[2] if line else "--resume"
    done = train(*shlex.split(command))
    assert (done.status, done.err) == (0, "") and done.out.endswith(" --runs-dir logs\n")
    shutil.move(tmp_path / "logs", tmp_path / "runs")
    assert_same_run(tmp_path, whole)
    assert read_metrics(tmp_path)[1]["images_per_second"] * read_metrics(tmp_path)[1]["seconds"] == \
        pytest.approx(IMAGES)
    ours, theirs = read_scalars(tmp_path), read_scalars(whole)
    assert {point: ours[point] for point in theirs} == theirs
    assert {step for _, step in ours.keys() - theirs.keys()} <= {steps}, "where it stopped may be logged, too"


def test_a_run_goes_on_after_the_checkpoint_before_its_last_was_gone_on_with(train, tmp_path, whole):
    before = ["--resume", "checkpoints/run.last.pt.previous"]
    for at, times, arguments in ((STEPS + 7, 1, [*SMALL, "--run-name", "run"]), (STEPS + 9, 2, before)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_step(patch, at, times=times)
            assert train(*arguments).status == 130
    assert train("--resume").status == 0
    assert_same_run(tmp_path, whole)


def test_a_stopped_run_goes_on_where_its_checkpoint_lies_and_counts_its_seconds(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, 3)
        assert train(*SMALL, "--epochs", 1, "--run-name", "run").status == 130
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    path = tmp_path / "moved" / "run.last.pt"
    contents = checkpoint.load(path)
    assert contents["seconds"] > 0
    checkpoint.save(path, {**contents, "seconds": 1000.0})  # as if the first steps had taken that long
    assert train("--resume", path).status == 0
    assert {path.name for path in (tmp_path / "moved").iterdir()} == {"run.pt", "run.last.pt",
                                                                      "run.last.pt.previous"}
    metrics, = read_metrics(tmp_path)
    assert metrics["seconds"] > 1000 and metrics["images_per_second"] < 2


def test_a_resumed_run_whose_best_is_gone_keeps_a_best_again(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, STEPS + 3)
        assert train(*SMALL, "--lr", 1e-9, "--epochs", 3, "--run-name", "run").status == 130
    path = tmp_path / "checkpoints" / "run.last.pt"
    checkpoint.save(path, {**checkpoint.load(path), "best_accuracy": 1.0})  # no epoch to come will be better
    (tmp_path / "checkpoints" / "run.pt").unlink()
    done = train("--resume")
    assert done.status == 0 and "run.pt is gone; the best model is sought anew" in done.out
    left = checkpoint.load(tmp_path / "checkpoints" / "run.pt")
    assert left["metrics"]["val_accuracy"] == max(line["val_accuracy"] for line in read_metrics(tmp_path)[1:])
    (tmp_path / "checkpoints" / "run.pt").unlink()
    assert str(Path("checkpoints") / "run.last.pt") in train("--resume").out, "what there is to see"


CLAIMING = """
import pathlib, sys

from run_log import claim

with claim(pathlib.Path("runs/run"), pathlib.Path("run.last.pt"), new=False):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_trains_is_left_alone(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, 3)
        assert train(*SMALL, "--run-name", "run").status == 130
    for path in (tmp_path / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    with subprocess.Popen([sys.executable, "-c", CLAIMING], cwd=tmp_path, stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline() == "claimed\n"
        before = snapshot(tmp_path)
        for runs in ("runs", "others"):
            done = train("--resume", "run.last.pt", "--checkpoints-dir", tmp_path, "--runs-dir", runs)
            assert_refused(done, "another process trains run now", tmp_path, before)
        other.kill()
    assert train("--resume", "run.last.pt", "--checkpoints-dir", tmp_path).status == 0


def test_what_a_kill_before_the_first_checkpoint_leaves_is_in_nobodys_way(train, tmp_path):
    begun = tmp_path / "runs" / "run", tmp_path / "checkpoints" / "run.last.pt", True
    with claim(*begun):
        pass
    assert train(*SMALL, "--epochs", 1, "--limit-train", 64, "--run-name", "run").status == 0
    with pytest.raises(UserError, match="choose another --run-name"), claim(*begun):
        pass


def test_a_file_system_without_locks_is_trained_on_all_the_same(train, monkeypatch):
    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    assert train(*SMALL, "--epochs", 1, "--limit-train", 64, "--run-name", "run").status == 0


def test_a_run_that_went_on_while_another_process_read_its_checkpoint_is_left_alone(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, 3)
        assert train(*SMALL, "--epochs", 1, "--run-name", "run").status == 130
    path, load = tmp_path / "checkpoints" / "run.last.pt", data.load
    with pytest.MonkeyPatch.context() as patch:
        def meanwhile(*arguments, **options) -> data.Dataset:
            checkpoint.save(path, {**checkpoint.load(path), "step": 5})
            return load(*arguments, **options)

        patch.setattr(data, "load", meanwhile)
        done = train("--resume")
    assert done.status == 2 and "give --resume once more" in done.err
    assert checkpoint.load(path)["step"] == 5


def test_ctrl_c_in_the_last_evaluation_changes_nothing(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_evaluation(patch)
        done = train(*SMALL, "--epochs", 1, "--limit-train", 64, "--run-name", "run")
    assert done.status == 0 and "best on validation" in done.out


def test_ctrl_c_before_training_is_one_line_and_writes_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert train(*SMALL) == (130, "", "interrupted\n")
    assert not snapshot(tmp_path)


AVERAGED = ["--epochs", 3, "--limit-train", 200, "--train-on-all", "--ema", 0.9, "--augment", "elastic",
            "--mean-teacher", 0.5, "--drop-path", 0.2]


def test_the_average_is_resumed_to_the_bit_and_the_test_set_waits_for_the_last_epoch(train, tmp_path):
    assert train(*SMALL, *AVERAGED, "--run-name", "whole").status == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, 9)
        assert train(*SMALL, *AVERAGED, "--run-name", "cut").status == 130
    done = train("--resume", "checkpoints/cut.last.pt")
    assert done.status == 0 and "last epoch: " in done.out and "validation" not in done.out
    whole, cut = ({name: checkpoint.load(tmp_path / "checkpoints" / f"{run}{name}")
                   for name in (".pt", ".last.pt")} for run in ("whole", "cut"))
    assert_same(whole[".pt"]["model"], cut[".pt"]["model"], "model")
    assert_same(whole[".pt"]["model"], whole[".last.pt"]["averaged"], "average")
    assert not torch.equal(whole[".pt"]["model"]["head.weight"], whole[".last.pt"]["model"]["head.weight"])
    for run in ("whole", "cut"):
        first, second, third = read_metrics(tmp_path, run)
        assert first["val_accuracy"] is third["val_accuracy"] is third["val_loss"] is None
        assert first["test_accuracy"] is second["test_accuracy"] is None and third["test_accuracy"] > 0.1
    assert whole[".pt"]["epoch"] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("number", [2, STEPS, STEPS + 20], ids="step {}".format)
def test_a_captured_run_is_resumed_to_the_bit(number, train, tmp_path, monkeypatch):
    """In bf16: stopped before the capture, after an epoch's smaller last batch, and between replays."""
    settings = [*SMALL, "--device", "cuda", "--amp", "bf16", "--augment", "elastic", "--erase", 0.25,
                "--drop-path", 0.2, "--ema", 0.9, "--mean-teacher", 0.5, "--run-name", "run"]
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    folders = ["--runs-dir", "whole/runs", "--checkpoints-dir", "whole/checkpoints"]
    assert train(*settings, *folders).status == 0
    assert len(replays) == 2 * STEPS - captured.WARM_UP - 1, "but for the first smaller batch, every step was"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, number)
        assert train(*settings).status == 130
    assert checkpoint.load(tmp_path / "checkpoints" / "run.last.pt")["step"] == number
    done = train("--resume")
    assert (done.status, done.err) == (0, "")
    assert_same_run(tmp_path, tmp_path / "whole")
    ours, theirs = read_scalars(tmp_path), read_scalars(tmp_path / "whole")
    assert {point: ours[point] for point in theirs} == theirs


def test_a_finished_run_is_not_trained_again(train, whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = snapshot(whole)
    for arguments in (["--resume"], ["--resume", "checkpoints/run.last.pt", "--lr", "1e-2"]):
        done = train(*arguments)
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith("run has finished its 2 epochs; see it with") and done.out.count("\n") == 1
    assert train("--resume", "--runs-dir", "lo gs").out.endswith(" --runs-dir 'lo gs'\n"), "for the demo, too"
    assert snapshot(whole) == before


def test_a_log_goes_on_after_the_last_whole_epoch(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    with RunLog(tmp_path, first_epoch=2, first_step=20, run_id="a"):
        assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


# ---- Wrong commands


def assert_refused(done: Ended, says: str, place: Path, before: dict) -> None:
    """Status 2, one line on stderr that says what is wrong, and nothing written."""
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert says in done.err
    assert snapshot(place) == before


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
NO_MPS = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.parametrize(("arguments", "says"), [
    ("--epochs 0", "--epochs: must be a whole number from 1"),
    ("--epochs -3", "--epochs"),
    ("--epochs 1.5", "--epochs"),
    ("--epochs many", "'many'"),
    ("--epochs " + "9" * 400, "--epochs"),
    ("--epochs", "--epochs: expected one argument"),
    ("--epoch 3", "unrecognized arguments"),
    ("--batch-size 0", "--batch-size"),
    ("--lr 0", "--lr: must be a number above 0"),
    ("--lr -1e-3", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr"),
    ("--lr fast", "--lr"),
    ("--weight-decay -0.1", "--weight-decay: must be a number from 0 on"),
    ("--weight-decay nan", "--weight-decay"),
    ("--d-model 0", "--d-model"),
    ("--d-model 1000000000", "lower --d-model"),
    ("--num-blocks 0", "--num-blocks"),
    ("--d-state 0", "--d-state"),
    ("--patch-size 0", "--patch-size"),
    ("--patch-size 3", "--patch-size: must be a power of two"),
    ("--patch-size 8", "one token"),
    ("--patch-size 4 --d-model 1", "use at least 2"),
    ("--model perceptron", "--model: invalid choice"),
    ("--scan spiral", "--scan: invalid choice"),
    ("--preset huge", "--preset: invalid choice"),
    ("--permute-seed -1", "--permute-seed"),
    ("--device toaster", "--device: invalid choice"),
    pytest.param("--device cuda", "use --device cpu", marks=NO_CUDA),
    pytest.param("--device mps", "use --device cpu", marks=NO_MPS),
    ("--amp fp8", "--amp: invalid choice"),
    ("--seed -1", "--seed"),
    ("--seed 4294967296", "--seed"),
    ("--limit-train 0", "--limit-train"),
    *((f"--checkpoint-every {wrong}", "--checkpoint-every: must be steps, such as 500, or seconds")
      for wrong in ("0", "0s", "-5", "5m", "s", "1.5s", "1000000000", "٣")),
    ("--dataset cats", "--dataset: invalid choice"),
    ("--augment shake", "--augment: invalid choice"),
    ("--augment-strength -1", "--augment-strength"),
    ("--mean-teacher 1.1 --ema 0.9", "--mean-teacher: must be a number from 0 to 1"),
    ("--dataset digits --mean-teacher 0.5", "add --ema"),
    ("--hold-out 0", "--hold-out: must be a whole number from 1"),
    ("--hold-out 5 --train-on-all", "leave it out, or --hold-out"),
    ("--hold-out 1437", "leaves none to train on; lower it"),
    ("--erase 1", "--erase: must be a number from 0 to below 1"),
    ("--ema 1", "--ema"),
    ("--drop-path 2", "--drop-path"),
    ("--warm-up -1", "--warm-up: must be a whole number from 0"),
    ("--dataset mnist --data-dir wrong", "has the wrong checksum"),
    ("--dataset mnist --data-dir file", "choose another data folder"),
    ("--run-name ''", "--run-name ''"),
    ("--run-name ..", "--run-name '..'"),
    ("--run-name a/b", "--run-name 'a/b'"),
    ("--run-name ../a", "--run-name '../a'"),
    ("--run-name " + "a" * 300, "--run-name"),
    ("--runs-dir file", "choose another --runs-dir"),
    ("--runs-dir file/below", "choose another --runs-dir"),
    ("--checkpoints-dir file", "choose another --checkpoints-dir"),
    pytest.param("--runs-dir /proc/below", "choose another --runs-dir", marks=LINUX),
    pytest.param("--checkpoints-dir /proc/below", "choose another --checkpoints-dir", marks=LINUX),
    ("--resume", "no .last.pt checkpoint in checkpoints"),
    ("--resume nowhere.last.pt", "no checkpoint at nowhere.last.pt"),
    ("--resume wrong", "no checkpoint at wrong"),
    ("--resume file", "is not a checkpoint"),
    ("--winds north", "unrecognized arguments: --winds"),
    ("north", "unrecognized arguments: north"),
])
def test_a_wrong_command_is_one_line_and_writes_nothing(arguments, says, train, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "wrong" / "MNIST" / "raw").mkdir(parents=True)
    for name in mnist.MNIST_MD5:
        (tmp_path / "wrong" / "MNIST" / "raw" / name).write_text("not MNIST")
    before = snapshot(tmp_path)
    assert_refused(train(*SMALL, *shlex.split(arguments)) if "--resume" not in arguments else
                   train(*shlex.split(arguments)), says, tmp_path, before)


@pytest.mark.parametrize("there", ["runs/run", "checkpoints/run.pt", "checkpoints/run.last.pt",
                                   "checkpoints/run.last.pt.previous"])
def test_nothing_of_another_run_is_overwritten(there, train, tmp_path):
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).write_text("precious")
    before = snapshot(tmp_path)
    assert_refused(train(*SMALL, "--run-name", "run"), "choose another --run-name", tmp_path, before)


@pytest.mark.parametrize("flag", [
    "--lr 5", "--d-model 64", "--epochs 3", "--dataset mnist", "--seed 1", "--no-augment", "--bidirectional",
    "--patch-size 4", "--run-name other", "--preset tiny", "--permute-seed 1",
    "--model lstm", "--position-embedding"])
def test_a_resumed_run_keeps_its_settings(flag, train, whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = snapshot(whole)
    assert_refused(train("--resume", *shlex.split(flag)), "a resumed run keeps its settings", whole, before)


def test_a_flag_that_is_newer_than_the_run_is_refused(train, whole, tmp_path, monkeypatch):
    contents = checkpoint.load(whole / "checkpoints" / "run.last.pt")
    contents["epoch"] = 1
    del contents["settings"]["drop_tokens"], contents["config"]["drop_tokens"]
    checkpoint.save(tmp_path / "checkpoints" / "run.last.pt", contents)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert_refused(train("--resume", "--drop-tokens", 0.5), "--drop-tokens is 0.0 in", tmp_path, before)


def test_a_checkpoint_without_a_state_of_training_is_refused(train, whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = snapshot(whole)
    assert_refused(train("--resume", "checkpoints/run.pt"), "resume a .last.pt", whole, before)


def test_a_state_that_does_not_fit_is_refused(train, whole, tmp_path):
    contents = checkpoint.load(whole / "checkpoints" / "run.last.pt")
    contents |= {"epoch": 1, "step": STEPS, "optimizer": {}}
    checkpoint.save(tmp_path / "checkpoints" / "run.last.pt", contents)
    before = snapshot(tmp_path)
    assert_refused(train("--resume"), "does not fit", tmp_path, before)


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(train):
    done = train(*SMALL, "--lr", 1e30, "--warm-up", 10_000, "--run-name", "run")
    assert done.status == 2 and done.err.startswith("error: the loss is ") and done.err.count("\n") == 1
    for part in ("at step 10 with learning rate 1e+27;", "is checkpoints/run.last.pt (step 0)",
                 "lower --lr", "--amp off"):
        assert part.replace("/", os.sep) in done.err


def test_a_last_step_that_spoils_the_weights_is_seen_without_validation_images_too(train, tmp_path):
    done = train(*SMALL, "--lr", 1e30, "--warm-up", 0, "--epochs", 1, "--limit-train", 32, "--train-on-all",
                 "--run-name", "run")
    assert done.status == 2 and done.err.startswith("error: the loss is nan at step 1 ")
    assert not (tmp_path / "checkpoints" / "run.pt").exists()


FLAGS = [action.option_strings[0] for action in argument_parser()._actions
         if action.dest != "help"]


def test_help_names_every_flag_with_its_default(train):
    options = train("--help").out.partition("options:\n")[2]
    _, help_itself, *entries = re.split(r"^  (?=-)", options, flags=re.MULTILINE)
    assert help_itself.startswith("-h")
    assert [re.match(r"--[a-z-]+", entry)[0] for entry in entries] == FLAGS
    assert all(" ".join(entry.split()).count("(default: ") == 1 for entry in entries)


def test_the_readme_names_every_flag():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [flag for flag in FLAGS if f"`{flag}" not in readme] == []
