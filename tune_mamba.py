"""Train with every combination of some settings, and rank them by their accuracy on the validation images.

    python tune_mamba.py --grid lr=5e-4,1e-3,2e-3 weight_decay=0.01,0.05
    python tune_mamba.py --grid scan=row,cross bidirectional=true,false --name order -- --dataset digits
    python tune_mamba.py --grid lr=5e-4,1e-3,2e-3 d_model=64,128,192 --trials 5    a part of it, by Optuna
    tensorboard --logdir runs                                                      the HParams tab

A trial is a run of train_mamba.py, which is given what stands after -- and its place in the grid. The same
command goes on after Ctrl-C or a kill. runs/<name>/ gets sweep.json and sweep.csv, the best trial first.
What counts is the last epoch's accuracy; the test set has no say, so that its accuracy stays a fair one.
"""

from __future__ import annotations

from errors import ArgumentParser, UserError, as_flag, run_script  # isort: skip  (Ctrl-C is one line from here on)

import argparse
import contextlib
import csv
import io
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from sklearn.model_selection import ParameterGrid
from tqdm import tqdm

import checkpoint
import evaluate
import metrics_file
from data import DATASETS
from flags import as_flags, explicit, parse_arguments
from trials import Outcome, Trial, check, train

SET_HERE = {"run_name", "resume", "profile", "train_on_all"}  # by every trial, or not for one
FOLDERS = {"data_dir", "runs_dir", "checkpoints_dir"}
NOT_COMPARED = {"draw", "checkpoint_every", "workers",  # change nothing that is learnt,
                "hold_out"}                             # or what tells it
SWITCH = {"true": True, "false": False}
OPTUNA = "optuna.log"  # what Optuna has seen of a sweep

# ---- Command line -----------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    parser = ArgumentParser("Train with every combination of some settings and rank them on validation.")
    parser.add_argument("--grid", nargs="+", action="extend", required=True, metavar="NAME=VALUE,VALUE",
                        help="flags of train_mamba.py and the values to try, true or false for a switch")
    parser.add_argument("--name", default="sweep", help="names the trials and the folder of their table")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="train so many trials side by side: on all GPUs that there are, or where one "
                             "does not fill its GPU")
    parser.add_argument("--trials", type=int, default=argparse.SUPPRESS, metavar="N",
                        help="let Optuna choose N times from the grid, one after another, by what it has "
                             "seen (default: every combination once)")
    parser.add_argument("train", nargs="*", metavar="-- FLAGS", help="flags of train_mamba.py for all trials")
    arguments = parser.parse_args()
    arguments.grid = parse_grid(arguments.grid)
    for count in ("jobs", "trials"):
        if getattr(arguments, count, 1) < 1:
            parser.error(f"--{count} must be at least 1, but is {getattr(arguments, count)}")
    if "trials" in arguments and arguments.jobs > 1:
        parser.error("--trials chooses each trial by those before it, so none are trained side by side; "
                     "leave --jobs out")
    for name in explicit(arguments.train):
        if name in SET_HERE:
            parser.error(f"{as_flag(name)} is not for a trial; leave it out after --")
        if name in arguments.grid:
            parser.error(f"{as_flag(name)} is in the grid and after --; leave it out of one of them")
    if not checkpoint.is_run_name(arguments.name):
        parser.error(f"--name must be letters, digits, - and _, but is {arguments.name!r}")
    return arguments


