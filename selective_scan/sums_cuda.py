"""Sums over the programs of a kernel, on CUDA, in Triton: in one order, so two runs give the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 16  # a tile: narrow, so that a few hundred columns still keep many processors busy
PART = 512               # rows of one program: more are summed in two passes, or few programs would wait long


@triton.jit
def sum_rows_kernel(x, out, rows, width, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x += tl.program_id(1).to(tl.int64) * part * width
    rows = tl.minimum(rows - tl.program_id(1) * part, part)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        at = (tl.program_id(0) * 0 + first).to(tl.int64) * width
        inside = (row < rows - first) & (column < width)
        total += tl.load(x + at + row * width + column, mask=inside, other=0.0)
    tl.store(out + tl.program_id(1) * width + column, tl.sum(total, axis=0)[None, :], mask=column < width)


def sum_rows(x: Tensor) -> Tensor:
    """x (rows, …) float32, contiguous, summed over its rows: (…). PyTorch's own is slow for few columns."""
    rows, *shape = x.shape
    parts = triton.cdiv(rows, PART) if rows > 2 * PART else 1
    out = torch.empty(parts, *shape, device=x.device)
    width = out[0].numel()
    part = triton.cdiv(rows, parts)
    sum_rows_kernel[(triton.cdiv(width, COLUMNS), parts)](x, out, rows, width, part, ROWS=ROWS,
                                                          COLUMNS=COLUMNS)
    return out[0] if parts == 1 else sum_rows(out)
