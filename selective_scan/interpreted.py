"""What Triton's interpreter lacks of Gluon: layouts, which mean nothing to it, and shared memory.

So `cuda.py` runs, slowly, on machines without a GPU: for tests.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def arange(size, layout):
    return tl.arange(0, size)


def along(layout, axis):
    return None


class Shared:
    """Shared memory of float32, or a part of it."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def slice(self, start, length, dim=0) -> Shared:
        start, length = int(getattr(start, "value", start)), int(getattr(length, "value", length))
        part = slice(start, start + length)
        return Shared(self.values[part] if dim == 0 else self.values[:, part])

    def permute(self, order) -> Shared:
        return Shared(self.values.transpose(order))

    def store(self, value: tl.tensor) -> None:
        self.values[...] = value.handle.data

    def load(self, layout) -> tl.tensor:
        return tl.tensor(TensorHandle(self.values.copy(), tl.float32),
                         tl.block_type(tl.float32, list(self.values.shape)))


def shared(*shape) -> Shared:
    """Shared memory, full of NaN, so that what is read before it is written shows."""
    return Shared(np.full([int(getattr(size, "value", size)) for size in shape], np.nan, np.float32))


shared_parts = shared
