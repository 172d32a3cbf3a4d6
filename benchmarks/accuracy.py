"""Train one recipe with several seeds and write what came out: every seed, mean and standard deviation.

    python benchmarks/accuracy.py --name mnist-1-epoch --seeds 3 -- --epochs 1

What stands after -- goes to train_mamba.py. The numbers are those of the last epoch, never of the best, and
a seed that is already trained is not trained again, and one that was cut short goes on. results/<name>.json
holds them with the settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import torch

import checkpoint
from benchmarks import timing
from errors import ArgumentParser, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = parse_arguments()
    runs = [train(arguments, seed) for seed in range(arguments.seeds)]
    accuracies = [run["test_accuracy"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"name": arguments.name, "arguments": arguments.train, "machine": timing.machine(device),
              "epochs": runs[0]["epoch"], "runs": runs,
              "test_accuracy": {"mean": statistics.mean(accuracies),
                                "std": statistics.stdev(accuracies) if len(runs) > 1 else None},
              "seconds_an_epoch": statistics.median(seconds)}
    output = ROOT / "results" / f"{arguments.name}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    deviation = "" if len(runs) == 1 else f" ± {100 * statistics.stdev(accuracies):.2f}"
    print(f"{arguments.name}: test accuracy {100 * statistics.mean(accuracies):.2f}{deviation} % "
          f"({len(runs)} seeds), {statistics.median(seconds):.0f} s an epoch\nwritten to {output}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Train one recipe with several seeds and report mean and deviation.")
    parser.add_argument("--name", required=True, help="names the runs and the file under results/")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N − 1")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs", metavar="DIR",
                        help="the runs' folders")
    parser.add_argument("--checkpoints-dir", type=Path, default=ROOT / "checkpoints", metavar="DIR",
                        help="the runs' checkpoints")
    parser.add_argument("train", nargs="*", metavar="-- FLAGS", help="flags of train_mamba.py")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, but is {arguments.seeds}")
    if not checkpoint.is_run_name(arguments.name):
        parser.error(f"--name must be letters, digits, - and _, but is {arguments.name!r}")
    return arguments


def train(arguments: argparse.Namespace, seed: int) -> dict:
    """The metrics of the last epoch of one seed, trained now if it is not there yet."""
    name = f"{arguments.name}-seed{seed}"
    metrics = arguments.runs_dir / name / "metrics.jsonl"
    last = arguments.checkpoints_dir / f"{name}.last.pt"
    script = [sys.executable, str(ROOT / "train_mamba.py")]
    if last.exists():  # a run that was cut short goes on; one that is finished says so, and ends at once
        command = [*script, "--resume", str(last)]
    else:
        command = [*script, *arguments.train, "--seed", str(seed), "--run-name", name, "--runs-dir",
                   str(arguments.runs_dir), "--checkpoints-dir", str(arguments.checkpoints_dir)]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status == 2:
        sys.exit(2)  # it has said what is wrong
    if status != 0:
        raise UserError(f"seed {seed} did not finish; mend what it says and run this command again")
    return {"seed": seed, **json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])}


if __name__ == "__main__":
    run_script(main)
