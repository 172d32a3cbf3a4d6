"""Causal depthwise convolution with SiLU on CUDA, in Triton: each input is read once, nothing is kept.

A program owns one batch item, BLOCK channels and SEGMENT steps. The backward computes the convolution again
for the slope of SiLU, also for the w−1 steps after its own, to which its inputs contributed. Gradients of the
weights are summed over programs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_scan.sums_cuda import sum_rows

SEGMENT = 16  # steps of one program: more reads fewer inputs twice, fewer keep more of the chip busy
BLOCK = 128   # channels of one program


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


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
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(1) // segments).to(tl.int64)
    first = tl.program_id(1) % segments * SEGMENT
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
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(1) // segments).to(tl.int64)
    first = tl.program_id(1) % segments * SEGMENT
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
    sums += tl.program_id(1).to(tl.int64) * (TAPS + 1) * channels
    for k in tl.static_range(TAPS):
        total = (e * 0).to(tl.float32)
        for i in tl.static_range(SEGMENT):
            total += dss[i] * xs[i + k]
        tl.store(sums + e * TAPS + k, total, mask=inside)
    total = (e * 0).to(tl.float32)
    for i in tl.static_range(SEGMENT):
        total += dss[i]
    tl.store(sums + TAPS * channels + e, total, mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, e) in x's dtype."""
    x, weight, bias = _rows(x), weight.contiguous(), bias if bias is None else bias.contiguous()
    b, l, e = x.shape
    out = torch.empty(b, l, e, device=x.device, dtype=x.dtype)
    segments = triton.cdiv(l, SEGMENT)
    forward_kernel[(triton.cdiv(e, BLOCK), b * segments)](
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
    sums = torch.empty(b * segments, (taps + 1) * e, device=x.device)
    backward_kernel[(triton.cdiv(e, BLOCK), b * segments)](
        dout, x, weight, weight if bias is None else bias, dx, sums, l, segments, *dout.stride()[:2],
        *x.stride()[:2], *dx.stride()[:2], e, TAPS=taps, HAS_BIAS=bias is not None, SEGMENT=SEGMENT,
        BLOCK=BLOCK, num_warps=2)
    dweight, dbias = sum_rows(sums, taps * e)
    return dweight.view(e, 1, taps), dbias


def _rows(tensor: Tensor) -> Tensor:
    """A tensor (b, l, e) whose channels are adjacent in memory: itself, wherever it can be."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