def parse_grid(words: Sequence[str]) -> dict[str, list]:
    """The values of each setting in words such as "lr=1e-3,2e-3", as train_mamba.py itself would read them.

    Raises UserError for what it would refuse, and for what no trial may set.
    """
    names = vars(parse_arguments([]))
    grid: dict[str, list] = {}
    for word in words:
        typed, equals, values = word.partition("=")
        name = typed.replace("-", "_")
        if not equals:
            raise UserError(f"--grid {word!r} names no values; write it as lr=1e-3,2e-3")
        if name not in names:
            raise UserError(f"--grid {word!r}: train_mamba.py has no setting {typed!r}; see python "
                            "train_mamba.py --help")
        if name in SET_HERE | FOLDERS | NOT_COMPARED:
            raise UserError(f"--grid {word!r}: {as_flag(name)} is not for a trial; leave it out")
        if name in grid:
            raise UserError(f"--grid has {name} twice; put all of its values behind one")
        grid[name] = []
        for text in values.split(","):
            if not text:
                raise UserError(f"--grid {word!r} has an empty value; leave out that comma, or give a value")
            value = explicit(as_flags({name: SWITCH.get(text, text)}))[name]
            if value in grid[name]:
                raise UserError(f"--grid {word!r} has the value {value} twice; leave one out")
            grid[name].append(value)
    return grid


