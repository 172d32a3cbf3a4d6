"""A mixer's matrices in the dtype of its products, on CUDA, by one Triton kernel for all of them.

The rank of Δ, d_model / 16, is often no multiple of 8. x_proj then gets rows of zeros after its first r, and
dt_proj columns: matrix products of half precision are up to twice as fast where rows begin at multiples of 16
bytes, and the results are the same. Weights that need no cast keep their rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of one program
ALIGNED = 64  # every matrix begins at a multiple of it, or products would read it slowly
RANK = 8      # the rank is filled up to a multiple of it


@triton.jit
def cast_kernel(in_proj, x_proj, dt_proj, out_proj, out, in_size, x_size, dt_size, out_size, x_start,
                dt_start, out_start, rank, channels, more, BLOCK: tl.constexpr):
    """Each matrix to its start, the first to 0; `more` rows of x_proj, and columns of dt_proj, stay free."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source, size, at = in_proj, in_size, i
    if tl.program_id(1) == 1:
        source, size, at = x_proj, x_size, x_start + i + tl.where(i < rank * channels, 0, more * channels)
    if tl.program_id(1) == 2:
        source, size, at = dt_proj, dt_size, dt_start + i + i // rank * more
    if tl.program_id(1) == 3:
        source, size, at = out_proj, out_size, out_start + i
    value = tl.load(source + i, mask=i < size)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=i < size)


def cast(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """in_proj, x_proj, dt_proj and out_proj in one new array of `dtype`; `views` finds them in it."""
    sizes = [matrix.numel() for matrix in matrices]
    places = starts(matrices)
    channels, rank = matrices[2].shape
    more = _shapes(matrices)[2][1] - rank
    out = (torch.zeros if more else torch.empty)(places[-1], device=matrices[0].device, dtype=dtype)
    given = [matrix.float().contiguous() for matrix in matrices]  # no copy of a model's weights
    cast_kernel[(triton.cdiv(max(sizes), BLOCK), 4)](*given, out, *sizes, *places[1:4], rank, channels, more,
                                                     BLOCK=BLOCK)
    return out


def views(array: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """What `cast` made of each of these matrices, of the filled-up rank."""
    return [array[start:start + math.prod(shape)].view(shape)
            for start, shape in zip(starts(matrices), _shapes(matrices), strict=False)]


def starts(matrices: Sequence[Tensor]) -> list[int]:
    """Where each begins in the array, and where the array ends."""
    places = [0]
    for shape in _shapes(matrices):
        places.append(places[-1] + -(-math.prod(shape) // ALIGNED) * ALIGNED)
    return places


def without_filling(d_x_proj: Tensor, d_dt_proj: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The gradients of x_proj and dt_proj from those of what `views` found."""
    filled = d_dt_proj.shape[1]
    if filled == rank:
        return d_x_proj, d_dt_proj
    return torch.cat([d_x_proj[:rank], d_x_proj[filled:]]), d_dt_proj[:, :rank]


def _shapes(matrices: Sequence[Tensor]) -> list[tuple[int, int]]:
    in_proj, (rows, channels), (_, rank), out_proj = (tuple(matrix.shape) for matrix in matrices)
    more = -rank % RANK
    return [in_proj, (rows + more, channels), (channels, rank + more), out_proj]
