"""What surrounds the mixer on CUDA, in Triton: a block's norm and residual, and the mean token at the end.

A feature map's token (row, column) stands in the sequence where the direction puts it. A block's kernels
read and write it there, so that no map is turned over in memory. Statistics and sums are float32; sums over
tokens are made in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_scan.sums_cuda import sum_rows

TILE = 2048      # numbers of one program's tile: whole tokens
PROGRAMS = 1056  # of a mean's, about: eight a processor of an H100; each leaves a partial sum
BACKWARD_PROGRAMS, BACKWARD_WARPS = 528, 2  # of the norm's backward; found by measuring on an H200


@triton.jit
def place(row, height, width, DOWN: tl.constexpr, REVERSE: tl.constexpr):
    """Where the token of each sequence row (batch and place in the sequence in one) lies in the map."""
    length = height * width
    first, t = row // length * length, row % length
    if REVERSE:
        t = length - 1 - t
    if DOWN:
        t = t % height * width + t // height
    return (first + t).to(tl.int64)


@triton.jit
def statistics(x, inside, d: tl.constexpr, eps):
    """Mean and 1 / standard deviation of each row, (rows, 1)."""
    mean = tl.sum(x, axis=1)[:, None] / d
    centred = tl.where(inside, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / d + eps)


@triton.jit
def norm_gradient(dnormed, normed, scale, d: tl.constexpr):
    """∂x of each row from that of (x − mean) · scale, which is `normed`; all (rows, columns), 0 outside."""
    mean, along = tl.sum(dnormed, axis=1) / d, tl.sum(dnormed * normed, axis=1) / d
    return scale * (dnormed - mean[:, None] - normed * along[:, None])


@triton.jit
def norm_kernel(x, weight, bias, out, rows, height, width, eps, d: tl.constexpr, DOWN: tl.constexpr,
                REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < d)
    from_ = place(row, height, width, DOWN, REVERSE)[:, None]
    x_ = tl.load(x + from_ * d + column, mask=inside, other=0.0).to(tl.float32)
    mean, scale = statistics(x_, inside, d, eps)
    y = (x_ - mean) * scale * tl.load(weight + column, mask=column < d, other=0.0)
    y += tl.load(bias + column, mask=column < d, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * d + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(x, weight, dout, dy, dx, sums, rows, tiles, height, width, eps, d: tl.constexpr,
                         DOWN: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr):
    """∂x = ∂y + ∂norm, the residual's gradient and the norm's; `tiles` tiles of rows one after the other."""
    column = tl.arange(0, COLUMNS)[None, :]
    weight_ = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tiles):
        row = (tl.program_id(0) * tiles + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < d)
        from_ = place(row, height, width, DOWN, REVERSE)[:, None] * d + column
        x_ = tl.load(x + from_, mask=inside, other=0.0).to(tl.float32)
        dout_ = tl.load(dout + row.to(tl.int64)[:, None] * d + column, mask=inside, other=0.0).to(tl.float32)
        mean, scale = statistics(x_, inside, d, eps)
        normed = tl.where(inside, (x_ - mean) * scale, 0.0)
        dweight += dout_ * normed
        dbias += dout_
        dx_ = norm_gradient(dout_ * weight_, normed, scale, d)
        dx_ += tl.load(dy + from_, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + from_, dx_.to(dx.dtype.element_ty), mask=inside)
    sums += tl.program_id(0) * 2 * d + column
    tl.store(sums, tl.sum(dweight, axis=0)[None, :], mask=column < d)
    tl.store(sums + d, tl.sum(dbias, axis=0)[None, :], mask=column < d)


@triton.jit
def norm_mean_kernel(x, sums, length, tiles, eps, d: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ over `tiles` tiles of an image's tokens of norm(x) / length, without weight and bias."""
    column = tl.arange(0, COLUMNS)[None, :]
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tiles):
        token = ((tl.program_id(1) * tiles + i) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < length) & (column < d)
        x_ = tl.load(x + (image * length + token) * d + column, mask=inside, other=0.0).to(tl.float32)
        mean, scale = statistics(x_, inside, d, eps)
        total += tl.where(inside, (x_ - mean) * scale, 0.0)
    at = (image * tl.num_programs(1) + tl.program_id(1)) * d + column
    tl.store(sums + at, tl.sum(total, axis=0)[None, :] / length, mask=column < d)