def in_words(value: object) -> str:
    """A value of the grid as it is typed, without what no folder's name may have."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


# ---- Trials -----------------------------------------------------------------------------------------------


def main() -> None:
    arguments = read_arguments()
    settings = parse_arguments(arguments.train)
    device = evaluate.pick_device(settings.device)
    folder = settings.runs_dir / arguments.name
    if (folder / metrics_file.NAME).exists():
        raise UserError(f"{folder} is a run's; choose another --name")
    if (folder / "sweep.csv").exists() and not (folder / "sweep.json").exists():
        raise UserError(f"{folder / 'sweep.csv'} is of no sweep, and would be replaced; choose another "
                        "--name")
    outcomes: dict[str, Outcome] = {}
    if "trials" in arguments:
        if (folder / "sweep.json").exists() and not (folder / OPTUNA).exists():
            raise UserError(f"{folder / 'sweep.json'} is of every combination, and would be replaced; choose "
                            "another --name")
        total, trials = arguments.trials, sampled(arguments, folder, outcomes, optuna_if_installed())
    else:
        trials = [make_trial(arguments, point) for point in ParameterGrid(arguments.grid)]
        total = len(trials)
        check(trials)
        check_replaces(folder / "sweep.json", trials)
    rows: dict[str, dict] = {}
    about = {"name": arguments.name, "arguments": arguments.train, "grid": arguments.grid,
             "jobs": arguments.jobs, "device": evaluate.device_name(device), "torch": torch.__version__}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --runs-dir") from error
    with contextlib.closing(train(trials, total, arguments.jobs)) as results:
        for trial, outcome in results:
            outcomes[trial.name] = outcome
            rows[trial.name] = row = table_row(trial, outcome, arguments.grid)
            save(folder, about, ranked(rows.values()))
            said = cause(row) or f"{row['val_accuracy']:.2%} on validation"
            tqdm.write(f"{trial.name}: {said}")
    best, *others = ranked(rows.values())
    if best["failed"]:
        raise UserError(f"no trial came to its end; {best['trial']}: {best['failed']}")
    print("\n".join(table([best, *others], arguments.grid)))
    again = explicit(arguments.train) | {name: best[name] for name in arguments.grid}
    what = "the best one again"
    if DATASETS[settings.dataset].read is not None:  # a folder's validation images stay held out
        what = "the best one with the validation images, too"
        again = {name: value for name, value in again.items() if name != "hold_out"} | {"train_on_all": True}
    print(f"written to {folder / 'sweep.json'} and sweep.csv\n{what}: "
          f"python train_mamba.py {shlex.join(as_flags(again))}")


def check_replaces(table: Path, trials: Sequence[Trial]) -> None:
    """Raise UserError where an earlier `table` has trials that are not among these, and would be lost."""
    if not table.exists():
        return
    try:
        trained = {row["trial"] for row in json.loads(table.read_text(encoding="utf-8"))["trials"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{table} is there, and no table of this version; choose another --name, or delete "
                        "it") from error
    if others := trained - {trial.name for trial in trials}:
        raise UserError(f"{table} has {min(others)}, which this grid has not, and would be replaced; choose "
                        "another --name, or delete it")


def make_trial(arguments: argparse.Namespace, point: dict) -> Trial:
    """The trial of a point of the grid, whose name says which."""
    place = ",".join(f"{name}={in_words(point[name])}" for name in sorted(point))
    return Trial(f"{arguments.name}-{place}", [*arguments.train, *as_flags(point)])


def optuna_if_installed() -> ModuleType:
    try:
        import optuna  # here, because --trials alone needs it
    except ImportError as error:
        raise UserError("--trials needs Optuna, which is not installed; pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def sampled(arguments: argparse.Namespace, folder: Path, outcomes: dict[str, Outcome],
            optuna: ModuleType) -> Iterator[Trial]:
    """Trials that Optuna's TPE chooses from the grid, each by the `outcomes` of those before it.

    A point may come again, which costs nothing: it is trained already. What an earlier call has seen comes
    first. Raises UserError where that was another grid, or cannot be read.
    """
    words = {name: {in_words(value): value for value in values} for name, values in arguments.grid.items()}
    choices = {name: optuna.distributions.CategoricalDistribution(list(words[name])) for name in words}
    path = str(folder / OPTUNA)
    lock = optuna.storages.journal.JournalFileOpenLock(path)
    journal = optuna.storages.journal.JournalFileBackend(path, lock)
    try:
        study = optuna.create_study(storage=optuna.storages.JournalStorage(journal),
                                    study_name=arguments.name, direction="maximize", load_if_exists=True)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete it, or choose another --name"
                        ) from error
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    seen = [asked for asked in study.trials if asked.params]  # a kill may have come before it was chosen
    if any(asked.distributions != choices for asked in seen):
        raise UserError(f"{path} is of another grid; choose another --name")
    for number in range(max(arguments.trials, len(seen))):
        asked = seen[number] if number < len(seen) else study.ask(choices)
        trial = make_trial(arguments, {name: words[name][word] for name, word in asked.params.items()})
        check([trial])
        yield trial
        if number < len(seen) and asked.state.is_finished():
            continue
        outcome = outcomes[trial.name]
        if outcome.failed:
            study.tell(asked.number, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked.number, outcome.metrics["val_accuracy"])


# ---- The table --------------------------------------------------------------------------------------------


def table_row(trial: Trial, outcome: Outcome, grid: dict) -> dict:
    metrics = {} if outcome.failed else outcome.metrics
    return {"trial": trial.name, **{name: getattr(trial.settings, name) for name in grid},
            **{name: metrics.get(name) for name in ("val_accuracy", "val_loss", "train_loss")},
            "seconds": outcome.seconds, "failed": outcome.failed}


def ranked(rows: Iterable[dict]) -> list[dict]:
    """The highest accuracy on validation first, of equal ones the lower loss; what failed comes last."""
    return sorted(rows, key=lambda row: (row["failed"] is not None, -(row["val_accuracy"] or 0),
                                         row["val_loss"] or 0, row["trial"]))


def cause(row: dict) -> str:
    """Why a trial failed, without the mend; "" where it did not."""
    return (row["failed"] or "").partition(";")[0]


def table(rows: list[dict], grid: dict) -> list[str]:
    lines = [["validation", "loss", "seconds", *grid, ""]]
    for row in rows:
        numbers = ["–", "–"] if row["failed"] else [f"{row['val_accuracy']:.2%}", f"{row['val_loss']:.4f}"]
        lines.append([*numbers, f"{row['seconds']:.0f}", *(in_words(row[name]) for name in grid),
                      cause(row)])
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    return ["  ".join([*(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]]
                      ).rstrip() for line in lines]


def save(folder: Path, about: dict, rows: list[dict]) -> None:
    """Write sweep.json and sweep.csv. Raises UserError where they cannot be written."""
    checkpoint.save_json(folder / "sweep.json", {**about, "trials": rows})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with checkpoint.whole_file(folder / "sweep.csv") as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    run_script(main)
