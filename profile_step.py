"""Where the time of a training step goes: python train_mamba.py --profile, with any other flags.

    matrix products                 41.2 %
    scan                            23.0 %
    ...
    31.5 ms a step of 64 images
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

import augment
import data
from training import Training

WARM_UP, STEPS, PROFILED = 5, 20, 10  # steps: before anything is measured, timed, looked into
ROUNDS = 3  # of looking into, of which the last counts: what the profiler keeps moves the tensors in memory,
            # and the first ones ask the system for more, which takes longer than many an operator

# The ranges stand for all that happens within them, the names for an operator and what it calls, unless that
# has a name of its own.
RANGES = ("optimiser", "augmentation, data")
NAMES = {"matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear|mkldnn_linear)\b|_addmm_activation",
         "convolutions": r"[cC]onv", "scan": r"\bscan\b|selective_scan|SelectiveScan",
         "norms": r"[nN]orm", "attention": r"attention|Attention", "LSTM": r"lstm|rnn|Lstm|Rnn",
         "loss": r"cross_entropy|nll_loss|log_softmax|NllLoss|LogSoftmax"}
ELEMENTWISE = "elementwise, sums, copies"  # every other operator of PyTorch's
OTHER = "other"                            # Python and autograd between the operators
GROUPS = (*NAMES, *RANGES, ELEMENTWISE, OTHER)


def show(training: Training) -> None:
    """Train some steps, the weights being lost afterwards, and print the shares of their time."""
    batches = endless(training)
    with tqdm(total=WARM_UP + STEPS + ROUNDS * PROFILED, desc="profile", unit="step", leave=False,
              disable=None) as bar:
        training.model.train()
        milliseconds = milliseconds_a_step(training, batches, bar)
        for _ in range(ROUNDS):
            shares = shares_of_a_step(training, batches, bar)
    print("\n".join(f"{group:<28}{100 * share:>7.1f} %" for group, share in
                    sorted(shares.items(), key=lambda pair: (pair[0] == OTHER, -pair[1]))))
    clock = "of the device's time" if training.device.type == "cuda" else "of the time"
    print(f"{'together':<28}{100 * sum(shares.values()):>7.1f} % {clock}\n"
          f"{milliseconds:,.2f} ms a step of {training.settings.batch_size} images")


def endless(training: Training) -> Iterator:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        order = torch.Generator(training.device).manual_seed(epoch)
        yield from data.epoch_batches(training.dataset.train, training.settings.batch_size, order)


def milliseconds_a_step(training: Training, batches: Iterator, bar: tqdm) -> float:
    """The time of a step as training runs it, on CUDA as a captured graph."""
    def wait() -> float:
        if training.device.type == "cuda":
            torch.cuda.synchronize(training.device)
        return time.perf_counter()

    for index, batch in enumerate(itertools.islice(batches, WARM_UP + STEPS)):
        if index == WARM_UP:
            started = wait()
        training.train_step(*batch)
        bar.update()
    return 1000 * (wait() - started) / STEPS


def shares_of_a_step(training: Training, batches: Iterator, bar: tqdm) -> dict[str, float]:
    """{group: fraction of a step's time}, which sum to 1: of the clock's on a CPU, of the kernels' on CUDA.

    A captured graph does not tell which operator its kernels are of, so on CUDA, too, the steps run one
    operator after the other; the kernels are the same.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells its starts and stops on stderr
    on_cuda = training.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with ranges(training, on_cuda), profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            with record_function("step"):
                with record_function(RANGES[1]):
                    batch = next(batches)
                training.set_rates()
                training.update(*batch)
            bar.update()
        if on_cuda:
            torch.cuda.synchronize(training.device)
    # Events outside "step" are the profiler's own, and what the device did for none of our operators.
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    times = Counter()
    groups = group_of_each(events)
    for event in events:
        if on_cuda or within(event, "step"):
            times[groups[id(event)]] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(times.values())
    return {group: times[group] / total for group in GROUPS if times[group] > 0}


@contextlib.contextmanager
def ranges(training: Training, on_cuda: bool) -> Iterator[None]:
    """Mark what the profiler cannot tell apart by operators: the parts of a step, and our kernels on CUDA."""
    def marked(owner: object, name: str, label: str) -> contextlib.AbstractContextManager:
        return mock.patch.object(owner, name, record_function(label)(getattr(owner, name)))

    with contextlib.ExitStack() as stack:
        for name in ("augment", "normalize"):
            stack.enter_context(marked(augment, name, RANGES[1]))
        stack.enter_context(marked(training.optimizer, "step", RANGES[0]))
        stack.enter_context(marked(torch.nn.utils, "clip_grad_norm_", RANGES[0]))
        stack.enter_context(marked(training.scaler, "unscale_", RANGES[0]))
        if on_cuda:
            from selective_scan import block_cuda, causal_conv_cuda, cuda
            for module, label in ((cuda, "scan"), (causal_conv_cuda, "conv"), (block_cuda, "norm")):
                for name, value in list(vars(module).items()):
                    if inspect.isfunction(value) and value.__module__ == module.__name__:
                        stack.enter_context(marked(module, name, label))
        yield


def group_of_each(events: list[FunctionEvent]) -> dict[int, str]:
    """{id(event): group}; what a backward does belongs to its forward's group, unless its name says more."""
    forward = {}
    for event in events:
        group = own_group(event)
        if group and event.sequence_nr >= 0 and not within(event, "autograd::engine"):
            forward.setdefault(event.sequence_nr, group)
    found = {}
    for event in events:
        group = own_group(event)
        for ancestor in line_of(event):
            if group is None and ancestor.name.startswith("autograd::engine"):
                group = forward.get(ancestor.sequence_nr)
        if group is None:
            group = ELEMENTWISE if event.name.startswith(("aten::", "vision_mamba2::")) else OTHER
        found[id(event)] = group
    return found


def own_group(event: FunctionEvent) -> str | None:
    """The range it lies in, or else what the nearest name up its line of callers says; None for neither."""
    line = list(line_of(event))
    for ancestor in line:
        if ancestor.name in RANGES:
            return ancestor.name
    for ancestor in line:
        for group, pattern in NAMES.items():
            if re.search(pattern, ancestor.name):
                return group
    return None


def line_of(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    """The event, its caller, and so on."""
    while event is not None:
        yield event
        event = event.cpu_parent


def within(event: FunctionEvent, name: str) -> bool:
    return any(ancestor.name.startswith(name) for ancestor in line_of(event))