@triton.jit
def norm_mean_backward_kernel(dout, x, dx, rows, length, eps, d: tl.constexpr, ROWS: tl.constexpr,
                              COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < d)
    x_ = tl.load(x + row * d + column, mask=inside, other=0.0).to(tl.float32)
    dout_ = tl.load(dout + row // length * d + column, mask=inside, other=0.0) / length
    mean, scale = statistics(x_, inside, d, eps)
    normed = tl.where(inside, (x_ - mean) * scale, 0.0)
    dx_ = norm_gradient(dout_, normed, scale, d)
    tl.store(dx + row * d + column, dx_.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def residual_kernel(x, branch, scale, out, rows, height, width, d: tl.constexpr, HAS_X: tl.constexpr,
                    HAS_SCALE: tl.constexpr, FROM_MAP: tl.constexpr, DOWN: tl.constexpr,
                    REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = x + scale · branch, the branch in the scan's order, out in the map's; FROM_MAP: the reverse."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < d)
    in_map = place(row, height, width, DOWN, REVERSE)[:, None] * d + column
    in_sequence = row.to(tl.int64)[:, None] * d + column
    source, target = in_sequence, in_map
    if FROM_MAP:
        source, target = in_map, in_sequence
    y = tl.load(branch + source, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y *= tl.load(scale + row // (height * width), mask=row < rows, other=0.0)[:, None]
    if HAS_X:
        y += tl.load(x + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target, y.to(out.dtype.element_ty), mask=inside)


def norm_to_sequence(x: Tensor, weight: Tensor, bias: Tensor, eps: float, direction: str,
                     dtype: torch.dtype) -> Tensor:
    """LayerNorm of a map x (b, height, width, d) as a sequence (b, height · width, d) of `dtype`."""
    b, height, width, d = x.shape
    out = torch.empty(b, height * width, d, device=x.device, dtype=dtype)
    tile = _tile(d)
    rows = b * height * width
    norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](x, weight, bias, out, rows, height, width, eps, d,
                                                    **_order(direction), **tile)
    return out


def norm_backward(dout: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float,
                  direction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, with the residual's `dy` (b, height, width, d) added, of weight and of bias (d,)."""
    b, height, width, d = x.shape
    dx, tile, rows = torch.empty_like(x), _tile(d), b * height * width
    tiles = triton.cdiv(rows, tile["ROWS"])
    each = triton.cdiv(tiles, BACKWARD_PROGRAMS)
    programs = triton.cdiv(tiles, each)
    sums = torch.empty(programs, 2 * d, device=x.device, dtype=torch.float32)
    norm_backward_kernel[(programs,)](x, weight, dout, dy, dx, sums, rows, each, height, width, eps, d,
                                      **_order(direction), **tile, num_warps=BACKWARD_WARPS)
    return dx, *sum_rows(sums, d)


def norm_mean(x: Tensor, eps: float) -> Tensor:
    """The mean over the tokens of x (b, l, d) after their norm, without weight and bias: (b, d) float32."""
    b, l, d = x.shape
    tile = _tile(d)
    tiles = triton.cdiv(l, tile["ROWS"])
    each = triton.cdiv(tiles, triton.cdiv(PROGRAMS, max(1, b)))
    parts = triton.cdiv(tiles, each)
    sums = torch.empty(b, parts, d, device=x.device, dtype=torch.float32)
    norm_mean_kernel[(b, parts)](x, sums, l, each, eps, d, **tile)
    return sums.sum(dim=1)


def norm_mean_backward(dout: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of x (b, l, d) from that of `norm_mean`'s output, (b, d) float32."""
    b, l, d = x.shape
    dx, tile = torch.empty_like(x), _tile(d)
    norm_mean_backward_kernel[(triton.cdiv(b * l, tile["ROWS"]),)](dout, x, dx, b * l, l, eps, d, **tile)
    return dx


def add_residual(x: Tensor, branch: Tensor, scale: Tensor | None, direction: str) -> Tensor:
    """x (b, height, width, d) + scale (b,) · branch (b, height · width, d), in the wider dtype of the two."""
    b, height, width, d = x.shape
    out = torch.empty(x.shape, device=x.device, dtype=torch.promote_types(x.dtype, branch.dtype))
    return _residual(x, branch, scale, out, (b * height * width, height, width, d), direction)


def residual_backward(dy: Tensor, scale: Tensor | None, direction: str, dtype: torch.dtype) -> Tensor:
    """The gradient of the branch, (b, height · width, d) of `dtype`, from that of the map."""
    b, height, width, d = dy.shape
    if direction == "right" and scale is None:
        return dy.to(dtype).flatten(1, 2)
    out = torch.empty(b, height * width, d, device=dy.device, dtype=dtype)
    return _residual(None, dy, scale, out, (b * height * width, height, width, d), direction)


def _residual(x: Tensor | None, branch: Tensor, scale: Tensor | None, out: Tensor,
              shape: tuple[int, int, int, int], direction: str) -> Tensor:
    rows, height, width, d = shape
    tile = _tile(d)
    residual_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        out if x is None else x, branch, out if scale is None else scale, out, rows, height, width, d,
        HAS_X=x is not None, HAS_SCALE=scale is not None, FROM_MAP=x is None, **_order(direction), **tile)
    return out


def _order(direction: str) -> dict[str, bool]:
    return {"DOWN": direction in ("down", "up"), "REVERSE": direction in ("left", "up")}


def _tile(d: int) -> dict[str, int]:
    columns = triton.next_power_of_2(d)
    return {"ROWS": max(1, TILE // columns), "COLUMNS": columns}
