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
    """Shared memory, or a part of it."""

    def __init__(self, values: np.ndarray, dtype: tl.dtype):
        self.values, self.dtype = values, dtype

    def slice(self, start, length, dim=0) -> Shared:
        start, length = number(start), number(length)
        part = slice(start, start + length)
        return Shared(self.values[part] if dim == 0 else self.values[:, part], self.dtype)

    def index(self, place) -> Shared:
        return Shared(self.values[number(place)], self.dtype)

    def permute(self, order) -> Shared:
        return Shared(self.values.transpose(order), self.dtype)

    def store(self, value: tl.tensor) -> None:
        self.values[...] = value.handle.data

    def load(self, layout) -> tl.tensor:
        return tl.tensor(TensorHandle(self.values.copy(), self.dtype),
                         tl.block_type(self.dtype, list(self.values.shape)))


def number(value) -> int:
    """One of Python's, of a constant or of a scalar of the interpreter's."""
    if isinstance(value, tl.tensor):
        return int(value.handle.data.item())
    return int(getattr(value, "value", value))


def shared(rows, columns) -> Shared:
    """Shared memory, full of NaN, so that what is read before it is written shows."""
    return _full_of_nan([rows, columns], tl.float32)


def shared_group(x, rows, columns) -> Shared:
    return _full_of_nan([rows, columns], x.dtype.element_ty)


def shared_groups(x, rows, columns) -> Shared:
    return _full_of_nan([2, rows, columns], x.dtype.element_ty)


def shared_parts(group, rows, columns) -> Shared:
    return _full_of_nan([group, rows, columns], tl.float32)


def _full_of_nan(shape: list, dtype: tl.dtype) -> Shared:
    # The interpreter has the bits of bfloat16 in an integer; all ones are NaN in every format.
    kinds = {tl.float64: np.float64, tl.float32: np.float32, tl.float16: np.float16, tl.bfloat16: np.uint16}
    kind = np.dtype(kinds[dtype])
    ones = np.full([*map(number, shape), kind.itemsize], 255, np.uint8)
    return Shared(ones.view(kind)[..., 0], dtype)


def copy(into: Shared, pointer: tl.tensor, mask: tl.tensor) -> None:
    into.store(tl.load(pointer, mask=mask, other=0.0))


def asked(ASYNC) -> None:
    """Nothing: a copy is there at once."""


arrived = asked
