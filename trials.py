"""Several runs of train_mamba.py, one after another or side by side; what is done is not done again.

    trials = [Trial(f"mine-seed{seed}", ["--seed", str(seed)]) for seed in range(5)]
    check(trials)
    for trial, outcome in train(trials, total=5, jobs=1):
        ...

How far a run is, its own files alone say, so the same command goes on after a stop or a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

import checkpoint
import metrics_file
from errors import UserError, as_flag
from flags import differences, fill_in, parse_arguments
from training import StopRequest

SCRIPT = Path(__file__).resolve().parent / "train_mamba.py"
NOT_FINITE = re.compile(r"the (loss|gradient's norm) is (nan|-?inf)\b")  # Training.check_finite says so
GPUS = "CUDA_VISIBLE_DEVICES"  # tells a process which of them it sees
LOOK_EVERY = 0.2  # seconds between looks at the runs


class Outcome(NamedTuple):
    """How a run ended."""

    epochs: list[dict]         # the metrics of each epoch finished, as in metrics.jsonl
    failed: str | None = None  # why it did not come to its end
    nan: bool = False          # whether that was a loss or gradient that is no number

    @property
    def metrics(self) -> dict:
        """Those of the last epoch, not of the best: the best of many is too good to be true."""
        return self.epochs[-1]

    @property
    def seconds(self) -> float:
        """Of training, in all epochs."""
        return sum(epoch["seconds"] for epoch in self.epochs)

    @property
    def evaluation_seconds(self) -> float:
        """Of the evaluations after them."""
        return sum(epoch["evaluation_seconds"] for epoch in self.epochs)


class Trial:
    """A run to be: its name, its flags for train_mamba.py, and the folder that the command is given in."""

    def __init__(self, name: str, arguments: Sequence[str], place: Path = Path()) -> None:
        """Raises UserError for a wrong flag."""
        self.name, self.place = name, place
        self.arguments = [*arguments, f"--run-name={name}"]
        self.settings = parse_arguments(self.arguments)
        fill_in(self.settings)
        self.folder = place / self.settings.runs_dir / name
        self.last = place / self.settings.checkpoints_dir / f"{name}.last.pt"
        # Beside the metrics; a run that ended in NaN would do so again.
        self.nan_file = self.folder / "nan.txt"

    @property
    def begun(self) -> bool:
        return checkpoint.exists(self.last)

    def command(self) -> list[str]:
        """Begins the run or, where it was cut short, goes on."""
        go_on = ["--resume", str(self.settings.checkpoints_dir / self.last.name)] if self.begun else []
        return [sys.executable, str(SCRIPT), *self.arguments, *go_on]

    def epochs(self) -> list[dict]:
        """The metrics of the epochs finished until now."""
        return metrics_file.read(self.folder)

    def outcome(self) -> Outcome | None:
        """None for a run that is to be begun, or to be gone on with."""
        if self.nan_file.exists():
            return Outcome(self.epochs(), self.nan_file.read_text(encoding="utf-8").strip(), nan=True)
        if self.begun and checkpoint.load_good(self.last)["epoch"] == self.settings.epochs:
            return Outcome(self.epochs())
        return None


def check(trials: Iterable[Trial]) -> None:
    """Raise UserError where a name cannot be a run's, or is that of a run with other settings."""
    for trial in trials:
        if not checkpoint.is_run_name(trial.name):
            raise UserError(f"{trial.name!r} cannot name a run; choose a shorter --name, of letters, digits, "
                            "- and _")
        if not trial.begun:
            continue
        contents = checkpoint.load_good(trial.last)
        if found := difference(contents["settings"], trial.settings):
            raise UserError(f"{trial.last} is there, of a run with {found}; choose another --name, or delete "
                            "that run")
        if contents["epoch"] > len(trial.epochs()):
            raise UserError(f"{trial.last} is there, but not all of its epochs are in {trial.folder}; give "
                            "the --runs-dir that it was trained with, or delete that run")


def difference(saved: dict, settings: argparse.Namespace) -> str | None:
    """The first flag in which these settings are not those `saved`, or None: "--lr 0.01 and not 0.02"."""
    for name, (there, value) in differences(saved, settings).items():
        return f"{as_flag(name)} {there} and not {value}"
    return None


