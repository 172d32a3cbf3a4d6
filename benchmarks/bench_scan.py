"""The selective scan and a training step, timed against mambapy's parallel scan.

    python benchmarks/bench_scan.py                       everything, about three minutes on two cores
    python benchmarks/bench_scan.py --parts step --output step.json         only the training step
    python benchmarks/bench_scan.py --shapes 64,49,256,16 --repeats 3 --output one.json

mambapy (pip install mambapy) is the plain-PyTorch Mamba that people without a compiler use. Its scan gets the
same inputs and does the same maths: softplus, Δ, recurrence, D and gate; its results and gradients are
compared before anything is timed. All run in turn in one process, ours after theirs after ours, and a ratio
is the median over such pairs. The training step is of the same VisionMamba2, the scan alone exchanged; that
with no scan at all tells how many times faster than mambapy's it could ever be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

if "--plain" not in sys.argv:
    import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import evaluate
import mamba_ssm_simple
from benchmarks import cuda_table, timing
from errors import ArgumentParser, UserError, run_script
from selective_scan import available_implementations, choose_implementation, run_implementation

try:
    from mambapy.mamba import MambaBlock as TheirBlock
except ImportError:
    TheirBlock = None

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("scan", "step", "table")
BATCH, SIDE, STATES = 64, 28, 16  # of the training step: MNIST, 49 tokens an image, as many states as Mamba's
AGREEMENT = 1e-4      # ‖a − b‖ / ‖b‖ of output and gradients in float32, or nothing is timed


class Plan(NamedTuple):
    """What is measured on one kind of device, and what it should reach."""
    shapes: list[tuple[int, int, int, int]]  # (b, l, e, n)
    targets: dict[tuple, float]              # (task, tokens): how many times faster than mambapy to be


PLANS = {
    # The token grids of 28×28 images with patches of 2 and of 4, at the default width.
    "cpu": Plan([(64, 196, 256, 16), (64, 49, 256, 16)],
                {("forward + backward", 196): 80, ("forward + backward", 49): 40, ("training step", 49): 20}),
    "cuda": Plan([(64, 196, 256, 16), (64, 49, 256, 16)], {}),
}


class Row(NamedTuple):
    """One line of the table: one implementation at one task."""
    task: str
    shape: str
    implementation: str
    median_ms: float
    spread: float              # (slowest − fastest) / median
    ratio: float | None        # how many times faster than mambapy; None without mambapy
    target: float | None
    samples_ms: list[float]


def main() -> None:
    arguments = parse_arguments()
    device = evaluate.pick_device(arguments.device)
    plan = PLANS[device.type]
    machine = timing.machine(device)
    print(timing.machine_line(device))
    if machine["load"] is not None and machine["load"] > 0.5:
        print(f"load {machine['load']}: something else is running here; times and ratios will be off")
    if TheirBlock is None:
        print("mambapy is not installed, so its rows and all ratios are left out: pip install mambapy")
    print(f"\n{'':<20}{'(b, l, e, n)':<20}{'scan':<12}{'median':>12}{'spread':>9}{'against mambapy':>17}"
          f"{'target':>14}")
    rows: list[Row] = []
    table = None
    if "scan" in arguments.parts:
        for shape in getattr(arguments, "shapes", plan.shapes):
            rows += show(bench_scan(shape, arguments.repeats, device, plan.targets))
    if "step" in arguments.parts:
        rows += show(bench_step(arguments.repeats, device, plan.targets))
    if "table" in arguments.parts and device.type == "cuda":
        table = cuda_table.measure()
    output = arguments.output
    result = {"machine": machine, "mambapy": timing.version("mambapy"), "repeats": arguments.repeats,
              "rows": [row._asdict() for row in rows], "table": table}
    checkpoint.save_json(output, result)
    print(f"\nwritten to {output}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Time the selective scan and a training step against mambapy's scan.")
    parser.add_argument("--device", choices=tuple(PLANS), help="where the scans run",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="scan: forward, and forward with backward; step: a whole training step; "
                             "table: on a GPU, all shapes beside their floors")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="b,l,e,n", default=argparse.SUPPRESS,
                        help="shapes of the scan, such as 64,49,256,16 (default: those of the device)")
    parser.add_argument("--plain", action="store_true",
                        help="leave out cpu_settings.py, whose memory settings speed mambapy up, too")
    parser.add_argument("--repeats", type=int, default=7,
                        help="samples of each time, of which the median counts")
    parser.add_argument("--output", type=timing.output_file, default=argparse.SUPPRESS,
                        help="the JSON file (default: results/bench_scan_DEVICE.json, _plain with --plain)")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, but is {arguments.repeats}")
    if arguments.device == "cpu" and list(arguments.parts) == ["table"]:
        parser.error("--parts table is measured on a GPU alone; add scan or step")
    name = f"bench_scan_{arguments.device}{'_plain' if arguments.plain else ''}.json"
    arguments.output = timing.output_of(parser, arguments, ROOT / "results" / name, ("parts", "shapes"))
    return arguments


def parse_shape(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(re.fullmatch("[1-9][0-9]{0,6}", number) for number in numbers):
        raise argparse.ArgumentTypeError(f"must be four numbers b,l,e,n from 1 to 9,999,999, but is {text}")
    return tuple(map(int, numbers))


# ---- What is timed -----------------------------------------------------------------------------------------


def scans(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Every scan by name, with the arguments of `selective_scan`: ours, fastest first, then mambapy's."""
    functions = {name: lambda *args, name=name, **kwargs: run_implementation(name, *args, **kwargs)
                 for name in available_implementations(device) if name != "reference"}
    if TheirBlock is not None:
        functions["mambapy"] = their_scan
    return functions


