"""Blocks of VisionMamba2 against a Transformer's and an LSTM's: time and memory of a training step by length.

    python benchmarks/compare_architectures.py
    python benchmarks/compare_architectures.py --sizes 196x64 --networks mamba transformer --output part.json

Four layers of width 128 without stem and head, forward and backward, the gradients of input and weights.
Transformer and LSTM have as many parameters as ours (`mamba`, 16 states a channel as in the paper) within 5%,
which makes the Transformer's MLPs narrow. Two more do not: `transformer-4x`, the usual one with MLPs four
times as wide as the tokens, and `mamba-8`, with 8 states, as VisionMamba2 has by default.

On CUDA: matrix products in bfloat16, each step captured in a CUDA graph, as it is and under torch.compile;
attention by PyTorch's flash kernels or, not compiled, by cuDNN's, whichever take less time, looked for by
name among the kernels that ran; cuDNN's LSTM with bfloat16 weights, because autocast would make it float16.
On a CPU: float32, smaller sizes, nothing compiled. Memory is the most that PyTorch held during a step beyond
weights and input.

Whatever fails is recorded with its reason, and the rest goes on. results/compare_architectures_DEVICE.json
and the plots beside it are written after every size.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells each start and stop
import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import evaluate
import figures
from baselines import TransformerBlock, matched_size
from benchmarks import timing
from errors import ArgumentParser, run_script
from mamba_ssm_simple import MambaBlock

ROOT = Path(__file__).resolve().parent.parent
DEPTH, WIDTH = 4, 128
SIZES = {  # tokens × batch, the longest first: of a run that is cut short it is these that are asked for
    "cuda": ["50176x1", "12544x4", "3136x16", "784x64", "196x64", "49x64"],
    "cpu": ["3136x1", "784x4", "196x16", "49x16"],
}
FIT_FROM = 784  # tokens: shorter sequences do not fill the device, and say nothing of how time grows
PLAIN, CAPTURED, COMPILED = "plain", "captured", "compiled, captured"
ATTENTIONS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Size(NamedTuple):
    tokens: int  # a square, because our blocks read a grid in four directions
    batch: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.batch}"


class Row(NamedTuple):
    """One network at one size; where it failed, the times are None and `error` says why."""
    network: str
    variant: str
    tokens: int
    batch: int
    median_ms: float | None = None
    spread: float | None = None          # (slowest − fastest) / median
    peak_mib: float | None = None
    samples_ms: list[float] | None = None
    error: str | None = None
    attention: str | None = None         # a Transformer's on CUDA: the one of ATTENTIONS that took less time


# ---- The networks -----------------------------------------------------------------------------------------


def mamba(d_state: int = 16) -> nn.Module:
    return nn.Sequential(*(MambaBlock(WIDTH, "cross", index, d_state) for index in range(DEPTH)))


def transformer(mlp_width: int) -> nn.Module:
    return nn.Sequential(*(TransformerBlock(WIDTH, mlp_width) for _ in range(DEPTH)))


def lstm(hidden_size: int) -> nn.Module:
    return nn.LSTM(WIDTH, hidden_size, DEPTH, batch_first=True)


def builders() -> dict[str, Callable[[], nn.Module]]:
    """How to make each network."""
    ours = count(mamba())
    hidden, narrow = matched_size(lstm, ours), matched_size(transformer, ours)
    return {"mamba": mamba, "mamba-8": lambda: mamba(8), "transformer": lambda: transformer(narrow),
            "transformer-4x": lambda: transformer(4 * WIDTH), "lstm": lambda: lstm(hidden)}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- One step ---------------------------------------------------------------------------------------------


class Step:
    """Forward and backward of a network on one fixed input; calling it returns every gradient."""

    def __init__(self, network: str, module: nn.Module, size: Size, device: torch.device,
                 attention: str | None = None) -> None:
        self.network, self.module, self.device = network, module.to(device).train(), device
        self.attention = attention
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if network == "lstm":
            module.to(dtype)
        side = round(size.tokens**0.5)
        grid = (side, side) if network.startswith("mamba") else (size.tokens,)
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(size.batch, *grid, WIDTH, device=device, dtype=dtype, generator=generator)
        self.x.requires_grad_()
        with torch.no_grad():
            self.dy = torch.randn_like(self.forward())

    def forward(self) -> Tensor:
        autocast = self.device.type == "cuda" and self.network != "lstm"
        with (sdpa_kernel(ATTENTIONS[self.attention]) if self.attention else contextlib.nullcontext(),
              torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)):
            y = self.module(self.x)
        return y[0] if isinstance(y, tuple) else y

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), [self.x, *self.module.parameters()], self.dy)


def check_finite(step: Step) -> None:
    if not all(torch.isfinite(gradient).all() for gradient in step()):
        raise ValueError("a gradient is NaN or infinite")


def attention_kernels(step: Step) -> list[str]:
    """Names of the kernels that did the attention of a step. Raises ValueError where none was asked for."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    names = {event.name[:120] for event in profiler.events()}
    found = sorted(name for name in names if any(
        word in name.lower() for word in ("flash", "fmha", "sdpa", "attention", "softmax")))
    asked = "pytorch_flash" if step.attention == "flash" else step.attention  # cuDNN's say flash, too
    if not any(asked in name.lower() for name in found):
        raise ValueError(f"attention was not done by {step.attention}, but by {found or sorted(names)[:5]}")
    return found