def train(trials: Iterable[Trial], total: int, jobs: int) -> Iterator[tuple[Trial, Outcome]]:
    """Train what is not trained yet, `jobs` at once; every trial's outcome as soon as it is there.

    Each run gets one GPU, where there are some: the one with the fewest of these runs. `trials` is asked for
    the next one only when there is room for it. Ctrl-C is handed on to the runs, which save their states;
    then a line says how to go on, and the script ends with status 130.
    """
    waiting, running, gpus = iter(trials), [], visible_gpus()
    finished, before = 0, 0.0  # trials; those, and parts of them, that took no time now
    with (_ended_by_other_signals(), StopRequest() as stop, contextlib.ExitStack() as stack,
          tqdm(total=total, disable=None, leave=False, smoothing=0, unit="trial",
               bar_format="{l_bar}{bar}| [{elapsed}<{remaining}]") as bar):
        while True:
            while len(running) < jobs and not stop.asked and (trial := next(waiting, None)) is not None:
                done = trial.outcome()
                if done is None:
                    gpu = min(gpus, key=[run.gpu for run in running].count, default=None)
                    running.append(stack.enter_context(_Run(trial, gpu)))
                    before += running[-1].progress()
                else:
                    before, finished = before + 1, finished + 1
                    yield trial, done
            bar.set_description_str(f"{finished}/{total} trials", refresh=False)
            bar.initial, bar.n = before, finished + sum(run.progress() for run in running)
            bar.refresh()
            if not running:
                break
            time.sleep(LOOK_EVERY)
            if stop.asked:
                for run in running:
                    run.stop()
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                outcome = run.outcome()
                if outcome is None:
                    stop.asked = True  # someone stopped this one: all of them stop
                else:
                    finished += 1
                    yield run.trial, outcome
    if stop.asked:
        tqdm.write(f"stopped; go on with: python {shlex.join(sys.argv)}")
        sys.exit(130)


def visible_gpus() -> list[str]:
    """Each GPU that the runs may use, by its name in the variable GPUS."""
    count = torch.cuda.device_count()
    names = os.environ[GPUS].split(",") if GPUS in os.environ else map(str, range(count))
    return list(names)[:count]  # a name that stands for no GPU ends the list, to CUDA as well


class _Run:
    """A trial's process, which sees one GPU or, for None, whatever there is.

    Leaving its `with` stops it, if it is still there, and waits until it has saved.
    """

    def __init__(self, trial: Trial, gpu: str | None) -> None:
        self.trial, self.gpu, self.told = trial, gpu, False
        self.output: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
        # A group of its own keeps the terminal's Ctrl-C away, of which two would stop the run unsaved.
        self.process = subprocess.Popen(trial.command(), cwd=trial.place, stdin=subprocess.DEVNULL,
                                        stdout=self.output, stderr=subprocess.STDOUT,
                                        env=os.environ | ({} if gpu is None else {GPUS: gpu}),
                                        process_group=0 if os.name == "posix" else None)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None and self.told:  # a second Ctrl-C
            self.process.kill()
        self.stop()
        self.process.wait()
        self.output.close()

    def stop(self) -> None:
        """Ask once to save the state and stop."""
        if not self.told and os.name == "posix":  # elsewhere the console's Ctrl-C has reached it
            self.process.send_signal(signal.SIGINT)
        self.told = True

    def progress(self) -> float:
        """Fraction of the epochs finished."""
        return len(self.trial.epochs()) / self.trial.settings.epochs

    def outcome(self) -> Outcome | None:
        """Of the process that has ended; None where it was stopped and can go on."""
        status = self.process.returncode
        with self.output as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        if status in (0, 130, -signal.SIGINT) or (self.told and status != 2):
            return self.trial.outcome()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = said[-1] if said else (
            f"it ended with status {status}, saying: {' '.join(lines[-1:])[:160]}; see why by its own "
            f"command: python train_mamba.py {shlex.join(self.trial.command()[2:])}")
        nan = NOT_FINITE.match(reason) is not None
        if nan:
            self.trial.nan_file.write_text(reason + "\n", encoding="utf-8")
        return Outcome(self.trial.epochs(), reason, nan)


@contextlib.contextmanager
def _ended_by_other_signals() -> Iterator[None]:
    """What ends a process by default does here what Ctrl-C does, or the runs would be left alone."""
    others = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    others = [number for number in others if signal.getsignal(number) == signal.SIG_DFL]
    for number in others:
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number in others:
            signal.signal(number, signal.SIG_DFL)
