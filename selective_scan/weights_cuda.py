"""A mixer's matrices in the dtype of its products, on CUDA, by one Triton kernel for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of one program
ALIGNED = 64  # numbers between which matrices begin: matrix products like theirs at multiples of 16 bytes


@triton.jit
def cast_kernel(a, b, c, d, out, size_a, size_b, size_c, size_d, at_b, at_c, at_d, BLOCK: tl.constexpr):
    """Four arrays of any sizes one after the other, the first at 0 and the others where `at_…` says."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source, size, at = a, size_a, 0
    if tl.program_id(1) == 1:
        source, size, at = b, size_b, at_b
    if tl.program_id(1) == 2:
        source, size, at = c, size_c, at_c
    if tl.program_id(1) == 3:
        source, size, at = d, size_d, at_d
    value = tl.load(source + i, mask=i < size)
    tl.store(out + at + i, value.to(out.dtype.element_ty), mask=i < size)


def cast(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Four matrices in one new array of `dtype`; `views` finds them in it."""
    sizes = [matrix.numel() for matrix in matrices]
    places = starts(matrices)
    out = torch.empty(places[-1], device=matrices[0].device, dtype=dtype)
    given = [matrix.float().contiguous() for matrix in matrices]  # no copy of a model's weights
    cast_kernel[(triton.cdiv(max(sizes), BLOCK), 4)](*given, out, *sizes, *places[1:4], BLOCK=BLOCK)
    return out


def views(array: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """What `cast` made of each of these matrices."""
    return [array[start:start + matrix.numel()].view(matrix.shape)
            for start, matrix in zip(starts(matrices), matrices, strict=False)]


def starts(matrices: Sequence[Tensor]) -> list[int]:
    """Where each begins in the array, and where the array ends."""
    places = [0]
    for matrix in matrices:
        places.append(places[-1] + -(-matrix.numel() // ALIGNED) * ALIGNED)
    return places
