"""Causal depthwise convolution with SiLU on CUDA, in Triton; nothing is kept for the backward.

A program owns one batch item, BLOCK channels and SEGMENT steps. With few taps it reads each input once and
has all it needs in registers: the backward computes the convolution again for the slope of SiLU, also for the
w−1 steps after its own, to which its inputs contributed. With many, registers would not hold that, and a
compiler takes minutes to find it out: a loop reads what GROUP of the taps need, most of it from the cache,
and the backward writes the convolution's gradient ∂s to memory before it goes on (`wide_backward_kernel`).
Gradients of the weights are summed over programs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_scan.sums_cuda import sum_rows

SEGMENT = 16  # steps of one program: more reads fewer inputs twice, fewer keep more of the chip busy
BLOCK = 128   # channels of one program
FEW = 6       # taps, at most, that are faster all at once
GROUP = 8     # of more, those that a loop takes at once


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def place(segments, channels: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """A program's channels, its batch item, its first step, and which it is of all segments of all items.

    From one axis of programs, because the others have 65,535 at most.
    """
    BLOCKS: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    e, program = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // BLOCKS
    return e, (program // segments).to(tl.int64), program % segments * SEGMENT, program.to(tl.int64)


@triton.jit
def load_taps(weight, first, w_e: tl.constexpr, w_k: tl.constexpr, e, inside, COUNT: tl.constexpr):
    """COUNT successive taps as float32; w_e and w_k are the weight's strides over channels and taps."""
    taps = ()
    for k in tl.static_range(COUNT):
        taps += (tl.load(weight + e * w_e + (first + k) * w_k, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_bias(bias, e, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    return (e * 0).to(tl.float32)


@triton.jit
def load_steps(pointer, stride: tl.constexpr, first, length, e, inside, STEPS: tl.constexpr):
    """STEPS successive steps as float32, 0 before the first and after the last."""
    steps = ()
    for i in tl.static_range(STEPS):
        there = inside & (e * 0 + first + i >= 0) & (e * 0 + first + i < length)
        steps += (tl.load(pointer + i * stride + e, mask=there, other=0.0).to(tl.float32),)
    return steps


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (value,)
    return values


@triton.jit
def correlate(sums, taps, steps, OUT: tl.constexpr, COUNT: tl.constexpr):
    """sums_i + Σ_k taps_k steps_{i+k}, for OUT of them, with COUNT taps."""
    added = ()
    for i in tl.static_range(OUT):
        s = sums[i]
        for k in tl.static_range(COUNT):
            s += taps[k] * steps[i + k]
        added += (s,)
    return added


@triton.jit
def backwards(taps, COUNT: tl.constexpr):
    turned = ()
    for k in tl.static_range(COUNT):
        turned += (taps[COUNT - 1 - k],)
    return turned


@triton.jit
def silu_gradient(dout, s):
    """∂s from ∂silu(s)."""
    gate = sigmoid(s)
    return dout * gate * (1.0 + s * (1.0 - gate))


@triton.jit
def add_taps(sums, x, weight, k, b, first, length, e, inside, x_l: tl.constexpr, w_e: tl.constexpr,
             w_k: tl.constexpr, TAPS: tl.constexpr, SEGMENT: tl.constexpr, COUNT: tl.constexpr):
    """The convolution's sums with what COUNT taps from k on add to them."""
    oldest = first - (TAPS - 1) + k
    taps = load_taps(weight, k, w_e, w_k, e, inside, COUNT)
    xs = load_steps(x + (b * 0 + oldest) * x_l, x_l, oldest, length, e, inside, SEGMENT + COUNT - 1)
    return correlate(sums, taps, xs, SEGMENT, COUNT)


@triton.jit
def forward_kernel(x, weight, bias, dout, out, length, segments, x_b, x_l: tl.constexpr, dout_b,
                   dout_l: tl.constexpr, w_e: tl.constexpr, w_k: tl.constexpr, channels: tl.constexpr,
                   TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SLOPE: tl.constexpr, SEGMENT: tl.constexpr,
                   BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """silu(s) of the convolution s or, with SLOPE, ∂s = ∂out silu'(s)."""
    e, b, first, _ = place(segments, channels, SEGMENT, BLOCK)
    inside = e < channels
    sums = repeat(load_bias(bias, e, inside, HAS_BIAS), SEGMENT)
    x += b * x_b
    for k in range(0, TAPS // GROUP * GROUP, GROUP):
        sums = add_taps(sums, x, weight, k, b, first, length, e, inside, x_l, w_e, w_k, TAPS, SEGMENT, GROUP)
    REST: tl.constexpr = TAPS % GROUP
    if REST > 0:
        sums = add_taps(sums, x, weight, TAPS - REST, b, first, length, e, inside, x_l, w_e, w_k, TAPS,
                        SEGMENT, REST)
    dout += b * dout_b + (b * 0 + first) * dout_l
    out += (b * length + first) * channels
    for i in tl.static_range(SEGMENT):
        there = inside & (e * 0 + first + i < length)
        if SLOPE:
            y = tl.load(dout + i * dout_l + e, mask=there, other=0.0).to(tl.float32)
            y = silu_gradient(y, sums[i])
        else:
            y = sums[i] * sigmoid(sums[i])
        tl.store(out + i * channels + e, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def store_steps(pointer, steps, stride: tl.constexpr, first, length, e, inside, STEPS: tl.constexpr):
    for i in tl.static_range(STEPS):
        tl.store(pointer + i * stride + e, steps[i].to(pointer.dtype.element_ty),
                 mask=inside & (e * 0 + first + i < length))


@triton.jit
def store_sum(sums, steps, e, inside, STEPS: tl.constexpr):
    """∂bias, of this segment."""
    total = (e * 0).to(tl.float32)
    for i in tl.static_range(STEPS):
        total += steps[i]
    tl.store(sums + e, total, mask=inside)


@triton.jit
def backward_kernel(dout, x, weight, bias, dx, sums, length, segments, dout_b, dout_l: tl.constexpr, x_b,
                    x_l: tl.constexpr, dx_b, dx_l: tl.constexpr, w_e: tl.constexpr, w_k: tl.constexpr,
                    channels: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
                    SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """With s the convolution: ∂x_t = Σ_k weight_k ∂s_{t+w−1−k},  ∂weight_k = Σ_t ∂s_t x_{t−w+1+k}."""
    e, b, first, program = place(segments, channels, SEGMENT, BLOCK)
    inside = e < channels
    taps = load_taps(weight, 0, w_e, w_k, e, inside, TAPS)
    begin = b * 0 + first
    REACHED: tl.constexpr = SEGMENT + TAPS - 1  # steps to which the segment's inputs contribute
    xs = load_steps(x + b * x_b + (begin - (TAPS - 1)) * x_l, x_l, first - (TAPS - 1), length, e, inside,
                    REACHED + TAPS - 1)
    douts = load_steps(dout + b * dout_b + begin * dout_l, dout_l, first, length, e, inside, REACHED)
    s = correlate(repeat(load_bias(bias, e, inside, HAS_BIAS), REACHED), taps, xs, REACHED, TAPS)
    dss = ()
    for i in tl.static_range(REACHED):
        dss += (silu_gradient(douts[i], s[i]),)
    zero = (e * 0).to(tl.float32)
    dxs = correlate(repeat(zero, SEGMENT), backwards(taps, TAPS), dss, SEGMENT, TAPS)
    store_steps(dx + b * dx_b + begin * dx_l, dxs, dx_l, first, length, e, inside, SEGMENT)
    sums += program * (TAPS + 1) * channels
    dtaps = correlate(repeat(zero, TAPS), dss, xs, TAPS, SEGMENT)
    for k in tl.static_range(TAPS):
        tl.store(sums + e * w_e + k * w_k, dtaps[k], mask=inside)
    store_sum(sums + TAPS * channels, dss, e, inside, SEGMENT)


@triton.jit
def add_gradients(dxs, ds, x, weight, sums, own, k, b, first, length, e, inside, x_l: tl.constexpr,
                  w_e: tl.constexpr, w_k: tl.constexpr, channels: tl.constexpr, TAPS: tl.constexpr,
                  SEGMENT: tl.constexpr, COUNT: tl.constexpr):
    """∂x with what COUNT taps from k on add to it; their ∂weight, of this segment, is stored."""
    oldest, newest = first - (TAPS - 1) + k, first + TAPS - COUNT - k
    xs = load_steps(x + (b * 0 + oldest) * x_l, x_l, oldest, length, e, inside, SEGMENT + COUNT - 1)
    dtaps = correlate(repeat((e * 0).to(tl.float32), COUNT), own, xs, COUNT, SEGMENT)
    for j in tl.static_range(COUNT):
        tl.store(sums + e * w_e + (k + j) * w_k, dtaps[j], mask=inside)
    taps = load_taps(weight, k, w_e, w_k, e, inside, COUNT)
    dss = load_steps(ds + (b * 0 + newest) * channels, channels, newest, length, e, inside,
                     SEGMENT + COUNT - 1)
    return correlate(dxs, backwards(taps, COUNT), dss, SEGMENT, COUNT)


@triton.jit
def wide_backward_kernel(ds, x, weight, dx, sums, length, segments, x_b, x_l: tl.constexpr, dx_b,
                         dx_l: tl.constexpr, w_e: tl.constexpr, w_k: tl.constexpr, channels: tl.constexpr,
                         TAPS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
                         GROUP: tl.constexpr):
    """`backward_kernel` from ∂s of all steps."""
    e, b, first, program = place(segments, channels, SEGMENT, BLOCK)
    inside = e < channels
    x += b * x_b
    ds += b * length * channels
    sums += program * (TAPS + 1) * channels
    own = load_steps(ds + (b * 0 + first) * channels, channels, first, length, e, inside, SEGMENT)
    store_sum(sums + TAPS * channels, own, e, inside, SEGMENT)
    dxs = repeat((e * 0).to(tl.float32), SEGMENT)
    for k in range(0, TAPS // GROUP * GROUP, GROUP):
        dxs = add_gradients(dxs, ds, x, weight, sums, own, k, b, first, length, e, inside, x_l, w_e, w_k,
                            channels, TAPS, SEGMENT, GROUP)
    REST: tl.constexpr = TAPS % GROUP
    if REST > 0:
        dxs = add_gradients(dxs, ds, x, weight, sums, own, TAPS - REST, b, first, length, e, inside, x_l,
                            w_e, w_k, channels, TAPS, SEGMENT, REST)
    store_steps(dx + b * dx_b + (b * 0 + first) * dx_l, dxs, dx_l, first, length, e, inside, SEGMENT)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, e) in x's dtype."""
    return _convolve(_rows(x), _layout(weight), bias, None)


def backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
             dx: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x to `dx` and returns those of weight (e, 1, w) and bias (e,), float32."""
    dout, x, weight = _rows(dout), _rows(x), _layout(weight)
    (b, l, e), taps = x.shape, weight.shape[1]
    segments = triton.cdiv(l, SEGMENT)
    sums = torch.empty(b * segments, (taps + 1) * e, device=x.device, dtype=torch.float32)
    grid = (triton.cdiv(e, BLOCK) * b * segments,)
    if taps > FEW:
        wide_backward_kernel[grid](
            _convolve(x, weight, bias, dout), x, weight, dx, sums, l, segments, *x.stride()[:2],
            *dx.stride()[:2], *weight.stride(), e, TAPS=taps, SEGMENT=SEGMENT, BLOCK=BLOCK, GROUP=GROUP,
            num_warps=2)
    else:
        backward_kernel[grid](
            dout, x, weight, weight if bias is None else bias.contiguous(), dx, sums, l, segments,
            *dout.stride()[:2], *x.stride()[:2], *dx.stride()[:2], *weight.stride(), e, TAPS=taps,
            HAS_BIAS=bias is not None, SEGMENT=SEGMENT, BLOCK=BLOCK, num_warps=2)
    dweight, dbias = sum_rows(sums, taps * e)
    return dweight.as_strided(weight.shape, weight.stride()).unsqueeze(1), dbias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor | None) -> Tensor:
    """silu(s) of the convolution s, in x's dtype; or, given ∂silu(s), ∂s, float32."""
    b, l, e = x.shape
    segments = triton.cdiv(l, SEGMENT)
    out = torch.empty(b, l, e, device=x.device, dtype=x.dtype if dout is None else torch.float32)
    slope = x if dout is None else dout
    forward_kernel[(triton.cdiv(e, BLOCK) * b * segments,)](
        x, weight, weight if bias is None else bias.contiguous(), slope, out, l, segments, *x.stride()[:2],
        *slope.stride()[:2], *weight.stride(), e, TAPS=weight.shape[1], HAS_BIAS=bias is not None,
        SLOPE=dout is not None, SEGMENT=SEGMENT, BLOCK=BLOCK, GROUP=GROUP, num_warps=2)
    return out


def _layout(weight: Tensor) -> Tensor:
    """(e, 1, w) → (e, w), as the kernels read it fastest: of many taps, those of one step adjacent."""
    weight = weight.squeeze(1)
    return weight.T.contiguous().T if weight.shape[1] > FEW else weight.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """A tensor (b, l, e) whose channels are adjacent in memory: itself, wherever it can be."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
