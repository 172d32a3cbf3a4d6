"""Images a second and memory at the size of ImageNet: our `imagenet` preset beside a Transformer as large.

    python benchmarks/throughput_imagenet.py                       on a GPU: 224 and 448 pixels, batch 128
    python benchmarks/throughput_imagenet.py --sizes 448 --variants plain compiled --merge    a part of it
    python benchmarks/throughput_imagenet.py --device cpu --sizes 64 --batch-size 2           a trial

Synthetic pictures, already on the device; forward, cross entropy and backward, bfloat16 on CUDA by autocast.
Stem and head are the same for all. `transformer` is as deep as ours, its MLPs as wide as makes the parameters
equal; `transformer-4x` has the usual MLPs, four times as wide as the tokens, and as many blocks as come
nearest. Each as it is, with its blocks under torch.compile, and both once more with the whole step captured
in a CUDA graph, where Python's time is none: so train_mamba.py trains. With gradient checkpointing nothing is
captured: it looks at the state of the random numbers, which a capture forbids. Memory is that of a step
before the capture.

One network after the other, each leaving the memory empty to the next. Whatever fails, for want of memory
say, is recorded with its reason, and the rest goes on. results/throughput_imagenet.json, on a CPU
throughput_imagenet_cpu.json, is written after every line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import evaluate
from baselines import VisionTransformer, count_on_meta, matched_config
from benchmarks import timing
from errors import ArgumentParser, UserError, as_flag, run_script
from mamba_ssm_simple import VisionMamba2
from presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 1000
NETWORKS = ("mamba", "transformer", "transformer-4x")
VARIANTS = ("plain", "captured", "compiled", "compiled-captured", "checkpointing", "compiled-checkpointing")


class Row(NamedTuple):
    """One network at one size; where it failed, the times are None and `error` says why."""

    network: str
    variant: str                    # one of VARIANTS
    image_size: int
    batch_size: int
    parameters: int
    images_per_second: float | None = None
    median_ms: float | None = None
    spread: float | None = None     # (slowest − fastest) / median
    peak_mib: float | None = None   # CUDA alone
    error: str | None = None


def main() -> None:
    arguments = parse_arguments()
    device = evaluate.pick_device(arguments.device)
    torch.set_float32_matmul_precision("high")
    try:
        makers = builders(arguments.d_model, arguments.num_blocks, arguments.patch_size)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"no networks can be built with these sizes ({str(error)[:160]}); choose others by "
                        "--d-model, --num-blocks and --patch-size") from error
    result = {"machine": timing.machine(device), "d_model": arguments.d_model,
              "num_blocks": arguments.num_blocks, "patch_size": arguments.patch_size,
              "precision": "bfloat16" if device.type == "cuda" else "float32",
              "repeats": arguments.repeats, "rows": []}
    if arguments.merge and arguments.output.exists():
        with timing.older_file(arguments.output) as older:
            result["rows"] = older_rows(older, result)
    print(timing.machine_line(device))
    for size in arguments.sizes:
        print(f"\n{size}×{size} pixels, batch {arguments.batch_size}")
        for variant in arguments.variants:
            for name in arguments.networks:
                row = Row(name, variant, size, arguments.batch_size, count_on_meta(makers[name]))
                row = measure(row, makers[name], arguments.repeats, device)
                show(row)
                result["rows"] = [each for each in result["rows"] if not same(each, row)] + [row._asdict()]
                checkpoint.save_json(arguments.output, result)
    print(f"written to {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    preset = PRESETS["imagenet"].settings
    parser = ArgumentParser("Images a second and memory of forward and backward: ours and a Transformer.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where they run",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], metavar="PIXELS",
                        help="sides of the square images")
    parser.add_argument("--batch-size", type=int, default=preset["batch_size"], help="images a step")
    parser.add_argument("--d-model", type=int, default=preset["d_model"], help="width of the tokens")
    parser.add_argument("--num-blocks", type=int, default=preset["num_blocks"], help="Mamba blocks")
    parser.add_argument("--patch-size", type=int, default=preset["patch_size"], help="pixels a token's side")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which to measure")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=argparse.SUPPRESS,
                        help="how each is run (default: all on CUDA, else plain and checkpointing)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each, of which the median counts")
    parser.add_argument("--merge", action="store_true",
                        help="keep the other lines of the JSON file, measured on the same machine")
    parser.add_argument("--output", type=timing.output_file, default=argparse.SUPPRESS,
                        help="the JSON file (default: results/throughput_imagenet.json, on a CPU "
                             "throughput_imagenet_cpu.json)")
    arguments = parser.parse_args()
    name = f"throughput_imagenet{'_cpu' if arguments.device == 'cpu' else ''}.json"
    arguments.output = timing.output_of(parser, arguments, ROOT / "results" / name, (
        "sizes", "batch_size", "d_model", "num_blocks", "patch_size", "networks", "variants"))
    if "variants" not in arguments:
        arguments.variants = VARIANTS if arguments.device == "cuda" else ("plain", "checkpointing")
    for variant in arguments.variants:
        if "captured" in variant and arguments.device == "cpu":
            parser.error(f"--variants {variant} needs --device cuda")
    for name in ("sizes", "batch_size", "d_model", "num_blocks", "patch_size", "repeats"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"{as_flag(name)} must be at least 1")
    return arguments


def older_rows(older: dict, result: dict) -> list[dict]:
    """The rows of an older file. Raises UserError where another machine or other networks made them."""
    for key in ("d_model", "num_blocks", "patch_size"):
        if older[key] != result[key]:
            raise UserError(f"the older file has {key} {older[key]}; leave out --merge")
    timing.check_same_machine(older["machine"], result["machine"])
    return older["rows"]


def same(older: dict, row: Row) -> bool:
    """Whether both are of one network, variant and size."""
    return all(older[key] == getattr(row, key) for key in Row._fields[:4])


# ---- The networks -----------------------------------------------------------------------------------------


def builders(d_model: int, num_blocks: int, patch_size: int) -> dict[str, Callable[[], nn.Module]]:
    """How to make each network."""
    config = {"num_classes": CLASSES, "d_model": d_model, "num_blocks": num_blocks, "in_channels": 3,
              "patch_size": patch_size, "d_state": PRESETS["imagenet"].settings["d_state"]}
    matched = matched_config("transformer", config)
    ours = count_on_meta(lambda: VisionMamba2(**config))

    def usual(blocks: int) -> VisionTransformer:
        return VisionTransformer(**matched | {"num_blocks": blocks, "mlp_width": 4 * d_model})

    blocks = min(range(1, num_blocks + 1),
                 key=lambda blocks: abs(count_on_meta(lambda: usual(blocks)) - ours))
    return {"mamba": lambda: VisionMamba2(**config), "transformer": lambda: VisionTransformer(**matched),
            "transformer-4x": lambda: usual(blocks)}


# ---- One step ---------------------------------------------------------------------------------------------


class Step:
    """Forward, loss and backward of a network on one batch; calling it computes every gradient anew."""

    def __init__(self, make: Callable[[], nn.Module], variant: str, size: int, batch_size: int,
                 device: torch.device) -> None:
        torch.manual_seed(0)
        self.model, self.device = evaluate.on_device(make(), device).train(), device
        self.model.gradient_checkpointing = "checkpointing" in variant
        images = torch.randn(batch_size, 3, size, size, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (batch_size,), device=device)
        if "compiled" in variant:  # block by block: alike, they are compiled once and not 24 times
            for block in self.model.blocks:
                block.compile(dynamic=False)

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def check_finite(self) -> None:
        """Raise ValueError where the loss or a gradient is NaN or infinite."""
        loss = self()
        if not all(torch.isfinite(each).all() for each in
                   (loss, *(parameter.grad for parameter in self.model.parameters()))):
            raise ValueError("the loss or a gradient is NaN or infinite")


def measure(row: Row, make: Callable[[], nn.Module], repeats: int, device: torch.device) -> Row:
    """The row with its times and memory, or with the reason why there are none."""
    step = function = None
    try:
        step = Step(make, row.variant, row.image_size, row.batch_size, device)
        step.check_finite()
        row = row._replace(peak_mib=peak_mib(step))
        function = timing.capture(step) if "captured" in row.variant else step
        times = timing.interleave({"step": function}, repeats, device)["step"]
        row = row._replace(median_ms=1000 * timing.median(times), spread=timing.spread(times),
                           images_per_second=row.batch_size / timing.median(times))
    except Exception as error:  # a compiler, a kernel, the memory: the others go on
        row = row._replace(error=timing.reason(error))
    del step, function  # and what they hold of the memory
    if "compiled" in row.variant:
        torch.compiler.reset()  # or it would count the next network as the same one, changed too often
    free(device)
    return row


def peak_mib(step: Step) -> float | None:
    """MiB that PyTorch held at most during a step, weights and images included; None but on CUDA."""
    if step.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def free(device: torch.device) -> None:
    """Leave the memory empty to the next network."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # what has failed before is recorded already
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def show(row: Row) -> None:
    time = "" if row.median_ms is None else (f"{row.images_per_second:10,.0f} images/s"
                                             f"{row.median_ms:10.1f} ms{100 * row.spread:6.1f}%")
    memory = "" if row.peak_mib is None else f"{row.peak_mib:10,.0f} MiB"
    error = "" if row.error is None else f"  {row.error}"
    print(f"  {label(row._asdict()):<40}{row.parameters:>12,}{time}{memory}{error}", flush=True)


def label(row: dict) -> str:
    return f"{row['network']}, {row['variant'].replace('-', ', ')}"


if __name__ == "__main__":
    run_script(main)
