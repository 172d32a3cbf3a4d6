"""Start training again and again, classify again and again, and see that nothing piles up. Linux only.

    python benchmarks/load_test.py                        some twenty minutes on two cores

Training is started on `digits` as a command, and as often within one process, as a notebook does it; pictures
are classified as `demo_mamba.py --image` does it, and drawings as the page of --serve does. After each,
temporary files, processes (zombies included) and open files that it left over are counted, and the memory
held is read: at the start, once everything is warm, and at the end. results/load_test.json holds the counts.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gc
import io
import itertools
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import data
import train_mamba
from benchmarks import timing
from errors import ArgumentParser, UserError, run_script
from serve import Answers
from trained import TrainedModel

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "vision_mamba2_mnist.pt"
TRAINING = shlex.split("--dataset digits --epochs 1 --limit-train 64 --d-model 16 --num-blocks 1 --d-state 4 "
                       "--device cpu")
LOADS = {"starts": "training starts within one process", "pictures": "pictures classified",
         "drawings": "drawings answered by the page", "commands": "training starts, each a command"}
GROWTH = 0.02  # of the memory; more is told as growing
LOOKS = 50     # at memory and open files, spread over a load


def main() -> None:
    arguments = parse_arguments()
    rows = []
    with tempfile.TemporaryDirectory(prefix="load-test-") as folder, own_temporary_folder(Path(folder)):
        for load in arguments.loads:
            count = arguments.starts if load in ("commands", "starts") else arguments.classifications
            rows.append({"load": load, **put_on(load, count, Path(folder), arguments.checkpoint)})
            print(line(rows[-1]), flush=True)
    result = {"machine": timing.machine(torch.device("cpu")), "rows": rows}
    checkpoint.save_json(arguments.output, result)
    print(f"written to {arguments.output}")
    if any(row["temporary_files"] or row["processes"] or row["open_files"] or row["grown"] > GROWTH
           for row in rows):
        raise UserError("something piles up; see the lines above, and mend it")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser("Start training and classify again and again, and see that nothing piles up.")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=tuple(LOADS), help="; ".join(
        f"{load}: {title}" for load, title in LOADS.items()))
    parser.add_argument("--starts", type=int, default=100, metavar="N", help="training starts of either kind")
    parser.add_argument("--classifications", type=int, default=10_000, metavar="N",
                        help="pictures, and as many drawings")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, metavar="PATH",
                        help="the model that classifies; of grey images")
    parser.add_argument("--output", type=timing.output_file, default=argparse.SUPPRESS, metavar="FILE",
                        help="the JSON file (default: results/load_test.json)")
    arguments = parser.parse_args()
    for name in ("starts", "classifications"):
        if getattr(arguments, name) < 5:
            parser.error(f"--{name} must be at least 5, to tell start from end, "
                         f"but is {getattr(arguments, name)}")
    if not Path("/proc/self/stat").exists():
        raise UserError("this test reads /proc, which only Linux has; run it there")
    arguments.output = timing.output_of(parser, arguments, ROOT / "results" / "load_test.json",
                                        ("loads", "starts", "classifications", "checkpoint"))
    return arguments


def line(row: dict) -> str:
    return (f"{row['count']:,} {LOADS[row['load']]}: {row['temporary_files']} temporary files, "
            f"{row['processes']} processes, {row['open_files']} open files left; memory "
            f"{row['first_mib']:.1f} MiB, then {row['last_mib']:.1f} ({100 * row['grown']:+.1f} %)")


@contextlib.contextmanager
def own_temporary_folder(folder: Path) -> Iterator[None]:
    """Within, this process and its children put their temporary files into `folder`/tmp."""
    (folder / "tmp").mkdir()
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None
    try:
        yield
    finally:
        tempfile.tempdir = before[1]
        if before[0] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[0]


def put_on(load: str, count: int, folder: Path, model: Path) -> dict:
    """Do it `count` times; what is left over of all of them, and the memory held at the start and at the end.

    count, temporary_files, processes and open_files (left over), first_mib and last_mib (medians over the
    second and the last fifth), grown (the fraction by which the last is above the first).
    """
    before = files(folder), processes()  # of whoever called this, or of another load: not this one's doing
    once = {"commands": command, "starts": start, "pictures": pictures, "drawings": drawings}[load](folder,
                                                                                                   model)
    memory, opened = [], []
    for number in tqdm(range(count), desc=load, disable=None, leave=False):
        of_a_command = once()
        if number % max(1, count // LOOKS) == 0:
            memory.append(of_a_command or held())
            opened.append(len(os.listdir("/proc/self/fd")))
    fifth = len(memory) // 5
    first, last = (statistics.median(part) for part in (memory[fifth:2 * fifth], memory[-fifth:]))
    return {"count": count, "temporary_files": len(files(folder) - before[0]),
            "processes": len(processes() - before[1]), "open_files": max(0, opened[-1] - opened[fifth]),
            "first_mib": first, "last_mib": last, "grown": last / first - 1}


# ---- The loads: each is a function that does it once; a command's returns the MiB that the command held ----


def flags(folder: Path, number: int) -> list[str]:
    return [*TRAINING, "--run-name", f"run-{number}", "--runs-dir", str(folder / "runs"), "--checkpoints-dir",
            str(folder / "checkpoints")]


def command(folder: Path, _) -> Callable[[], float]:
    """Training as a command of its own; once() returns the most memory that it ever held."""
    numbers = itertools.count()

    def once() -> float:
        with (folder / "out").open("w+") as out:
            # A session of its own, by which processes that it leaves behind are known.
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "train_mamba.py"), *flags(folder, next(numbers))],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            check(process.returncode, (folder / "out").read_text())
        SESSIONS.add(process.pid)
        forget_runs(folder)
        return usage.ru_maxrss / 2**10
    return once


def start(folder: Path, _) -> Callable[[], None]:
    """Training as a function call."""
    numbers = itertools.count()

    def once() -> None:
        said, arguments = io.StringIO(), sys.argv
        sys.argv = ["train_mamba.py", *flags(folder, next(numbers))]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                train_mamba.main()
        finally:
            sys.argv = arguments
        check(0, said.getvalue())
        forget_runs(folder)
    return once


def check(status: int, said: str) -> None:
    """Raise UserError where a training did not come to its end."""
    if status != 0 or "best on validation" not in said:
        raise UserError(f"a training ended with status {status}, saying: {said[-300:]}; mend that first")


def forget_runs(folder: Path) -> None:
    """Delete what a training writes on purpose, and nothing else."""
    for path in (folder / "checkpoints").glob("run-*.pt*"):
        path.unlink()
    for path in (folder / "runs").glob("run-*"):
        shutil.rmtree(path)


def digits() -> list[Image.Image]:
    """White on black, of 280 × 280 pixels, as the page's canvas sends them."""
    images = data.load("digits", Path("unused")).test.images[:100, 0].numpy()
    return [Image.fromarray(image).resize((280, 280), Image.Resampling.BICUBIC) for image in images]


