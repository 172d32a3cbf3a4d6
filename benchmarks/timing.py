"""Fair times: functions run in turn in one process, medians of several, the machine named.

    times = interleave({"ours": f, "theirs": g}, repeats=7, device=torch.device("cpu"))
    median(times["ours"]), spread(times["ours"]), ratio(times["theirs"], times["ours"])
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from errors import ArgumentParser, UserError, as_flag

SAMPLE_SECONDS = 0.02   # a sample of a faster function is the mean of as many calls as take this long
MOST_CALLS = 1000


def interleave(functions: dict[str, Callable[[], object]], repeats: int,
               device: torch.device) -> dict[str, list[float]]:
    """Seconds of a call of each function, `repeats` samples each, taken in turn: A B C A B C …

    What else the machine does meanwhile then meets all of them, and sample i of one belongs to sample i of
    another. Before that each is called twice: the first call compiles, the second says how long one takes.
    Each sample follows a call that does not count, so that none pays for the caches the one before it filled.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / _seconds(function, 1, device))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            times[name].append(_seconds(function, calls[name], device))
    return times


def _seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Mean seconds of `calls` calls, by CUDA events on a GPU and by the clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begun) / calls


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """(slowest − fastest) / median: the most that two runs of this benchmark could disagree."""
    return (max(samples) - min(samples)) / median(samples)


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over pairs of samples taken one after the other."""
    return median([a / b for a, b in zip(theirs, ours, strict=True)])


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """`function` as a CUDA graph; call what is returned to run it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever is made at the first call is made outside of the graph
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(_kept: Callable[[], object] = function) -> None:  # the graph reads what belongs to it
        graph.replay()

    return replay


def reason(error: Exception) -> str:
    """Why a measurement failed, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def output_file(text: str) -> Path:
    """An argument's type: a file that can be replaced; it and its folder may be new."""
    path = Path(text)
    path = path.resolve() if path.is_symlink() else path  # what it points to is replaced, and not the link
    there = next((folder for folder in path.absolute().parents if folder.exists()), path)
    fits = (os.access(path, os.W_OK) and path.is_file()) or not path.exists()  # a device is no such file
    if not (fits and there.is_dir() and os.access(there, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; choose another file")
    return path


def output_of(parser: ArgumentParser, arguments: argparse.Namespace, default: Path,
              parts: Sequence[str]) -> Path:
    """The file of --output or, without it, the `default` one, in which the whole benchmark is kept.

    A command in which one of the flags `parts` is not as it is by default measures something less or else:
    raises UserError where that would replace the default file, and nothing is said of --merge.
    """
    if "output" in arguments:
        return arguments.output
    changed = [name for name in parts if name in arguments
               and _sorted(getattr(arguments, name)) != _sorted(parser.get_default(name))]
    if changed and default.exists() and not getattr(arguments, "merge", False):
        merge = ", or add --merge" if "merge" in arguments else ""
        parser.error(f"with {as_flag(changed[0])} this is not what {default} holds, and would "
                     f"replace it; name another file by --output{merge}")
    return default


def _sorted(value: object) -> object:
    """In whatever order several values were named."""
    return sorted(value) if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def older_file(path: Path) -> Iterator[dict]:
    """What a file to --merge with holds.

    Raises UserError where it cannot be read, or has not what is looked for in it.
    """
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of this benchmark ({type(error).__name__}); delete it, or leave "
                        "out --merge") from error


def output_folder(text: str) -> Path:
    """An argument's type: a folder where files can be written; it may be new."""
    path = Path(text)
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"in {text} nothing can be written; choose another folder")
    return path


def machine(device: torch.device) -> dict:
    """What a time depends on: the chip, cores and threads, versions, and how busy the machine was."""
    facts = {
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": version("numba"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda,
                  "triton": version("triton")}
    return facts


def check_same_machine(older: dict, now: dict) -> None:
    """Raise UserError where what a file tells of its `machine` is not this one: its figures would not mix."""
    for key in ("cpu", "gpu", "torch"):
        if older.get(key) != now.get(key):
            raise UserError(f"the older file was measured with another {key}; leave out --merge")


def machine_line(device: torch.device) -> str:
    """`machine` in one line for people."""
    facts = machine(device)
    chip = facts["gpu"] if device.type == "cuda" else f"{facts['cpu']}, {facts['cores']} cores"
    libraries = ", ".join(f"{name} {facts[key]}" for name, key in
                          (("PyTorch", "torch"), ("Numba", "numba"), ("Triton", "triton")) if facts.get(key))
    return f"{chip}, {facts['threads']} threads; {libraries}; Python {facts['python']}, {facts['system']}"


def cpu_name() -> str:
    """The CPU's model, as Linux or Python names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
