"""Which batch would have fitted, where the memory did not suffice for a training step.

    with memory.told_when_full(training):
        ...     "out of memory: --batch-size 4096 needs about 90 GiB, 70 GiB were free; try --batch-size 2048"
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator

import torch

import distributed
import evaluate
from errors import UserError, is_out_of_memory
from training import Training

KEPT_FREE = 0.1  # of the memory, for what a measurement on small batches does not see


@contextlib.contextmanager
def told_when_full(training: Training) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError with the batch size that would fit.

    What the failed step held is given back, and two small steps are measured; the training's weights are
    not to be used afterwards. With several processes the error is left as it is: they step together.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or distributed.size() > 1:
            raise
        traceback.clear_frames(error.__traceback__)  # their variables are the step's tensors
        training.optimizer.zero_grad()
        gc.collect()
        try:
            free, (fixed, each) = free_mib(training.device), need_mib(training)
        except (MemoryError, RuntimeError):
            raise error from None  # nothing is left to measure with
        if free is None:
            raise
        raise UserError(advice(training.settings.batch_size, fixed, each, free)) from None


def advice(batch_size: int, fixed: float, each: float, free: float) -> str:
    """The line for a step that takes `fixed` MiB and `each` more an image, where `free` MiB were."""
    needed = fixed + each * batch_size
    fits = int(((1 - KEPT_FREE) * free - fixed) / max(each, 1e-6))
    fits = min(fits, batch_size // 2)  # it did not fit, whatever the estimate says
    if fits > 1:
        fits = 2 ** (fits.bit_length() - 1)
    mend = (f"try --batch-size {fits}" if fits >= 1 else
            "that is too little for one image; lower --d-model or --num-blocks, or raise --patch-size")
    return (f"out of memory: --batch-size {batch_size} needs about {gib(needed)}, {gib(free)} were free; "
            f"{mend}")


def gib(mib: float) -> str:
    return f"{mib / 2**10:,.1f} GiB" if mib >= 1000 else f"{mib:,.0f} MiB"


def free_mib(device: torch.device) -> float | None:
    """MiB that tensors could still take on `device`; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) / 2**10
    except (OSError, KeyError):
        return None


def need_mib(training: Training) -> tuple[float, float]:
    """(MiB of a step whatever its batch, MiB more for each image), from steps on two small batches."""
    large = max(2, min(16, training.settings.batch_size // 4, len(training.dataset.train.labels)))
    small = large // 2

    def peak(count: int) -> float:
        images, labels = (part[:count].to(training.device) for part in training.dataset.train)
        return evaluate.peak_mib(lambda: training.update(images, labels), training.device)

    first, second = peak(small), peak(large)
    each = max(0.0, second - first) / (large - small)
    return max(0.0, first - each * small), each