# ---- All of them ------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse_arguments()
    device = evaluate.pick_device(arguments.device)
    torch.set_float32_matmul_precision("high")
    output = arguments.output
    makers = {name: make for name, make in builders().items() if name in arguments.networks}
    result = {"machine": timing.machine(device), "depth": DEPTH, "width": WIDTH,
              "precision": "bfloat16" if device.type == "cuda" else "float32",
              "parameters": {name: count(make()) for name, make in makers.items()},
              "repeats": arguments.repeats, "rows": [], "exponents": {}, "attention": {}}
    sizes = getattr(arguments, "sizes", [parse_size(text) for text in SIZES[device.type]])
    if arguments.merge and output.exists():
        with timing.older_file(output) as older:
            merge(result, older, sizes, makers)
    print(f"{timing.machine_line(device)}\n{DEPTH} layers, width {WIDTH}, parameters: "
          + ", ".join(f"{name} {number:,}" for name, number in result["parameters"].items()))
    for size in sizes:
        measured = measure(makers, size, device, arguments.repeats, not arguments.no_compile)
        show(measured)
        result["rows"] = sorted(result["rows"] + [row._asdict() for row in measured],
                                key=lambda row: row["tokens"])
        result["exponents"] = exponents(result["rows"])
        checkpoint.save_json(output, result)
        plots = draw(result, output)
    if device.type == "cuda":
        longest = [row for row in result["rows"] if (row["tokens"], row["batch"]) == max(sizes)]
        result["attention"] |= check_attention(makers, longest, device)
        checkpoint.save_json(output, result)
    for name, exponent in result["exponents"].items():
        print(f"time of one sequence grows with length to the power of {exponent:.3f}: {name}")
    print(f"written to {output} and, as plots, to {', '.join(plot.name for plot in plots)}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser("Time and memory of a training step by length: Mamba, Transformer, LSTM.")
    parser.add_argument("--device", choices=tuple(SIZES), help="where they run",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="TOKENSxBATCH",
                        default=argparse.SUPPRESS,
                        help="such as 784x64; tokens a square (default: those of the device)")
    parser.add_argument("--networks", nargs="+", choices=tuple(builders()), default=tuple(builders()),
                        help="which to measure")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--merge", action="store_true",
                        help="keep what the JSON file has of other sizes and networks, measured on the same "
                             "machine")
    parser.add_argument("--repeats", type=int, default=7,
                        help="samples of each time, of which the median counts")
    parser.add_argument("--output", type=timing.output_file, default=argparse.SUPPRESS,
                        help="the JSON file (default: results/compare_architectures_DEVICE.json)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, but is {arguments.repeats}")
    whole = ROOT / "results" / f"compare_architectures_{arguments.device}.json"
    arguments.output = timing.output_of(parser, arguments, whole, ("sizes", "networks", "no_compile"))
    return arguments


def parse_size(text: str) -> Size:
    try:
        tokens, batch = map(int, text.split("x"))
    except ValueError:
        tokens = batch = 0
    if tokens < 1 or batch < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise argparse.ArgumentTypeError("must be TOKENSxBATCH with a square number of tokens, "
                                         f"but is {text!r}")
    return Size(tokens, batch)


def merge(result: dict, older: dict, sizes: Sequence[Size], networks: Container[str]) -> None:
    """Take over the rows of other sizes and networks. Raises UserError for another machine."""
    timing.check_same_machine(older["machine"], result["machine"])
    again = {(size.tokens, size.batch) for size in sizes}
    result["rows"] = [row for row in older["rows"]
                      if (row["tokens"], row["batch"]) not in again or row["network"] not in networks]
    for key in ("parameters", "attention"):
        result[key] = older[key] | result[key]


def measure(makers: dict[str, Callable[[], nn.Module]], size: Size, device: torch.device, repeats: int,
            with_compile: bool) -> list[Row]:
    """Every network and variant at one size, timed in turn."""
    rows, functions = {}, {}
    for row in rows_to_measure(makers, size, device, with_compile):
        name = f"{label(row)}, {row.attention}"
        try:
            step = make_step(makers[row.network], row, device)
            check_finite(step)
            row = row._replace(peak_mib=evaluate.peak_mib(step, device))
            function = step if row.variant == PLAIN else timing.capture(step)
            timing.interleave({name: function}, 1, device)  # alone first: it may still fail
            functions[name] = function
        except Exception as error:  # a compiler, a kernel, the memory: the others go on
            row = row._replace(error=timing.reason(error))
            if device.type == "cuda":
                with contextlib.suppress(RuntimeError):
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
        rows[name] = row
    for name, samples in timing.interleave(functions, repeats, device).items():
        milliseconds = [1000 * sample for sample in samples]
        rows[name] = rows[name]._replace(median_ms=timing.median(milliseconds), spread=timing.spread(samples),
                                         samples_ms=milliseconds)
    return fastest(rows.values())


