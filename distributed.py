"""Training on several GPUs or machines, with PyTorch's own engine: DistributedDataParallel under torchrun.

    torchrun --nproc-per-node=4 train_mamba.py

Every process holds the model and the dataset, and draws the same batches and the same augmentation; of each
batch it computes its own part. Losses, gradients, batch statistics and metrics are those of the whole batch,
so a run gives the same curve on any number of processes, and a checkpoint knows nothing of their number.

Without torchrun there is one process, and nothing here does anything. Tensors on GPUs are exchanged by NCCL,
everything on the CPU by gloo, among it what the processes agree on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError

PATIENCE = timedelta(minutes=20)  # that long one process may fetch the dataset, say, while the others wait
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error", "NCCL", "gloo")
THE_WORD = threading.Lock()  # whoever takes it tells, and no one else of this process, why the run ends
Value = TypeVar("Value")


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. Raises UserError where one of them is lost."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield
        return
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of dimensions of size 1: no harm
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        if os.name == "posix":
            tell_of_the_end()
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        if is_writer():  # the others wait before they tell, and SIGTERM is sooner
            THE_WORD.acquire()
        raise UserError("another process of this run has ended, so this one ends, too; mend what it says and "
                        "go on with --resume") from error
    # DistributedDataParallel refers to itself, and what it holds of the group keeps gloo's threads alive. At
    # the interpreter's end they could take the process down, by SIGABRT.
    gc.collect()
    dist.destroy_process_group()


def tell_of_the_end() -> None:
    """Say in a line what SIGTERM means, which torchrun sends to the processes left when one has died.

    A thread does it, as the main one may be waiting for the dead one, where Python runs no signal handlers.
    """
    def wait() -> None:
        while signal.SIGTERM not in os.read(signals, 1):
            pass
        if not THE_WORD.acquire(blocking=False):
            return  # the main thread is about to tell, and to end
        if rank() < 2:  # one of the two is alive
            os.write(2, b"error: torchrun has ended this run, or another of its processes has died; see what "
                     b"torchrun says, mend it, and go on with --resume\n")
        os._exit(128 + signal.SIGTERM)

    signals, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this is the one process that prints, logs and writes checkpoints."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line, once however many processes there are."""
    if is_writer():
        print(line, flush=True)


def own_device(device: torch.device) -> torch.device:
    """The device of this process; the n-th GPU for the n-th process of a machine. Raises UserError."""
    if size() == 1 or device.type != "cuda":
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise UserError(f"there are more processes than GPUs; use --nproc-per-node={there}, or --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


# ---- What the processes agree on --------------------------------------------------------------------------


def of_the_first(function: Callable[[], Value]) -> Value:
    """What `function` returns in the first process: tensors, plain values, paths and namespaces of them."""
    if size() == 1:
        return function()
    file = io.BytesIO()
    if is_writer():
        torch.save(function(), file)
    length = torch.tensor(len(file.getvalue()))
    dist.broadcast(length, 0)
    content = torch.frombuffer(bytearray(file.getvalue() or int(length)), dtype=torch.uint8)
    dist.broadcast(content, 0)
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
        return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def first_alone(function: Callable[[], Value]) -> Value:
    """What `function` returns, called in a machine's first process before the others: it may write files."""
    if size() == 1:
        return function()
    first = int(os.environ["LOCAL_RANK"]) == 0
    result = function() if first else None
    agreed(True)
    return result if first else function()


def agreed(flag: bool) -> bool:
    """Whether `flag` holds in any process; all of them must ask."""
    if size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


# ---- Parts of a batch -------------------------------------------------------------------------------------


class Part(NamedTuple):
    """This process's part of a batch."""

    images: slice
    weight: float  # what the part's mean loss counts, so that the processes' mean is that of the batch
    copies: int    # processes that hold each image

    def loss(self, mean: Tensor) -> Tensor:
        """What to differentiate, given the mean loss of the part."""
        return mean if self.weight == 1 else mean * self.weight

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the batch, given those over the part."""
        sums = total(sums)
        return sums if self.copies == 1 else sums / self.copies


def part(batch: int) -> Part:
    """The part of a batch of so many images.

    Where images are fewer than processes, each takes all of them. (The running variance of batch
    normalisation then counts their pixels more than once, and comes out a little smaller.)
    """
    if size() == 1:
        return Part(slice(None), 1.0, 1)
    if batch < size():
        return Part(slice(None), 1.0, size())
    start, stop = (batch * number // size() for number in (rank(), rank() + 1))
    return Part(slice(start, stop), (stop - start) * size() / batch, 1)


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def compute_in_parts(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """function(images, labels) (N, K) on the CPU, each process having computed some of its rows."""
    if size() == 1:
        return function(images, labels)
    rows = -(-len(labels) // size())
    chosen = (torch.arange(rows) + rank() * rows) % len(labels)  # equally many for each, the last ones twice
    chosen = chosen.to(labels.device)
    own = function(images[chosen], labels[chosen]).contiguous()
    parts = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)[:len(labels)]


def draw_apart(seed: int, step: int) -> None:
    """Let the model's own random numbers (drop path) differ between processes, and be those of the step."""
    if size() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * size() + rank())


# ---- The model --------------------------------------------------------------------------------------------


def wrap(model: nn.Module) -> nn.Module:
    """`model` with gradients averaged over the processes, and batch statistics taken over all of them."""
    if size() == 1:
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, SharedBatchNorm.of(child))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.11 does not know the option's new name
        return DistributedDataParallel(model, broadcast_buffers=False)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of the whole batch, not of this process's part.

    PyTorch's SyncBatchNorm does this on GPUs alone. Mean and variance are summed one after the other, as
    sums of squares would lose digits.
    """

    @classmethod
    def of(cls, module: nn.BatchNorm2d) -> SharedBatchNorm:
        """`module` with shared statistics; parameters and buffers are the same tensors."""
        shared = cls(module.num_features, module.eps, module.momentum, module.affine,
                     module.track_running_stats)
        shared.weight, shared.bias = module.weight, module.bias
        for name, buffer in module.named_buffers():
            shared.register_buffer(name, buffer)
        return shared.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, H, W) → the same shape."""
        if not self.training:
            return super().forward(x)
        wide = x.float()
        count = total(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = Sum.apply(wide.sum((0, 2, 3))) / count                                # (C,)
        centred = wide - mean[:, None, None]
        variance = Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(x.dtype)


class Sum(torch.autograd.Function):
    """The sum over all processes, differentiable: what each makes of it comes back to every summand."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return total(values.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return total(gradient.clone())