def pictures(folder: Path, path: Path) -> Callable[[], None]:
    """A picture file read and classified."""
    model, paths = TrainedModel(path, torch.device("cpu"), folder / "runs"), []
    (folder / "pictures").mkdir(exist_ok=True)
    for number, image in enumerate(digits()):
        paths.append(folder / "pictures" / f"{number}.png")
        image.save(paths[-1])
    turns = itertools.cycle(paths)

    def once() -> None:
        probabilities = model.probabilities(model.picture(next(turns)))
        if not np.isfinite(probabilities).all():
            raise UserError(f"the model in {path} answers with NaN; train it anew")
    return once


def drawings(folder: Path, path: Path) -> Callable[[], None]:
    """A drawing answered by the page."""
    answers, urls = Answers(TrainedModel(path, torch.device("cpu"), folder / "runs")), []
    for image in digits():
        file = io.BytesIO()
        image.save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    turns = itertools.cycle(urls)

    def once() -> None:
        answer = answers.drawing(next(turns))
        if 'id="prediction"' not in answer:
            raise UserError(f"the page did not recognise a drawing: {answer[:200]}; mend that first")
    return once


# ---- What is left over ------------------------------------------------------------------------------------

SESSIONS: set[int] = set()  # of the commands that have ended


def held() -> float:
    """MiB of memory that this process holds now, garbage not counted."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processes() -> set[tuple[int, int]]:
    """Children of this process, zombies included, and what stems from a command that has ended.

    Each by its number and the time it was started at, as numbers are given again.
    """
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()  # from proc(5)'s third on
            parent, session, started = (int(fields[place]) for place in (1, 3, 19))
            if parent == os.getpid() or session in SESSIONS:
                found.add((int(path.parent.name), started))
    return found


def files(folder: Path) -> set[Path]:
    """Files and folders where temporary ones go, and among the checkpoints and runs, which were deleted."""
    return {path for name in ("tmp", "checkpoints", "runs") for path in (folder / name).rglob("*")}


if __name__ == "__main__":
    run_script(main)
