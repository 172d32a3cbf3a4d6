"""What a trained model can do and what it costs, for every script that asks.

    device = pick_device("auto")
    model = rebuild(checkpoint.load(path), device)
    probabilities = predict(model, dataset.test, dataset, device)
    costs = measure(model, shape=(1, 28, 28), device=device)
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import augment
import data
from baselines import ARCHITECTURES
from errors import UserError

SECONDS = 2.0  # how long one batch size is timed


def pick_device(name: str) -> torch.device:
    """The device `name`; "auto" is CUDA where there is one, else the CPU. Raises UserError if missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device; use --device cpu, or install PyTorch for CUDA")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("PyTorch finds no MPS device; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r}; choose auto, cpu, cuda or mps") from error


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} ({platform.machine()}, {torch.get_num_threads()} threads)"


def rebuild(checkpoint: dict, device: torch.device | str) -> nn.Module:
    """The model of a checkpoint, with its weights, on `device`, in evaluation mode.

    Raises UserError where the architecture is unknown, the config builds nothing or the weights do not fit.
    """
    architecture = checkpoint["architecture"]
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(f"the checkpoint holds a model of kind {architecture!r}; this version knows "
                        f"{', '.join(ARCHITECTURES)}")
    try:
        model = ARCHITECTURES[architecture](**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # whatever a damaged config or state_dict makes torch and Python raise
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's config or weights do not fit this version's {architecture} model "
                        f"({type(error).__name__}: {reason[:160]}); train it anew") from error
    return on_device(model, device).eval()


def on_device(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model on `device`, its stem channels-last, as tokens are, where convolutions are faster so."""
    model = model.to(device)
    kind, in_channels = torch.device(device).type, model.stem[0].in_channels
    if kind == "cpu" or (kind == "cuda" and in_channels > 1):
        model.stem.to(memory_format=torch.channels_last)
    return model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within `with` all of `model` is in evaluation mode; afterwards each part of it is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def predict(model: nn.Module, split: data.Split, dataset: data.Dataset, device: torch.device | str,
            batch_size: int = 512) -> Tensor:
    """Class probabilities of every image of `split`, (N, classes) float32 on the CPU.

    `dataset` says how pixels are normalised. Progress shows on stderr where that is a terminal. The
    model is left in the mode, training or evaluation, that it came in.
    """
    probabilities = []
    with evaluation_mode(model):
        for images, _ in tqdm(data.epoch_batches(split, batch_size, None, shuffle=False), desc="predict",
                              total=data.num_batches(split, batch_size), unit="batch", leave=False,
                              disable=None):
            logits = model(augment.normalize(images.to(device), dataset.mean, dataset.std))
            probabilities.append(logits.float().softmax(dim=-1))
    return torch.cat(probabilities).cpu()


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose most probable class is their label."""
    return (probabilities.argmax(1) == labels.cpu()).double().mean().item()


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over the images, in nats."""
    return F.nll_loss(probabilities.double().clamp(min=1e-12).log(), labels.cpu()).item()


@torch.inference_mode()
def measure(model: nn.Module, shape: tuple[int, int, int], device: torch.device | str) -> dict:
    """What running `model` on images of `shape` (C, H, W) costs, float32, by the clock.

    parameters          numbers trained
    multiply_adds       of one image: `count_multiply_adds`
    latency_ms          median time of a batch of 1
    images_per_second   {batch size: median} for 1, 64 and 1024
    peak_memory_mib     the most memory held so far, None where the system does not tell
    peak_memory_of      "CUDA allocations" or "the whole process"

    Each time is a median after warm-up, the images already on the device.
    """
    device = torch.device(device)
    model.eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rates = images_per_second(model, shape, device)
    memory, memory_of = _peak_memory(device)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": count_multiply_adds(model, torch.zeros(1, *shape, device=device)),
        "latency_ms": 1000 / rates[1],
        "images_per_second": rates,
        "peak_memory_mib": memory,
        "peak_memory_of": memory_of,
    }


@torch.inference_mode()
def images_per_second(model: nn.Module, shape: tuple[int, int, int],
                      device: torch.device) -> dict[int, float]:
    """{batch size: images/s} for 1, 64 and 1024 images of `shape` (C, H, W), float32, by medians."""
    return {batch: batch / median_seconds(model, torch.randn(batch, *shape, device=device))
            for batch in tqdm((1, 64, 1024), desc="measure", unit="size", leave=False, disable=None)}


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """MiB that PyTorch's tensors took at most in the second of two calls, beyond what they took before."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # The profiler tells its starts and stops on stderr where it is not asked to be quiet.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        result = call()  # noqa: F841  (held, so that its end is not in the profile)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events()
               if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0) / 2**20


def count_multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass over `images`.

    Counted are matrix products and convolutions, as torch.utils.flop_counter sees them (it counts a
    multiply-add as 2), and the selective scan: 3 for each batch item, token, channel and state, namely
    Δ B u, the step of h and C · h. Left out, as is usual, are normalisation, activations, the scan's
    exponentials and every other elementwise operation.
    """
    def scan(u, delta, A, *rest, out_shape=None, **kwargs) -> int:  # shapes: (b, l, e), (b, l, e), (e, n)
        b, l, e = u
        return 2 * 3 * b * l * e * A[1]

    def convolution(x, weight, *rest, out_shape=None, **kwargs) -> int:  # (b, l, e), (e, 1, w)
        b, l, e = x
        return 2 * b * l * e * weight[2]

    operators = torch.ops.vision_mamba2
    ours = {operators.selective_scan: scan, operators.causal_conv_silu: convolution}
    # Without the libraries' own LSTMs and the CPU's attention, which the counter does not see into.
    with (sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(action="ignore"), torch.no_grad(),
          torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False),
          FlopCounterMode(display=False, custom_mapping=ours) as counter):
        model(images)
    return counter.get_total_flops() // 2


def median_seconds(model: Callable[[Tensor], object], images: Tensor) -> float:
    """Median seconds of a forward pass: two to warm up, then at least 3 and at most 200."""
    def once() -> float:
        start = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        elif images.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    once()
    expected = once()
    return statistics.median(once() for _ in range(min(200, max(3, int(SECONDS / max(expected, 1e-6))))))


def _peak_memory(device: torch.device) -> tuple[float | None, str]:
    """(MiB, whose memory it is)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "CUDA allocations"
    try:
        import resource
    except ImportError:  # Windows
        return None, "the whole process"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 2**10), "the whole process"