def their_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
               delta_bias: Tensor, delta_softplus: bool = True) -> Tensor:
    """mambapy's parallel scan with what its MambaBlock does about it (mambapy/mamba.py, forward and ssm)."""
    delta = F.softplus(delta + delta_bias) if delta_softplus else delta + delta_bias
    y = TheirBlock.selective_scan(None, u, delta, A, B, C, D)  # uses nothing of the module
    return y * F.silu(z)


def bench_scan(shape: tuple[int, ...], repeats: int, device: torch.device,
               targets: dict[tuple, float]) -> list[Row]:
    """Forward without gradients, and forward with backward, of every scan."""
    inputs, dout = random_inputs(shape, device)
    functions = scans(device)

    def forward(scan: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return scan(*inputs, delta_softplus=True)

    def both(scan: Callable[..., Tensor]) -> list[Tensor]:
        out = scan(*inputs, delta_softplus=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    check_agreement({name: both(scan) for name, scan in functions.items()})
    rows = []
    for task, run in (("forward", forward), ("forward + backward", both)):
        calls = {name: lambda run=run, scan=scan: run(scan) for name, scan in functions.items()}
        times = timing.interleave(calls, repeats, device)
        rows += make_rows(task, shape, times, device, targets)
    return rows


class NoScan(torch.autograd.Function):
    """In a scan's place, to time what is around it: every gradient is there, and none cost anything."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias):
        ctx.save_for_backward(A, B, C, D, delta_bias)
        return u

    @staticmethod
    def backward(ctx, dout):
        dA, dB, dC, dD, d_bias = (torch.zeros_like(tensor) for tensor in ctx.saved_tensors)
        return dout, dout, dA, dB, dC, dD, dout, d_bias


def bench_step(repeats: int, device: torch.device, targets: dict[tuple, float]) -> list[Row]:
    """Forward, backward and AdamW of VisionMamba2, the scan alone exchanged, and without one."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 1, SIDE, SIDE, generator=random).to(device)
    labels = torch.randint(10, (BATCH,), generator=random).to(device)
    weights = mamba_ssm_simple.VisionMamba2(d_state=STATES).state_dict()

    def step_with(scan: Callable[..., Tensor]) -> Callable[[], Tensor]:
        model = mamba_ssm_simple.VisionMamba2(d_state=STATES).to(device)
        model.load_state_dict(weights)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> Tensor:
            with mock.patch.object(mamba_ssm_simple, "selective_scan", scan):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                return loss.detach()
        return step

    functions = scans(device)
    check_agreement({name: [step_with(scan)()] for name, scan in functions.items()})
    functions["no scan"] = lambda *inputs, delta_softplus: NoScan.apply(*inputs)
    times = timing.interleave({name: step_with(scan) for name, scan in functions.items()}, repeats, device)
    tokens = (SIDE // 4) ** 2
    return make_rows("training step", (BATCH, tokens, 256, STATES), times, device, targets)


def random_inputs(shape: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """u, delta, A, B, C, D, z, delta_bias as a fresh mixer makes them, and the output's gradient."""
    b, l, e, n = shape
    random = torch.Generator().manual_seed(0)
    shapes = ((b, l, e), (b, l, e), (e, n), (b, l, n), (b, l, n), (e,), (b, l, e), (e,), (b, l, e))
    tensors = [torch.randn(size, generator=random) for size in shapes]
    tensors[2] = -torch.arange(1.0, n + 1).repeat(e, 1)
    tensors[7] -= 4.5  # softplus is about 0.01
    *inputs, dout = (tensor.to(device) for tensor in tensors)
    return [tensor.requires_grad_() for tensor in inputs], dout


def check_agreement(results: dict[str, list[Tensor]]) -> None:
    """Stop where two scans disagree: a time of something else would mean nothing."""
    first, *others = results
    for other in others:
        worst = max(((a - b).norm() / b.norm()).item()
                    for a, b in zip(results[other], results[first], strict=True))
        if not worst <= AGREEMENT:
            raise UserError(f"{other} and {first} disagree, relative error {worst:.1e}; nothing is timed")


# ---- The table ---------------------------------------------------------------------------------------------


def make_rows(task: str, shape: tuple[int, ...], times: dict[str, list[float]], device: torch.device,
              targets: dict[tuple, float]) -> list[Row]:
    """One row an implementation; the target is for the one that `selective_scan` chooses."""
    chosen = choose_implementation(torch.empty(1, 1, 1, device=device))
    return [Row(task, ",".join(map(str, shape)), name, 1000 * timing.median(samples), timing.spread(samples),
                timing.ratio(times["mambapy"], samples) if "mambapy" in times else None,
                targets.get((task, shape[1])) if name == chosen else None,
                [1000 * sample for sample in samples])
            for name, samples in times.items()]


def show(rows: list[Row]) -> list[Row]:
    """Print rows as they come."""
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.1f}×"
        verdict = ""
        if row.target is not None and row.ratio is not None:
            verdict = f"{row.target:.0f}× {'pass' if row.ratio >= row.target else 'miss'}"
        print(f"{row.task:<20}{row.shape:<20}{row.implementation:<12}{row.median_ms:>9.2f} ms"
              f"{row.spread:>9.0%}{ratio:>17}{verdict:>14}", flush=True)
    return rows


if __name__ == "__main__":
    run_script(main)
