"""Images a second and memory at the size of ImageNet: our `imagenet` preset beside a Transformer as large.

    python benchmarks/throughput_imagenet.py                       on a GPU: 224 and 448 pixels, batch 128
    python benchmarks/throughput_imagenet.py --device cpu --sizes 64 --batch-size 2    a trial

Synthetic pictures, already on the device; forward, cross entropy and backward, bfloat16 on CUDA by autocast.
Stem and head are the same for all. `transformer` is as deep as ours, its MLPs as wide as makes the parameters
equal; `transformer-4x` has the usual MLPs, four times as wide as the tokens, and as many blocks as come
nearest. Each is measured as it is and with gradient checkpointing, which the preset uses; on CUDA also with
the step captured in a CUDA graph, where Python's time is none.

One network after the other, and round again; each leaves the memory empty to the next. Whatever fails is
recorded with its reason, and the rest goes on. results/throughput_imagenet.json is written after every size.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import VisionTransformer, count_on_meta, matched_config
from benchmarks import timing
from benchmarks.compare_architectures import CAPTURED, PLAIN, capture
from errors import ArgumentParser, UserError, run_script
from mamba_ssm_simple import VisionMamba2
from presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 1000


class Row(NamedTuple):
    """One network at one size; where it failed, the times are None and `error` says why."""

    network: str
    variant: str                    # plain, or captured in a CUDA graph
    checkpointing: bool
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
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device; use --device cpu and sizes for it, see --help")
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
    print(timing.machine_line(device))
    for size in arguments.sizes:
        rows = measure(makers, arguments.variants, size, arguments.batch_size, arguments.repeats, device)
        show(rows)
        result["rows"] += [row._asdict() for row in rows]
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
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
    parser.add_argument("--variants", nargs="+", choices=(PLAIN, CAPTURED), metavar="VARIANT",
                        default=argparse.SUPPRESS, help="plain, captured (default: on CUDA both, else plain)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--output", type=timing.output_file, help="the JSON file",
                        default=ROOT / "results" / "throughput_imagenet.json")
    arguments = parser.parse_args()
    if "variants" not in arguments:
        arguments.variants = [PLAIN, CAPTURED] if arguments.device == "cuda" else [PLAIN]
    if CAPTURED in arguments.variants and arguments.device == "cpu":
        parser.error("--variants captured needs --device cuda")
    for name in ("sizes", "batch_size", "d_model", "num_blocks", "patch_size", "repeats"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


# ---- The networks -----------------------------------------------------------------------------------------


def builders(d_model: int, num_blocks: int, patch_size: int) -> dict[str, Callable[[], nn.Module]]:
    """How to make each network."""
    config = {"num_classes": CLASSES, "d_model": d_model, "num_blocks": num_blocks, "in_channels": 3,
              "patch_size": patch_size}
    matched = matched_config("transformer", config)
    ours = count_on_meta(lambda: VisionMamba2(**config))

    def usual(blocks: int) -> VisionTransformer:
        return VisionTransformer(**config | {"num_blocks": blocks}, mlp_width=4 * d_model)

    blocks = min(range(1, num_blocks + 1),
                 key=lambda blocks: abs(count_on_meta(lambda: usual(blocks)) - ours))
    return {"mamba": lambda: VisionMamba2(**config), "transformer": lambda: VisionTransformer(**matched),
            "transformer-4x": lambda: usual(blocks)}


# ---- One step ---------------------------------------------------------------------------------------------


class Step:
    """Forward, loss and backward of a network on one batch; calling it computes every gradient anew."""

    def __init__(self, make: Callable[[], nn.Module], checkpointing: bool, size: int, batch_size: int,
                 device: torch.device) -> None:
        torch.manual_seed(0)
        self.model, self.device = make().to(device).train(), device
        self.model.gradient_checkpointing = checkpointing
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model.stem.to(memory_format=layout)
        self.images = torch.randn(batch_size, 3, size, size, device=device).to(memory_format=layout)
        self.labels = torch.randint(CLASSES, (batch_size,), device=device)

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


def measure(makers: dict[str, Callable[[], nn.Module]], variants: list[str], size: int, batch_size: int,
            repeats: int, device: torch.device) -> list[Row]:
    """Every network at one size, with gradient checkpointing and without."""
    rows = [Row(name, variant, checkpointing, size, batch_size, count_on_meta(make))
            for name, make in makers.items() for variant in variants for checkpointing in (False, True)]
    samples: list[list[float]] = [[] for _ in rows]
    for number in range(repeats):
        for index, row in enumerate(rows):
            if row.error is not None:
                continue
            step = function = None
            try:
                step = Step(makers[row.network], row.checkpointing, size, batch_size, device)
                if number == 0:
                    step.check_finite()
                    rows[index] = row = row._replace(peak_mib=peak_mib(step))
                function = capture(step) if row.variant == CAPTURED else step
                samples[index] += timing.interleave({"step": function}, 1, device)["step"]
            except Exception as error:  # a kernel, the memory: the others go on
                rows[index] = row._replace(
                    error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            del step, function  # and what they hold of the memory
            free(device)
    return [row if row.error else row._replace(
        median_ms=1000 * timing.median(times), images_per_second=batch_size / timing.median(times),
        spread=timing.spread(times)) for row, times in zip(rows, samples, strict=True)]


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
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def show(rows: list[Row]) -> None:
    print(f"\n{rows[0].image_size}×{rows[0].image_size} pixels, batch {rows[0].batch_size}")
    for row in rows:
        time = "" if row.median_ms is None else (f"{row.images_per_second:10,.0f} images/s"
                                                 f"{row.median_ms:10.1f} ms{100 * row.spread:6.1f}%")
        memory = "" if row.peak_mib is None else f"{row.peak_mib:10,.0f} MiB"
        error = "" if row.error is None else f"  {row.error}"
        print(f"  {label(row._asdict()):<46}{row.parameters:>12,}{time}{memory}{error}", flush=True)


def label(row: dict) -> str:
    return f"{row['network']}, {row['variant']}{', checkpointing' if row['checkpointing'] else ''}"


if __name__ == "__main__":
    run_script(main)