def rows_to_measure(makers: Iterable[str], size: Size, device: torch.device, with_compile: bool) -> list[Row]:
    """Every network and variant, a Transformer's on CUDA with each kernel of attention that it can have."""
    def attentions(network: str, variant: str) -> Sequence[str | None]:
        if not network.startswith("transformer") or device.type != "cuda":
            return (None,)
        # torch.compile (2.11) takes flash's, whichever is asked for: seen by the names of what ran.
        return ("flash",) if variant == COMPILED else tuple(ATTENTIONS)

    return [Row(network, variant, *size, attention=attention) for network in makers
            for variant in variants(network, device, with_compile)
            for attention in attentions(network, variant)]


def fastest(rows: Iterable[Row]) -> list[Row]:
    """One row of each network and variant: that of the attention which took less time."""
    found: dict[str, Row] = {}
    for row in rows:
        other = found.get(label(row))
        if other is None or (row.median_ms or math.inf) < (other.median_ms or math.inf):
            found[label(row)] = row
    return list(found.values())


def make_step(make: Callable[[], nn.Module], row: Row, device: torch.device) -> Step:
    torch.manual_seed(0)
    torch._dynamo.reset()  # what was compiled for another size or attention would do for this one, too
    module = torch.compile(make(), dynamic=False) if row.variant == COMPILED else make()
    return Step(row.network, module, Size(row.tokens, row.batch), device, row.attention)


def check_attention(makers: dict[str, Callable[[], nn.Module]], rows: Sequence[dict],
                    device: torch.device) -> dict[str, list[str] | str]:
    """The kernels of each Transformer's attention, or why they are not known.

    After all times, because a profiler that was on once may slow down what comes later.
    """
    found: dict[str, list[str] | str] = {}
    for row in (Row(**row) for row in rows if row["network"] in makers and row["attention"]):
        try:
            found[label(row)] = attention_kernels(make_step(makers[row.network], row, device))
        except Exception as error:  # no profiler on this machine, or not the kernel that was asked for
            found[label(row)] = timing.reason(error)
        print(f"attention of {label(row)}: {found[label(row)]}")
    return found


def variants(network: str, device: torch.device, with_compile: bool) -> list[str]:
    if device.type != "cuda":
        return [PLAIN]
    return [CAPTURED, COMPILED] if with_compile and network != "lstm" else [CAPTURED]


def label(row: Row | dict) -> str:
    fields = row._asdict() if isinstance(row, Row) else row
    return fields["network"] if fields["variant"] == PLAIN else f"{fields['network']}, {fields['variant']}"


def exponents(rows: list[dict]) -> dict[str, float]:
    """The power of the length with which the time of one sequence grows, fitted from FIT_FROM tokens on."""
    found = {}
    for name in dict.fromkeys(label(row) for row in rows):
        points = [(row["tokens"], row["median_ms"] / row["batch"]) for row in rows
                  if label(row) == name and row["tokens"] >= FIT_FROM and row["median_ms"]]
        if len(points) > 1:
            found[name] = float(np.polyfit(*np.log(np.array(points)).T, 1)[0])
    return found


# ---- What comes out ---------------------------------------------------------------------------------------


def show(rows: list[Row]) -> None:
    print(f"\n{rows[0].tokens} tokens × {rows[0].batch}")
    for row in rows:
        time = "" if row.median_ms is None else f"{row.median_ms:10.3f} ms{100 * row.spread:7.1f}%"
        memory = "" if row.peak_mib is None else f"{row.peak_mib:10.1f} MiB"
        print(f"  {label(row):<40}{time}{memory}{'  ' + row.error if row.error else ''}", flush=True)


def draw(result: dict, output: Path) -> list[Path]:
    """The two plots, of what a step costs by length, divided by its batch."""
    machine = result["machine"]
    sizes = dict.fromkeys(f"{row['tokens']} × {row['batch']}" for row in result["rows"])
    subtitle = (f"forward and backward of {DEPTH} layers, width {WIDTH}, {result['precision']}; "
                f"{machine.get('gpu') or machine['cpu']}, PyTorch {machine['torch']}\n"
                f"tokens × batch: {', '.join(sizes)}")
    plots = []
    for key, title, unit in (("median_ms", "Time of a training step, divided by its batch", "ms"),
                             ("peak_mib", "Memory of a training step, divided by its batch", "MiB")):
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in result["rows"]:
            if row[key]:
                curves.setdefault(label(row), []).append((row["tokens"], row[key] / row["batch"]))
        if curves:
            plots.append(output.with_name(f"{output.stem}_{'time' if unit == 'ms' else 'memory'}.png"))
            figures.save(figures.growth(curves, title, subtitle, "tokens", unit), plots[-1])
    return plots


if __name__ == "__main__":
    run_script(main)
