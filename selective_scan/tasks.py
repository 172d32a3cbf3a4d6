"""How the Numba kernels' work is cut, and the threads it runs on.

A task is a slice of the batch times a block of channels. Tasks share nothing, and the cut does not depend on
the number of threads, so neither do results.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

BLOCK = 256      # channels of one task: 16 states of 256 floats and their A fit a 48 KB first-level cache
SLICES = 32      # slices of the batch; fixed, so that sums over the batch have one order whatever the threads


def slices(batch: int) -> list[tuple[int, range]]:
    """Ranges of batch items, numbered."""
    size = -(-batch // SLICES)
    return list(enumerate(range(i, min(i + size, batch)) for i in range(0, batch, size)))


def blocks(channels: int) -> list[tuple[int, slice]]:
    """Ranges of channels, numbered."""
    return list(enumerate(slice(i, min(i + BLOCK, channels)) for i in range(0, channels, BLOCK)))


def run(tasks: list[tuple]) -> None:
    """Run tasks (function, *arguments) on this thread and PyTorch's number of threads less one."""
    queue = deque(tasks)

    def work() -> None:
        while True:
            try:
                function, *arguments = queue.popleft()
            except IndexError:
                return
            function(*arguments)

    helpers = min(torch.get_num_threads(), len(tasks)) - 1
    futures = []
    with contextlib.suppress(RuntimeError):  # while Python ends its pools take no more; this thread does all
        for _ in range(helpers):
            futures.append(_pool(torch.get_num_threads()).submit(work))
    work()
    for future in futures:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="selective_scan")


# A forked child inherits the pool but not its threads, and would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
