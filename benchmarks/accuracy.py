"""Train one recipe with several seeds and write what came out: every seed, mean and standard deviation.

    python benchmarks/accuracy.py --preset best --validation                    to choose a recipe
    python benchmarks/accuracy.py --preset best                                 to report it, once chosen
    python benchmarks/accuracy.py --name mnist-1-epoch --seeds 3 -- --epochs 1

What stands after -- goes to train_mamba.py. With --validation the validation images are held out and nothing
is told of the test set; a preset without it is trained on all training images and tested once a seed. The
numbers are those of the last epoch, never of the best.

results/accuracy-<preset>.json, validation-<preset>.json or <name>.json holds every seed as soon as it is
there, with the settings. A seed that is trained already is not trained again, and one that was cut short goes
on; with --merge the seeds in the file count as trained, too, whose runs are gone. Each tells the machine that
trained it. One whose loss became no number is recorded as such, and counts in nan_runs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import torch
from tqdm import tqdm

import checkpoint
import evaluate
from benchmarks import timing
from errors import ArgumentParser, UserError, as_flag, run_script
from flags import MAY_CHANGE_ON_RESUME, explicit
from presets import PRESETS
from trials import Outcome, Trial, check, difference, train

ROOT = Path(__file__).resolve().parent.parent
HERE = ("machine", "jobs")  # what a run tells of the call that trained it: its times depend on both
SET_HERE = {"seed", "run_name", "runs_dir", "checkpoints_dir", "resume", "profile"}


def main() -> None:
    arguments = parse_arguments()
    folders = [f"--runs-dir={arguments.runs_dir}", f"--checkpoints-dir={arguments.checkpoints_dir}"]
    # Nobody looks at these runs' pictures, which take more than a tenth of their time on a GPU.
    trials = [Trial(f"{arguments.name}-seed{seed}",
                    ["--no-draw", *arguments.train, f"--seed={seed}", *folders], ROOT)
              for seed in range(arguments.seeds)]
    if arguments.validation and trials[0].settings.train_on_all:
        raise UserError("--validation holds out the images that --train-on-all trains on; leave one out")
    device = evaluate.pick_device(trials[0].settings.device)
    output = ROOT / "results" / f"{arguments.name}.json"
    kept = same_runs(output, trials[0], device) if arguments.merge else []
    trials = [trial for trial in trials if trial.settings.seed not in {run["seed"] for run in kept}]
    if not trials:
        raise UserError(f"{output} has all of these seeds; choose another --name to train them once more")
    check(trials)
    replaced = replaced_runs(output, trials, device) if output.exists() and not arguments.merge else []
    here = {"machine": timing.machine(device), "jobs": arguments.jobs}
    before = {run["seed"]: {name: run[name] for name in HERE} for run in replaced}
    trained = {trial: before.get(trial.settings.seed, here) for trial in trials}
    reported = name_of_accuracy(arguments)
    done: dict[Trial, Outcome] = {}
    with contextlib.closing(train(trials, len(trials), arguments.jobs)) as outcomes:
        for trial, outcome in outcomes:
            if outcome.failed and not outcome.nan:
                raise UserError(f"{trial.name} did not finish: {outcome.failed}")
            done[trial] = outcome
            result = summary(arguments, done, trained, kept)
            checkpoint.save_json(output, result)
            own = next(run for run in result["runs"] if run["seed"] == trial.settings.seed)
            tqdm.write(f"{trial.name}: {outcome.failed or in_words(reported, own[reported])}")
    nan = f", {result['nan_runs']} of them ended in NaN" if result["nan_runs"] else ""
    print(f"{arguments.name}: {in_words(reported, **result[reported])} (seeds: {len(result['runs'])}{nan}), "
          f"{result['training_seconds']:.0f} s of training\nwritten to {output}")


def parse_arguments() -> argparse.Namespace:
    """`name` is that of the file under results/, `train` all flags of train_mamba.py but the seed's."""
    parser = ArgumentParser(description="Train one recipe with several seeds and report mean and deviation.")
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                        help="the recipe; without --validation it is trained on all training images "
                             "(default: none)")
    parser.add_argument("--name", default=argparse.SUPPRESS,
                        help="names the runs and the file under results/ (default: the preset)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds from 0 on")
    parser.add_argument("--validation", action="store_true",
                        help="hold out the validation images and report the accuracy on them alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="train so many seeds side by side: on all GPUs that there are, or where one "
                             "does not fill its GPU; seconds are then no measure of speed")
    parser.add_argument("--merge", action="store_true",
                        help="keep the seeds that the file under results/ has, of the same settings and "
                             "kind of device, and train the others")
    parser.add_argument("--runs-dir", type=absolute, default=Path("runs"), metavar="DIR",
                        help="the runs' folders")
    parser.add_argument("--checkpoints-dir", type=absolute, default=Path("checkpoints"), metavar="DIR",
                        help="the runs' checkpoints")
    parser.add_argument("train", nargs="*", metavar="-- FLAGS", help="more flags of train_mamba.py")
    arguments = parser.parse_args()
    preset = getattr(arguments, "preset", None)
    name = getattr(arguments, "name", preset)
    for count in ("seeds", "jobs"):
        if getattr(arguments, count) < 1:
            parser.error(f"--{count} must be at least 1, but is {getattr(arguments, count)}")
    if name is None:
        parser.error("one of --preset and --name is required")
    if not checkpoint.is_run_name(name):
        parser.error(f"--name must be letters, digits, - and _, but is {name!r}")
    own = {*SET_HERE, "preset"} if preset else SET_HERE
    for flag in [flag for flag in explicit(arguments.train) if flag in own]:
        parser.error(f"{as_flag(flag)} behind -- is set by this script itself; leave it out there")
    if preset:
        arguments.train = ["--preset", preset, *([] if arguments.validation else ["--train-on-all"]),
                           *arguments.train]
    arguments.name = f"validation-{name}" if arguments.validation else f"accuracy-{name}" if preset else name
    return arguments


