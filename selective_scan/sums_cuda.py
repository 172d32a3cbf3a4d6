"""Sums over the programs of a kernel, on CUDA, in Triton: in one order, so two runs give the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 128, 16  # a tile: narrow, so that a few hundred columns still keep many processors busy
PART = 512               # rows of one program; beyond twice as many, partial sums first: few would wait long


@triton.jit
def sum_rows_kernel(x, out, rest, rows, width, split, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x += tl.program_id(1).to(tl.int64) * part * width
    rows = tl.minimum(rows - tl.program_id(1) * part, part)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        at = (tl.program_id(0) * 0 + first).to(tl.int64) * width
        inside = (row < rows - first) & (column < width)
        total += tl.load(x + at + row * width + column, mask=inside, other=0.0)
    total = tl.sum(total, axis=0)[None, :]
    tl.store(out + tl.program_id(1) * width + column, total, mask=column < split)
    tl.store(rest + column - split, total, mask=(column >= split) & (column < width))


def sum_rows(x: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """x (rows, width) float32, contiguous, summed over its rows: the first `split` sums and the others.

    Each in memory of its own, as an operator's outputs must be. PyTorch's sum is slow for few columns.
    """
    rows, width = x.shape
    columns = triton.cdiv(width, COLUMNS)
    parts = triton.cdiv(rows, PART)
    if parts > 2:
        sums, part = torch.empty(parts, width, device=x.device, dtype=torch.float32), triton.cdiv(rows, parts)
        sum_rows_kernel[(columns, parts)](x, sums, sums, rows, width, width, part, ROWS=ROWS, COLUMNS=COLUMNS)
        return sum_rows(sums, split)
    out, rest = (torch.empty(size, device=x.device, dtype=torch.float32) for size in (split, width - split))
    sum_rows_kernel[(columns, 1)](x, out, rest, rows, width, split, rows, ROWS=ROWS, COLUMNS=COLUMNS)
    return out, rest
