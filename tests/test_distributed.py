"""distributed.py: two processes under torchrun train as one does, stop together, and end when one dies."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import checkpoint
import distributed
import train_mamba
from tests import pieces
from tests.commands import LIGHT, patched

ROOT = Path(__file__).parent.parent
ENDED = 30  # seconds in which a run of several processes ends when it is told to, or one of them dies
SOON = 120  # seconds; a process that waits for one that has gone would do so for distributed.PATIENCE
# 1,101 images in batches of 50: the last batch is one image, for two processes.
SMALL = shlex.split("--dataset digits --epochs 2 --batch-size 50 --lr 1e-2 --d-model 32 --num-blocks 2 "
                    "--d-state 4 --device cpu --limit-train 1101 --run-name run")

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt",
                                reason="needs gloo and POSIX signals")


def command(processes: int, *arguments: object, script: Path = ROOT / "train_mamba.py") -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, str(script), *map(str, arguments)]


def train(place: Path, processes: int, *arguments: object, code: str) -> str:
    """What a run prints that may warn of nothing; `code` is done before it."""
    done = subprocess.run(command(processes, *arguments, script=patched(place, code)), cwd=place,
                          capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr.replace("OMP_NUM_THREADS", "")
    return done.stdout


def train_here(place: Path, *arguments: object) -> None:
    """A run of one process: of this one, as another takes seconds to import PyTorch."""
    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["train_mamba.py", "--no-draw", *map(str, arguments)])
        train_mamba.main()
    torch.set_float32_matmul_precision(precision)


# Prints the names of the threads that are there when Python ends, where Linux tells.
LEFT = """
import atexit
import pathlib
atexit.register(lambda: print(*(task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm"))))
"""
# Leaves in killed/ what a kill would leave after the checkpoint at step 30, of 46.
KEPT = """
import shutil
import checkpoint

save = checkpoint.save

def kept(path, contents, **options):
    save(path, contents, **options)
    if contents.get("step") == 30:
        for name in ("runs", "checkpoints"):
            shutil.copytree(name, f"killed/{name}")

checkpoint.save = kept
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A run of one process, and what a kill would have left of it."""
    place = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", checkpoint.save)  # set back afterwards
        exec(KEPT, {})
        train_here(place, *SMALL, "--checkpoint-every", 30)
    return place


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes, what a kill would have left of it, and what it printed."""
    place = tmp_path_factory.mktemp("two")
    return place, train(place, 2, *SMALL, "--checkpoint-every", 30, code=KEPT)


@pytest.fixture
def running(tmp_path) -> Iterator[list[subprocess.Popen]]:
    """Two runs of two processes that have finished an epoch, each in a process group of its own.

    Side by side, as the launcher and much of what the processes import leave a core idle; in folders 0 and 1.
    """
    processes = []
    for name in "01":
        (tmp_path / name).mkdir()
        started = command(2, *SMALL, "--epochs", 1000, "--checkpoint-every", 5,
                          script=patched(tmp_path / name, LIGHT))
        processes.append(subprocess.Popen(started, cwd=tmp_path / name, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True))
    for process in processes:
        while not (line := process.stdout.readline()).startswith("epoch"):
            assert line, process.stderr.read()
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def curve(place: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(place / "runs" / "run"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def metrics(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(place: Path, one: Path) -> None:
    """Losses within 1e-4 of each other at the same steps, each step once."""
    ours, theirs = curve(place), curve(one)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    for (step, a), (_, b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4), f"step {step}"
    assert [line["epoch"] for line in metrics(place)] == [1, 2]
    for ours, theirs in zip(metrics(place), metrics(one), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=3 / 1101)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=5e-3)
        assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.02)


# ---- torchrun


def test_two_processes_train_as_one(one, two):
    place, out = two
    assert "25 a step in each of 2 processes, 50 together" in out
    assert out.count("epoch 1/2") == out.count("best on validation") == 1
    assert_same_curve(place, one)
    assert {path.name for path in (place / "checkpoints").iterdir()} == {
        "run.pt", "run.last.pt", "run.last.pt.previous"}
    assert len(list((place / "runs" / "run").glob("events*"))) == 2, "one writer; the second is of HParams"


def test_two_processes_stream_and_erase_as_one(tmp_path):
    for number in range(27):
        place = tmp_path / "pictures" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (9 * number, 90, 250 - 9 * number)).save(place / f"{number}.png")
    flags = [*SMALL[SMALL.index("--batch-size"):SMALL.index("--limit-train")], "--dataset", "folder",
             "--data-dir", tmp_path / "pictures", "--image-size", 16, "--epochs", 2, "--batch-size", 9,
             "--memory-budget", 0, "--workers", 0, "--erase", 0.9, "--no-augment", "--run-name", "run"]
    for name in "12":
        (tmp_path / name).mkdir()
    train_here(tmp_path / "1", *flags)
    train(tmp_path / "2", 2, *flags, code="")
    (one, two), (curve_one, curve_two) = ([read(tmp_path / name) for name in "12"]
                                          for read in (metrics, curve))
    for losses, expected in (([line["train_loss"] for line in run] for run in (two, one)),
                             ([value for _, value in points] for points in (curve_two, curve_one))):
        assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("then", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(then, one, two, tmp_path):
    """Killed after the checkpoint at step 30, of 46."""
    shutil.copytree((one if then == 2 else two[0]) / "killed", tmp_path, dirs_exist_ok=True)
    assert checkpoint.load_good(tmp_path / "checkpoints" / "run.last.pt")["step"] == 30
    if then == 1:
        train_here(tmp_path, "--resume")
    else:
        assert "gloo" not in train(tmp_path, 2, "--resume", code=LIGHT + LEFT)
    ours, theirs = dict(curve(tmp_path)), dict(curve(one))
    assert set(ours) == set(theirs) | {30}
    assert all(ours[step] == pytest.approx(theirs[step], rel=1e-4) for step in theirs)
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 2]


def test_ctrl_c_saves_and_ends_all(running, tmp_path):
    """Ctrl-C in a terminal, which all of a run's processes get, and SIGINT to torchrun alone."""
    began = time.monotonic()
    os.killpg(running[0].pid, signal.SIGINT)
    running[1].send_signal(signal.SIGINT)
    for name, process in zip("01", running, strict=True):
        out, err = process.communicate(timeout=SOON)
        assert time.monotonic() - began < ENDED and process.returncode != 0
        assert err.count("stopping as soon as the state can be saved\n") == 1
        assert out.count("go on with: python train_mamba.py --resume checkpoints/run.last.pt") == 1
        assert checkpoint.load(tmp_path / name / "checkpoints" / "run.last.pt")["step"] >= 23
        assert_gone(process.pid)


def assert_gone(group: int) -> None:
    """No process of the group is left; one may have closed its output a moment before it ends."""
    end = time.monotonic() + SOON
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)


def test_a_dying_process_ends_the_others_with_a_line(running, tmp_path):
    """The first one of a run, which writes, and the second one."""
    workers = [sorted(int(path.name) for path in Path("/proc").glob("[0-9]*") if parent(path) == process.pid)
               for process in running]
    if [len(found) for found in workers] != [2, 2]:
        pytest.skip("needs /proc")
    began = time.monotonic()
    for victim, found in enumerate(workers):
        os.kill(found[victim], signal.SIGKILL)
    for name, process in zip("01", running, strict=True):
        _, err = process.communicate(timeout=SOON)
        assert time.monotonic() - began < ENDED and process.returncode != 0
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "--resume" in lines[0] and "another" in lines[0]
        assert "train_mamba.py\", line" not in err
        assert checkpoint.load_good(tmp_path / name / "checkpoints" / "run.last.pt")["epoch"] >= 1


def parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


@pytest.mark.parametrize(("arguments", "says"), [
    pytest.param(["--epochs", "0"], "--epochs: must be", marks=pytest.mark.full),
    (["--batch-size", "1"], "less than an image for each"),
    pytest.param(["--dataset", "mnist", "--data-dir", "file"], "choose another data folder",
                 marks=pytest.mark.full)])
def test_a_wrong_command_is_one_line_for_all_processes(arguments, says, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "file").write_text("")
    done = subprocess.run(command(2, *SMALL, *arguments, script=patched(tmp_path, LIGHT)),
                          cwd=tmp_path / "place", capture_output=True, encoding="utf-8", timeout=SOON)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and done.stdout == ""
    assert says in lines[0] and not any("unrecognized" in line for line in lines)
    assert sum(says in line for line in lines) == 1
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["file"]


# ---- Pieces, in processes of our own


def test_pieces_in_three_processes(seed):
    images = 5 + 3 * torch.randn(7, 3, 4, 5)
    # Ours, as torchrun has one: it keeps the port that it is given, which nobody else can take.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(pieces.alone, (3, store.port, images, torch.randn_like(images)), nprocs=3)


def test_one_process_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert distributed.wrap(model) is model and type(model[1]) is nn.BatchNorm2d
    loss, sums = torch.ones(()), torch.ones(2)
    part = distributed.part(5)
    assert part.images == slice(None) and part.loss(loss) is loss and part.total(sums) is sums
    state = torch.get_rng_state()
    distributed.draw_apart(0, 0)
    assert torch.equal(state, torch.get_rng_state()) and not dist.is_initialized()