def absolute(text: str) -> Path:
    """An argument's type: a path that means the same in every folder."""
    return Path(text).absolute()


def runs_of(result: dict) -> list[dict]:
    """A result's runs, each with HERE, which older files tell of all of them at once."""
    here = {name: result[name] for name in HERE}
    return [here | run for run in result["runs"]]


def same_runs(file: Path, trial: Trial, device: torch.device) -> list[dict]:
    """The file's runs. Raises UserError where they are of other settings or kind of device, or no runs."""
    other = "choose another --name, or delete that file"
    try:
        older = json.loads(file.read_text(encoding="utf-8"))
        runs = runs_of(older)
        unlike = difference(older["settings"] | {"seed": trial.settings.seed}, trial.settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no seeds in {file}; {other if file.exists() else 'leave out --merge'}") from error
    kinds = {run["machine"]["device"].split(":")[0] for run in runs}
    if not unlike and kinds - {device.type}:  # it decides on the precision, for one
        unlike = f"--device {kinds.pop()} and not {device.type}"
    if unlike:
        raise UserError(f"the seeds in {file} were trained with {unlike}; {other}")
    return runs


def replaced_runs(file: Path, trials: Sequence[Trial], device: torch.device) -> list[dict]:
    """The file's runs. Raises UserError as `same_runs`, and for one not trained here by these trials."""
    runs = same_runs(file, trials[0], device)
    trained = {trial.settings.seed for trial in trials if trial.outcome() is not None}
    if gone := {run["seed"] for run in runs} - trained:
        raise UserError(f"{file} would lose {len(gone)} of its seeds; add --merge to keep them, "
                        "choose another --name, or delete that file")
    return runs


def summary(arguments: argparse.Namespace, done: dict[Trial, Outcome], trained: dict[Trial, dict],
            kept: Sequence[dict] = ()) -> dict:
    """What is known of the seeds that are `done`, `trained` as that says, and of the `kept` runs.

    The time of an epoch is that of the call that trained the last of them.
    """
    reported = name_of_accuracy(arguments)
    hidden = "test_accuracy" if arguments.validation else None  # who does not see it cannot choose by it
    runs = [*kept]
    for trial, outcome in done.items():
        metrics = outcome.epochs[-1] if outcome.epochs else {}
        runs.append({"seed": trial.settings.seed, "nan": outcome.nan,
                     **{name: value for name, value in metrics.items() if name != hidden},
                     "training_seconds": outcome.seconds,
                     "all_evaluation_seconds": outcome.evaluation_seconds, **trained[trial]})
    runs.sort(key=lambda run: run["seed"])
    accuracies = [run[reported] for run in runs if not run["nan"]]
    contents = checkpoint.load_good(trial.last)
    with_it = [outcome for other, outcome in done.items() if trained[other] == trained[trial]]
    return {"name": arguments.name, "arguments": arguments.train,
            "settings": {name: value for name, value in contents["settings"].items()
                         if name not in MAY_CHANGE_ON_RESUME | {"seed", "run_name"}},
            "parameters": sum(weight.numel() for weight in evaluate.rebuild(contents, "cpu").parameters()),
            "epochs": trial.settings.epochs, "seeds": arguments.seeds, "runs": runs,
            "nan_runs": len(runs) - len(accuracies),
            reported: {"mean": statistics.mean(accuracies) if accuracies else None,
                       "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None},
            "seconds_an_epoch": statistics.median([epoch["seconds"] for outcome in with_it
                                                   for epoch in outcome.epochs] or [0]),
            "training_seconds": sum(run["training_seconds"] for run in runs), **trained[trial]}


def name_of_accuracy(arguments: argparse.Namespace) -> str:
    """Of the one that is reported, among an epoch's metrics."""
    return "val_accuracy" if arguments.validation else "test_accuracy"


def in_words(name: str, mean: float | None, std: float | None = None) -> str:
    """That accuracy for people."""
    if mean is None:
        return "no seed came to its end"
    deviation = "" if std is None else f" ± {100 * std:.2f}"
    return f"{'validation' if name == 'val_accuracy' else 'test'} accuracy {100 * mean:.2f}{deviation} %"


if __name__ == "__main__":
    run_script(main)
