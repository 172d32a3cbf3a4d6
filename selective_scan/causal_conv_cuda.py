"""Causal depthwise convolution with SiLU on CUDA, in Triton; nothing is kept for the backward.

A program owns one batch item, BLOCK channels and SEGMENT steps. With few taps it reads each input once and
has all it needs in registers: the backward computes the convolution again for the slope of SiLU, also for the
w−1 steps after its own, to which its inputs contributed. With many (the `wide_` kernels) registers would not
hold that, and a compiler takes minutes to find it out: a loop reads what GROUP of the taps need, most of it
from the cache, and the backward writes the convolution's gradient ∂s to memory before it goes on. Gradients
of the weights are summed over programs in a fixed order.
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
def place(channels: tl.constexpr, BLOCK: tl.constexpr):
    """A program's channels, and which of the segments of all batch items is its own.

    Both from one axis of programs, because the others have 65,535 at most.
    """
    BLOCKS: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    return tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // BLOCKS


@triton.jit
def load_weights(weight, bias, e, inside, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr):
    taps = ()
    for k in tl.static_range(TAPS):
        taps += (tl.load(weight + e * TAPS + k, mask=inside, other=0.0).to(tl.float32),)
    shift = (e * 0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def load_steps(pointer, stride: tl.constexpr, first, length, e, inside, STEPS: tl.constexpr):
    """STEPS successive steps as float32, 0 before the first and after the last."""
    steps = ()
    for i in tl.static_range(STEPS):
        there = inside & (e * 0 + first + i >= 0) & (e * 0 + first + i < length)
        steps += (tl.load(pointer + i * stride + e, mask=there, other=0.0).to(tl.float32),)
    return steps


@triton.jit
def forward_kernel(x, weight, bias, out, length, segments, x_b, x_l: tl.constexpr, channels: tl.constexpr,
                   TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    e, program = place(channels, BLOCK)
    b = (program // segments).to(tl.int64)
    first = program % segments * SEGMENT
    inside = e < channels
    taps, shift = load_weights(weight, bias, e, inside, TAPS, HAS_BIAS)
    begin = b * 0 + first - (TAPS - 1)
    xs = load_steps(x + b * x_b + begin * x_l, x_l, first - (TAPS - 1), length, e, inside, SEGMENT + TAPS - 1)
    out += (b * length + first) * channels
    for i in tl.static_range(SEGMENT):
        s = shift
        for k in tl.static_range(TAPS):
            s += taps[k] * xs[i + k]
        tl.store(out + i * channels + e, (s * sigmoid(s)).to(out.dtype.element_ty),
                 mask=inside & (e * 0 + first + i < length))


@triton.jit
def backward_kernel(dout, x, weight, bias, dx, sums, length, segments, dout_b, dout_l: tl.constexpr, x_b,
                    x_l: tl.constexpr, dx_b, dx_l: tl.constexpr, channels: tl.constexpr, TAPS: tl.constexpr,
                    HAS_BIAS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """With s the convolution: ∂x_t = Σ_k weight_k ∂s_{t+w−1−k},  ∂weight_k = Σ_t ∂s_t x_{t−w+1+k}."""
    e, program = place(channels, BLOCK)
    b = (program // segments).to(tl.int64)
    first = program % segments * SEGMENT
    inside = e < channels
    taps, shift = load_weights(weight, bias, e, inside, TAPS, HAS_BIAS)
    begin = b * 0 + first
    xs = load_steps(x + b * x_b + (begin - (TAPS - 1)) * x_l, x_l, first - (TAPS - 1), length, e, inside,
                    SEGMENT + 2 * (TAPS - 1))
    douts = load_steps(dout + b * dout_b + begin * dout_l, dout_l, first, length, e, inside,
                       SEGMENT + TAPS - 1)
    dss = ()
    for i in tl.static_range(SEGMENT + TAPS - 1):
        s = shift
        for k in tl.static_range(TAPS):
            s += taps[k] * xs[i + k]
        gate = sigmoid(s)
        dss += (douts[i] * gate * (1.0 + s * (1.0 - gate)),)
    dx += b * dx_b + begin * dx_l
    for i in tl.static_range(SEGMENT):
        dx_t = (e * 0).to(tl.float32)
        for k in tl.static_range(TAPS):
            dx_t += taps[k] * dss[i + TAPS - 1 - k]
        tl.store(dx + i * dx_l + e, dx_t.to(dx.dtype.element_ty), mask=inside & (e * 0 + first + i < length))
    sums += program.to(tl.int64) * (TAPS + 1) * channels
    for k in tl.static_range(TAPS):
        total = (e * 0).to(tl.float32)
        for i in tl.static_range(SEGMENT):
            total += dss[i] * xs[i + k]
        tl.store(sums + e * TAPS + k, total, mask=inside)
    total = (e * 0).to(tl.float32)
    for i in tl.static_range(SEGMENT):
        total += dss[i]
    tl.store(sums + TAPS * channels + e, total, mask=inside)


@triton.jit
def load_taps(weight, first, channels: tl.constexpr, e, inside, COUNT: tl.constexpr):
    """COUNT successive taps of weight (taps, channels) as float32."""
    taps = ()
    for k in tl.static_range(COUNT):
        taps += (tl.load(weight + (first + k) * channels + e, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def add_taps(sums, taps, steps, SEGMENT: tl.constexpr, COUNT: tl.constexpr):
    """sums_i + Σ_k taps_k steps_{i+k}, for each i."""
    added = ()
    for i in tl.static_range(SEGMENT):
        s = sums[i]
        for k in tl.static_range(COUNT):
            s += taps[k] * steps[i + k]
        added += (s,)
    return added


@triton.jit
def wide_kernel(x, weight, bias, dout, out, length, segments, x_b, x_l: tl.constexpr, dout_b,
                dout_l: tl.constexpr, channels: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
                SLOPE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """silu(s) of the convolution s or, with SLOPE, ∂s = ∂out silu'(s). weight is (taps, channels)."""
    e, program = place(channels, BLOCK)
    b = (program // segments).to(tl.int64)
    first = program % segments * SEGMENT
    inside = e < channels
    shift = (e * 0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(SEGMENT):
        sums += (shift,)
    x += b * x_b
    oldest = first - (TAPS - 1)
    for k in range(0, TAPS // GROUP * GROUP, GROUP):
        taps = load_taps(weight, k, channels, e, inside, GROUP)
        at = b * 0 + oldest + k
        xs = load_steps(x + at * x_l, x_l, oldest + k, length, e, inside, SEGMENT + GROUP - 1)
        sums = add_taps(sums, taps, xs, SEGMENT, GROUP)
    REST: tl.constexpr = TAPS % GROUP
    if REST > 0:
        taps = load_taps(weight, TAPS - REST, channels, e, inside, REST)
        at = b * 0 + oldest + TAPS - REST
        xs = load_steps(x + at * x_l, x_l, oldest + TAPS - REST, length, e, inside, SEGMENT + REST - 1)
        sums = add_taps(sums, taps, xs, SEGMENT, REST)
    dout += b * dout_b
    out += (b * length + first) * channels
    for i in tl.static_range(SEGMENT):
        there = inside & (e * 0 + first + i < length)
        gate = sigmoid(sums[i])
        if SLOPE:
            y = tl.load(dout + (b * 0 + first + i) * dout_l + e, mask=there, other=0.0).to(tl.float32)
            y *= gate * (1.0 + sums[i] * (1.0 - gate))
        else:
            y = sums[i] * gate
        tl.store(out + i * channels + e, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def add_gradients(ds, x, weight, sums, dx, own, k, b, first, length, e, inside, x_l: tl.constexpr,
                  channels: tl.constexpr, TAPS: tl.constexpr, SEGMENT: tl.constexpr, COUNT: tl.constexpr):
    """What COUNT taps from k on add to ∂x; their ∂weight, of this segment, is stored."""
    taps = load_taps(weight, k, channels, e, inside, COUNT)
    oldest = first - (TAPS - 1) + k
    xs = load_steps(x + (b * 0 + oldest) * x_l, x_l, oldest, length, e, inside, SEGMENT + COUNT - 1)
    for j in tl.static_range(COUNT):
        total = (e * 0).to(tl.float32)
        for i in tl.static_range(SEGMENT):
            total += own[i] * xs[i + j]
        tl.store(sums + (k + j) * channels + e, total, mask=inside)
    newest = first + TAPS - COUNT - k
    dss = load_steps(ds + (b * 0 + newest) * channels, channels, newest, length, e, inside,
                     SEGMENT + COUNT - 1)
    backwards = ()
    for j in tl.static_range(COUNT):
        backwards += (taps[COUNT - 1 - j],)
    return add_taps(dx, backwards, dss, SEGMENT, COUNT)


@triton.jit
def wide_backward_kernel(ds, x, weight, dx, sums, length, segments, x_b, x_l: tl.constexpr, dx_b,
                         dx_l: tl.constexpr, channels: tl.constexpr, TAPS: tl.constexpr,
                         SEGMENT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """From ∂s of all steps ∂x and, of this segment, the sums for ∂weight (taps, channels) and ∂bias."""
    e, program = place(channels, BLOCK)
    b = (program // segments).to(tl.int64)
    first = program % segments * SEGMENT
    inside = e < channels
    x += b * x_b
    ds += b * length * channels
    sums += program.to(tl.int64) * (TAPS + 1) * channels
    own = load_steps(ds + (b * 0 + first) * channels, channels, first, length, e, inside, SEGMENT)
    total = (e * 0).to(tl.float32)
    dxs = ()
    for i in tl.static_range(SEGMENT):
        total += own[i]
        dxs += ((e * 0).to(tl.float32),)
    tl.store(sums + TAPS * channels + e, total, mask=inside)
    for k in range(0, TAPS // GROUP * GROUP, GROUP):
        dxs = add_gradients(ds, x, weight, sums, dxs, own, k, b, first, length, e, inside, x_l, channels,
                            TAPS, SEGMENT, GROUP)
    REST: tl.constexpr = TAPS % GROUP
    if REST > 0:
        dxs = add_gradients(ds, x, weight, sums, dxs, own, TAPS - REST, b, first, length, e, inside, x_l,
                            channels, TAPS, SEGMENT, REST)
    dx += b * dx_b + (b * 0 + first) * dx_l
    for i in tl.static_range(SEGMENT):
        tl.store(dx + i * dx_l + e, dxs[i].to(dx.dtype.element_ty),
                 mask=inside & (e * 0 + first + i < length))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, e) in x's dtype."""
    x, weight, bias = _rows(x), weight.contiguous(), bias if bias is None else bias.contiguous()
    if weight.shape[-1] > FEW:
        return _wide(x, _taps_first(weight), bias, None)
    b, l, e = x.shape
    out = torch.empty(b, l, e, device=x.device, dtype=x.dtype)
    segments = triton.cdiv(l, SEGMENT)
    forward_kernel[(triton.cdiv(e, BLOCK) * b * segments,)](
        x, weight, weight if bias is None else bias, out, l, segments, *x.stride()[:2], e,
        TAPS=weight.shape[-1], HAS_BIAS=bias is not None, SEGMENT=SEGMENT, BLOCK=BLOCK, num_warps=2)
    return out


def backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
             dx: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x to `dx` and returns those of weight (e, 1, w) and bias (e,), float32."""
    dout, x, weight = _rows(dout), _rows(x), weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    b, l, e = x.shape
    taps, segments = weight.shape[-1], triton.cdiv(l, SEGMENT)
    if taps > FEW:
        weight = _taps_first(weight)
        return _wide_backward(_wide(x, weight, bias, dout), x, weight, dx)
    sums = torch.empty(b * segments, (taps + 1) * e, device=x.device)
    backward_kernel[(triton.cdiv(e, BLOCK) * b * segments,)](
        dout, x, weight, weight if bias is None else bias, dx, sums, l, segments, *dout.stride()[:2],
        *x.stride()[:2], *dx.stride()[:2], e, TAPS=taps, HAS_BIAS=bias is not None, SEGMENT=SEGMENT,
        BLOCK=BLOCK, num_warps=2)
    dweight, dbias = sum_rows(sums, taps * e)
    return dweight.view(e, 1, taps), dbias


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor | None) -> Tensor:
    """silu(s) of the convolution s with weight (w, e), in x's dtype; or, given ∂silu(s), ∂s, float32."""
    b, l, e = x.shape
    segments = triton.cdiv(l, SEGMENT)
    out = torch.empty(b, l, e, device=x.device, dtype=x.dtype if dout is None else torch.float32)
    slope = x if dout is None else dout
    wide_kernel[(triton.cdiv(e, BLOCK) * b * segments,)](
        x, weight, weight if bias is None else bias, slope, out, l, segments, *x.stride()[:2],
        *slope.stride()[:2], e, TAPS=len(weight), HAS_BIAS=bias is not None, SLOPE=dout is not None,
        SEGMENT=SEGMENT, BLOCK=BLOCK, GROUP=GROUP, num_warps=2)
    return out


def _wide_backward(ds: Tensor, x: Tensor, weight: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """What `backward` does, from ∂s (b, l, e) and weight (w, e)."""
    b, l, e = x.shape
    taps, segments = len(weight), triton.cdiv(l, SEGMENT)
    sums = torch.empty(b * segments, (taps + 1) * e, device=x.device)
    wide_backward_kernel[(triton.cdiv(e, BLOCK) * b * segments,)](
        ds, x, weight, dx, sums, l, segments, *x.stride()[:2], *dx.stride()[:2], e, TAPS=taps,
        SEGMENT=SEGMENT, BLOCK=BLOCK, GROUP=GROUP, num_warps=2)
    dweight, dbias = sum_rows(sums, taps * e)
    return dweight.view(taps, e).T.unsqueeze(1), dbias


def _taps_first(weight: Tensor) -> Tensor:
    """(e, 1, w) → (w, e): the weights of one tap adjacent."""
    return weight.squeeze(1).T.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """A tensor (b, l, e) whose channels are adjacent in memory: itself, wherever it can be."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
