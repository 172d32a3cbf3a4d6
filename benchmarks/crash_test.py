"""Kill training runs at random moments, go on with them, and compare the end with that of a run left alone.

    python benchmarks/crash_test.py --kills 50

For each dataset a run is trained without interruption. Then runs of the same settings are killed with SIGKILL
after a time drawn from the whole life of a process, imports and writing of files included, and resumed by
--resume alone, until there were so many kills and the last run has come to its end. After every kill, each
epoch that was told of must be in the checkpoint; at every end, weights, states of optimiser and generators,
metrics and TensorBoard's curves must be those of the undisturbed run to the bit, each epoch and point once.
results/crash_test.json holds the counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import checkpoint
import evaluate
from benchmarks import timing
from errors import ArgumentParser, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "digits": "--dataset digits --epochs 4 --batch-size 32 --d-model 32 --num-blocks 2 --d-state 4 "
              "--checkpoint-every 7",
    "mnist": "--dataset mnist --epochs 3 --limit-train 1500 --d-model 32 --num-blocks 2 --d-state 4 "
             "--checkpoint-every 7",
}
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every point that was purged
# What two runs need not share; settings name folders.
CLOCK = {"seconds", "evaluation_seconds", "images_per_second", "settings", "run_id"}


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for task in arguments.datasets:
        with tempfile.TemporaryDirectory(prefix="crash-test-") as folder:
            rows.append(crash(task, arguments.kills, arguments.seed, Path(folder), arguments.data_dir,
                              arguments.device))
        row = rows[-1]
        print(f"{task}: kills survived, weights equal, epochs lost: "
              f"{row['survived']}, {row['equal']}, {row['epochs_lost']} "
              f"({row['runs']} runs, {row['doubled']} doubled points)", flush=True)
    result = {"machine": timing.machine(torch.device(arguments.device)), "seed": arguments.seed, "rows": rows}
    checkpoint.save_json(arguments.output, result)
    print(f"written to {arguments.output}")
    if any(row["survived"] < row["kills"] or row["equal"] < row["kills"] or row["epochs_lost"] > 0
           or row["doubled"] > 0 for row in rows):
        raise UserError("something was lost; see the lines above, and mend it")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Kill training runs at random moments and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="kills for each dataset")
    parser.add_argument("--datasets", nargs="+", choices=tuple(TASKS), default=tuple(TASKS),
                        help="what is trained on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the runs train")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments of the kills")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", metavar="DIR",
                        help="where MNIST is kept")
    parser.add_argument("--output", type=timing.output_file, default=argparse.SUPPRESS, metavar="FILE",
                        help="the JSON file (default: results/crash_test.json)")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills must be at least 1, but is {arguments.kills}")
    evaluate.pick_device(arguments.device)
    arguments.output = timing.output_of(parser, arguments, ROOT / "results" / "crash_test.json",
                                        ("kills", "datasets", "device"))
    return arguments


def crash(task: str, kills: int, seed: int, folder: Path, data_dir: Path, device: str) -> dict:
    """Counts of `kills` kills on one dataset; everything is written below `folder`.

    kills, runs, and how many kills were survived (the run went on by --resume), led to an end that equals
    the undisturbed one, and how many epochs were lost and points doubled.
    Raises UserError where the undisturbed run fails.
    """
    moments = random.Random(seed)
    undisturbed = folder / "undisturbed"
    began = time.monotonic()
    if start(task, undisturbed, data_dir, device).wait():
        raise UserError((undisturbed / "err").read_text().strip().rpartition("\n")[2].removeprefix("error: "))
    life = time.monotonic() - began
    right = final_state(undisturbed)
    row = {"dataset": task, "kills": kills, "runs": 0, "survived": 0, "equal": 0, "epochs_lost": 0,
           "doubled": 0}
    done = 0
    with tqdm(total=kills, desc=f"{task}: kills", unit="kill", disable=None, leave=False) as bar:
        while done < kills:
            place = folder / f"run-{row['runs']}"
            row["runs"] += 1
            own = waiting = 0  # kills of this run; those whose --resume has not shown yet that it goes on
            while True:
                process = start(task, place, data_dir, device)
                try:
                    process.wait(moments.random() * life if done < kills else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    done, own, waiting = done + 1, own + 1, waiting + 1
                    bar.update()
                told = re.findall(r"^epoch +(\d+)/", (place / "out").read_text(), re.M)
                row["epochs_lost"] += max(0, int((told or [0])[-1]) - epochs_saved(place))
                if process.returncode >= 0:
                    break
            if process.returncode == 0:
                row["survived"] += waiting
                found = final_state(place)
                row["equal"] += own if found == right else 0
                for part in [part for part in right | found if found.get(part) != right.get(part)]:
                    print(f"{task}, run {row['runs']}: another {part}", file=sys.stderr)
                row["doubled"] += doubled_points(place)
            else:
                print((place / "err").read_text(), file=sys.stderr)
            shutil.rmtree(place)
    return row


def start(task: str, place: Path, data_dir: Path, device: str) -> subprocess.Popen:
    """The training of `task` in the folder `place`, begun or resumed; it prints into out and err there."""
    place.mkdir(exist_ok=True)
    there = any((place / "checkpoints").glob("*.last.pt*"))
    command = ["--resume"] if there else [*shlex.split(TASKS[task]), "--run-name", "run", "--device", device,
                                          "--data-dir", str(data_dir.resolve())]
    with (place / "out").open("a") as out, (place / "err").open("a") as err:
        return subprocess.Popen([sys.executable, str(ROOT / "train_mamba.py"), *command], cwd=place,
                                stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def epochs_saved(place: Path) -> int:
    """How many epochs a resumed run finds done; 0 where it was killed before its first checkpoint."""
    path = place / "checkpoints" / "run.last.pt"
    if not checkpoint.exists(path):
        return 0
    return checkpoint.load_good(path)["epoch"]


def final_state(place: Path) -> dict[str, object]:
    """What a run ends with, comparable by ==: its checkpoints, metrics.jsonl, TensorBoard's curves."""
    lines = (place / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    state = {"metrics.jsonl": comparable([json.loads(line) for line in lines])}
    for name in ("run.pt", "run.last.pt"):
        state |= {f"{key} in {name}": comparable(value)
                  for key, value in checkpoint.load(place / "checkpoints" / name).items() if key not in CLOCK}
    return state | {f"curve {tag}": dict(points) for tag, points in curves(place).items()
                    if not tag.startswith("speed")}


def comparable(value: object) -> object:
    """Tensors as their bytes; without what the clock and the folders decide."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in CLOCK}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return value


def curves(place: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of TensorBoard's curves, by the curve's name."""
    events = EventAccumulator(str(place / "runs" / "run"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


def doubled_points(place: Path) -> int:
    """Points of TensorBoard's curves that are there more than once."""
    return sum(len(found) - len(dict(found)) for found in curves(place).values())


if __name__ == "__main__":
    run_script(main)
