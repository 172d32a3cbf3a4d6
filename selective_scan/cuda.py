"""The selective scan on CUDA: Triton kernels, nothing to compile at installation.

A program owns one batch item, one block of channels and one segment of time. The states are a tile
[n, channels] in registers; time is sequential. That keeps the whole chip busy for the short rows of images,
where a scan along time leaves most threads idle. Where batch × channels is too small to fill it, time is cut
into segments: A is diagonal and constant, so a segment's decay is exp(A ΣΔ), and what enters it follows from
two cheap passes (`_plan` chooses; `segment_kernel` makes the first pass, `_carry` the second).

The forward keeps the state before every CHUNK steps; the backward recomputes the steps between from it, the
states of one chunk in registers. Sums over the batch and over channel blocks are made of partial sums in a
fixed order, never by atomics: two runs give the same bits.

States and sums are float32 whatever the inputs are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8                # steps between state checkpoints
KEPT = 4                 # steps whose states the backward keeps in registers at a time; divides CHUNK
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Plan(NamedTuple):
    """How a shape is cut into programs."""

    channels: int       # channels of one program
    warps: int
    segment: int        # steps of one segment of time, a multiple of CHUNK


def _plan(batch: int, length: int, channels: int, backward: bool) -> Plan:
    """The one place where a shape chooses its kernel configuration."""
    block = 32
    programs = batch * triton.cdiv(channels, block)
    # A step waits for memory and for the step before it: some 2,000 programs hide that on 132 processors.
    segments = max(1, min(2048 // programs, length // 64))
    segment = triton.cdiv(triton.cdiv(length, segments), CHUNK) * CHUNK
    return Plan(block, 1, segment)


# ---- Pieces of a step --------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(y), y = e^−|x|, by a minimax polynomial in y: log(1 + y) would lose the
    digits of a small Δ."""
    y = tl.exp2(-tl.abs(x) * LOG2_E)
    p = 0.00512610214 * y - 0.0290740647
    p = p * y + 0.0775160868
    p = p * y - 0.136022476
    p = p * y + 0.190768807
    p = p * y - 0.24835399
    p = p * y + 0.333181217
    p = p * y - 0.49999445
    p = p * y + 0.999999966
    return tl.maximum(x, 0.0) + y * p


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def step_size(pointer, bias, inside, SOFTPLUS: tl.constexpr):
    """Δ of one step (0 outside: the state then stays as it is), and its derivative by what came in."""
    raw = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        return tl.where(inside, softplus(raw), 0.0), sigmoid(raw)
    else:
        return tl.where(inside, raw, 0.0), tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def load_weights(A, D, bias, e, n, e_inside, n_inside, N_STATE, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A·log₂e as [n, channels], D and Δ bias as [channels], 0 where absent."""
    inside = n_inside[:, None] & e_inside[None, :]
    A2 = tl.load(A + e[None, :] * N_STATE + n[:, None], mask=inside, other=0.0).to(tl.float32) * LOG2_E
    D_e = tl.zeros(e.shape, tl.float32)
    if HAS_D:
        D_e = tl.load(D + e, mask=e_inside, other=0.0).to(tl.float32)
    bias_e = tl.zeros(e.shape, tl.float32)
    if HAS_BIAS:
        bias_e = tl.load(bias + e, mask=e_inside, other=0.0).to(tl.float32)
    return A2, D_e, bias_e


@triton.jit
def advance(h, t, u_t, delta_t, B_t, A2, bias_e, e, n, channels, N_STATE, stop, SOFTPLUS: tl.constexpr):
    """The state after step t, from pointers to its inputs; from `stop` on the state stays. Also u and Δ."""
    now = e < tl.where(t < stop, channels, 0)
    x = tl.load(u_t + e, mask=now, other=0.0).to(tl.float32)
    dt, _ = step_size(delta_t + e, bias_e, now, SOFTPLUS)
    b = tl.load(B_t + n, mask=n < tl.where(t < stop, N_STATE, 0), other=0.0).to(tl.float32)
    return tl.exp2(dt[None, :] * A2) * h + (dt * x)[None, :] * b[:, None], x, dt


# ---- Forward -----------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(u, delta, A, B, C, D, z, bias, entering, out, last_state, checkpoints,
                   u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
                   length, channels, N_STATE, segment, segments,
                   HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
                   SAVE: tl.constexpr, SEGMENTED: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
                   CHUNK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(1) // segments).to(tl.int64)
    part = tl.program_id(1) % segments
    n = tl.arange(0, N)
    e_inside, n_inside = e < channels, n < N_STATE
    inside = n_inside[:, None] & e_inside[None, :]
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e_inside, n_inside, N_STATE, HAS_D, HAS_BIAS)
    states = n[:, None] * channels + e[None, :]

    h = tl.zeros((N, BLOCK), tl.float32)
    if SEGMENTED:
        h = tl.load(entering + (b * segments + part) * N_STATE * channels + states, mask=inside, other=0.0)
    start = part * segment
    stop = tl.minimum(start + segment, length)
    for first in range(start, stop, CHUNK):
        if SAVE:
            if first > 0:
                at = (b * ((length - 1) // CHUNK) + first // CHUNK - 1) * N_STATE * channels
                tl.store(checkpoints + at + states, h, mask=inside)
        for k in tl.static_range(CHUNK):
            t = first + k
            now = e < tl.where(t < stop, channels, 0)
            n_now = n < tl.where(t < stop, N_STATE, 0)
            h, u_t, _ = advance(h, t, u + b * u_b + t * u_l, delta + b * delta_b + t * delta_l,
                                B + b * B_b + t * B_l, A2, bias_e, e, n, channels, N_STATE, stop, SOFTPLUS)
            C_t = tl.load(C + b * C_b + t * C_l + n, mask=n_now, other=0.0).to(tl.float32)
            y = tl.sum(h * C_t[:, None], axis=0) + D_e * u_t
            if HAS_Z:
                z_t = tl.load(z + b * z_b + t * z_l + e, mask=now, other=0.0).to(tl.float32)
                y = y * z_t * sigmoid(z_t)
            tl.store(out + (b * length + t) * channels + e, y.to(out.dtype.element_ty), mask=now)
    if stop == length:
        tl.store(last_state + b * N_STATE * channels + states, h, mask=inside)


# ---- Backward ----------------------------------------------------------------------------------------------


@triton.jit
def backward_kernel(u, delta, A, B, C, D, z, bias, checkpoints, dout, leaving,
                    du, ddelta, dA, dB, dC, dD, dz, dbias,
                    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dout_b, dout_l,
                    length, channels, N_STATE, segment, segments, batch,
                    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
                    HAS_LEAVING: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
                    KEPT: tl.constexpr):
    """With g_t = ∂loss/∂h_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}:
    ∂B_t = Σ_e g_t Δ_t u_t,  ∂C_t = Σ_e h_t ∂y_t,  ∂(Δ_t A) = g_t exp(Δ_t A) h_{t−1},  ∂(Δ_t u_t) = Σ_n g_t B_t.

    `leaving` holds exp(Δ_{t+1} A) g_{t+1} at the last step t of each segment.
    """
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(1) // segments).to(tl.int64)
    part = tl.program_id(1) % segments
    n = tl.arange(0, N)
    e_inside, n_inside = e < channels, n < N_STATE
    inside = n_inside[:, None] & e_inside[None, :]
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e_inside, n_inside, N_STATE, HAS_D, HAS_BIAS)
    states = n[:, None] * channels + e[None, :]
    block = tl.program_id(0).to(tl.int64)

    g = tl.zeros((N, BLOCK), tl.float32)
    if HAS_LEAVING:
        g = tl.load(leaving + (b * segments + part) * N_STATE * channels + states, mask=inside, other=0.0)
    dA_sum = tl.zeros((N, BLOCK), tl.float32)
    dD_sum = tl.zeros((BLOCK,), tl.float32)
    dbias_sum = tl.zeros((BLOCK,), tl.float32)
    start = part * segment
    stop = tl.minimum(start + segment, length)
    kept_chunks = tl.cdiv(stop - start, KEPT)
    for i in range(kept_chunks):
        first = start + (kept_chunks - 1 - i) * KEPT
        begin = first // CHUNK * CHUNK
        h = tl.zeros((N, BLOCK), tl.float32)
        if begin > 0:
            at = (b * ((length - 1) // CHUNK) + begin // CHUNK - 1) * N_STATE * channels
            h = tl.load(checkpoints + at + states, mask=inside, other=0.0)
        for t in range(begin, first):
            h, _, _ = advance(h, t, u + b * u_b + t * u_l, delta + b * delta_b + t * delta_l,
                              B + b * B_b + t * B_l, A2, bias_e, e, n, channels, N_STATE, stop, SOFTPLUS)
        hs = (h,)
        for k in tl.static_range(KEPT - 1):
            t = first + k
            h, _, _ = advance(h, t, u + b * u_b + t * u_l, delta + b * delta_b + t * delta_l,
                              B + b * B_b + t * B_l, A2, bias_e, e, n, channels, N_STATE, stop, SOFTPLUS)
            hs = hs + (h,)
        for back in tl.static_range(KEPT):
            before = hs[KEPT - 1 - back]
            t = first + KEPT - 1 - back
            now = e < tl.where(t < stop, channels, 0)
            n_now = n < tl.where(t < stop, N_STATE, 0)
            u_t = tl.load(u + b * u_b + t * u_l + e, mask=now, other=0.0).to(tl.float32)
            dt, slope = step_size(delta + b * delta_b + t * delta_l + e, bias_e, now, SOFTPLUS)
            B_t = tl.load(B + b * B_b + t * B_l + n, mask=n_now, other=0.0).to(tl.float32)
            C_t = tl.load(C + b * C_b + t * C_l + n, mask=n_now, other=0.0).to(tl.float32)
            dy = tl.load(dout + b * dout_b + t * dout_l + e, mask=now, other=0.0).to(tl.float32)
            x = dt * u_t
            decay = tl.exp2(dt[None, :] * A2)
            carried_h = decay * before
            h = carried_h + x[None, :] * B_t[:, None]
            row = (b * length + t) * channels + e
            if HAS_Z:
                z_t = tl.load(z + b * z_b + t * z_l + e, mask=now, other=0.0).to(tl.float32)
                y = tl.sum(h * C_t[:, None], axis=0) + D_e * u_t
                gate = sigmoid(z_t)
                silu = z_t * gate
                tl.store(dz + row, (dy * y * (gate + silu * (1.0 - gate))).to(dz.dtype.element_ty), mask=now)
                dy = dy * silu
            g += C_t[:, None] * dy[None, :]
            at = ((block * batch + b) * length + t) * N_STATE + n
            tl.store(dC + at, tl.sum(h * dy[None, :], axis=1), mask=n_now)
            tl.store(dB + at, tl.sum(g * x[None, :], axis=1), mask=n_now)
            d_x = tl.sum(g * B_t[:, None], axis=0)
            d_exponent = g * carried_h
            d_step = tl.sum(d_exponent * A2, axis=0) * LN_2
            dA_sum += d_exponent * dt[None, :]
            g = g * decay
            d_delta = (d_x * u_t + d_step) * slope
            tl.store(du + row, (d_x * dt + dy * D_e).to(du.dtype.element_ty), mask=now)
            tl.store(ddelta + row, d_delta.to(ddelta.dtype.element_ty), mask=now)
            dD_sum += dy * u_t
            dbias_sum += tl.where(now, d_delta, 0.0)
    own = b * segments + part
    tl.store(dA + own * N_STATE * channels + states, dA_sum, mask=inside)
    tl.store(dD + own * channels + e, dD_sum, mask=e_inside)
    tl.store(dbias + own * channels + e, dbias_sum, mask=e_inside)


# ---- What enters a segment ---------------------------------------------------------------------------------


@triton.jit
def segment_kernel(u, delta, A, B, C, z, bias, dout, carried, delta_sums,
                   u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dout_b, dout_l,
                   length, channels, N_STATE, segment, segments,
                   HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
                   N: tl.constexpr, BLOCK: tl.constexpr):
    """What one segment adds to the state after it (or, in REVERSE, to the gradient before it), and its ΣΔ."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(1) // segments).to(tl.int64)
    part = tl.program_id(1) % segments
    n = tl.arange(0, N)
    e_inside, n_inside = e < channels, n < N_STATE
    inside = n_inside[:, None] & e_inside[None, :]
    A2, _, bias_e = load_weights(A, A, bias, e, n, e_inside, n_inside, N_STATE, False, HAS_BIAS)
    h = tl.zeros((N, BLOCK), tl.float32)
    delta_sum = tl.zeros((BLOCK,), tl.float32)
    start = part * segment
    stop = tl.minimum(start + segment, length)
    for i in range(0, stop - start):
        if REVERSE:
            t = stop - 1 - i
            dt, _ = step_size(delta + b * delta_b + t * delta_l + e, bias_e, e_inside, SOFTPLUS)
            dy = tl.load(dout + b * dout_b + t * dout_l + e, mask=e_inside, other=0.0).to(tl.float32)
            if HAS_Z:
                z_t = tl.load(z + b * z_b + t * z_l + e, mask=e_inside, other=0.0).to(tl.float32)
                dy = dy * z_t * sigmoid(z_t)
            C_t = tl.load(C + b * C_b + t * C_l + n, mask=n_inside, other=0.0).to(tl.float32)
            h = tl.exp2(dt[None, :] * A2) * (h + dy[None, :] * C_t[:, None])
        else:
            t = start + i
            h, _, dt = advance(h, t, u + b * u_b + t * u_l, delta + b * delta_b + t * delta_l,
                               B + b * B_b + t * B_l, A2, bias_e, e, n, channels, N_STATE, stop, SOFTPLUS)
        delta_sum += dt
    own = b * segments + part
    tl.store(carried + own * N_STATE * channels + n[:, None] * channels + e[None, :], h, mask=inside)
    tl.store(delta_sums + own * channels + e, delta_sum, mask=e_inside)


@triton.jit
def carry_kernel(A, carried, delta_sums, begin, entering, channels, N_STATE, segments,
                 HAS_BEGIN: tl.constexpr, REVERSE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """What enters each segment, from what each adds: h ← exp(A ΣΔ) h + carried, segment after segment."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    e_inside = e < channels
    inside = (n < N_STATE)[:, None] & e_inside[None, :]
    A2 = tl.load(A + e[None, :] * N_STATE + n[:, None], mask=inside, other=0.0).to(tl.float32) * LOG2_E
    states = n[:, None] * channels + e[None, :]
    h = tl.zeros((N, BLOCK), tl.float32)
    if HAS_BEGIN:
        h = tl.load(begin + b * N_STATE * channels + states, mask=inside, other=0.0)
    for i in range(segments):
        part = i
        if REVERSE:
            part = segments - 1 - i
        own = b * segments + part
        tl.store(entering + own * N_STATE * channels + states, h, mask=inside)
        total = tl.load(delta_sums + own * channels + e, mask=e_inside, other=0.0)
        added = tl.load(carried + own * N_STATE * channels + states, mask=inside, other=0.0)
        h = tl.exp2(total[None, :] * A2) * h + added


# ---- Launches ----------------------------------------------------------------------------------------------


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
            delta_bias: Tensor | None, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b, l, e) in u's dtype, last state (b, n, e) and checkpoints (b, (l−1)/CHUNK, n, e), float32."""
    b, l, e = u.shape
    n = A.shape[1]
    u, delta, B, C, z = map(_rows, (u, delta, B, C, z))
    A, D, delta_bias = map(_contiguous, (A, D, delta_bias))
    out = torch.empty(b, l, e, device=u.device, dtype=u.dtype)
    last_state = torch.empty(b, n, e, device=u.device)
    checkpoints = torch.empty(b, (l - 1) // CHUNK if save else 0, n, e, device=u.device)
    block, warps, segment = _plan(b, l, e, backward=False)
    segments = triton.cdiv(l, segment)
    N = triton.next_power_of_2(n)
    entering = u
    if segments > 1:
        entering = _enter(None, u, delta, A, B, C, z, delta_bias, u, delta_softplus, segment, reverse=False)
    forward_kernel[(triton.cdiv(e, block), b * segments)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, entering, out, last_state, checkpoints,
        *_strides(u, delta, B, C, z), l, e, n, segment, segments,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        SAVE=save, SEGMENTED=segments > 1, N=N, BLOCK=block, CHUNK=CHUNK, num_warps=warps)
    return out, last_state, checkpoints


def backward(dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
             C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
             checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, or None where there was no input."""
    b, l, e = u.shape
    n = A.shape[1]
    dout, u, delta, B, C, z = map(_rows, (dout, u, delta, B, C, z))
    A, D, delta_bias = map(_contiguous, (A, D, delta_bias))
    block, warps, segment = _plan(b, l, e, backward=True)
    segments, blocks = triton.cdiv(l, segment), triton.cdiv(e, block)
    N = triton.next_power_of_2(n)

    leaving = None if dlast_state is None else dlast_state.float().contiguous()
    if segments > 1:
        leaving = _enter(leaving, u, delta, A, B, C, z, delta_bias, dout, delta_softplus, segment, reverse=True)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=u.device, dtype=dtype)

    du, ddelta = empty(b, l, e, dtype=u.dtype), empty(b, l, e, dtype=delta.dtype)
    dz = None if z is None else empty(b, l, e, dtype=z.dtype)
    dA, dD, dbias = empty(b * segments, n, e), empty(b * segments, e), empty(b * segments, e)
    dB, dC = empty(blocks, b, l, n), empty(blocks, b, l, n)
    backward_kernel[(blocks, b * segments)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, checkpoints, dout, u if leaving is None else leaving,
        du, ddelta, dA, dB, dC, dD, du if dz is None else dz, dbias,
        *_strides(u, delta, B, C, z), *dout.stride()[:2], l, e, n, segment, segments, b,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        HAS_LEAVING=leaving is not None, N=N, BLOCK=block, CHUNK=CHUNK, KEPT=KEPT, num_warps=warps)
    return (du, ddelta, dA.sum(0).T, dB.sum(0), dC.sum(0), None if D is None else dD.sum(0), dz,
            None if delta_bias is None else dbias.sum(0))


def _enter(begin: Tensor | None, u, delta, A, B, C, z, delta_bias, dout, delta_softplus: bool, segment: int,
           reverse: bool) -> Tensor:
    """The state that enters each segment from `begin` (or, in reverse, the gradient), (b, segments, n, e)."""
    b, l, e = u.shape
    n = A.shape[1]
    segments = triton.cdiv(l, segment)
    N, block = triton.next_power_of_2(n), 32
    carried, entering = torch.empty(2, b, segments, n, e, device=u.device)
    delta_sums = torch.empty(b, segments, e, device=u.device)
    segment_kernel[(triton.cdiv(e, block), b * segments)](
        u, delta, A, B, C, u if z is None else z, A if delta_bias is None else delta_bias, dout, carried,
        delta_sums, *_strides(u, delta, B, C, z), *dout.stride()[:2], l, e, n, segment, segments,
        HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, REVERSE=reverse,
        N=N, BLOCK=block, num_warps=1)
    carry_kernel[(triton.cdiv(e, block), b)](
        A, carried, delta_sums, carried if begin is None else begin, entering, e, n, segments,
        HAS_BEGIN=begin is not None, REVERSE=reverse, N=N, BLOCK=block, num_warps=1)
    return entering


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A tensor (b, l, ·) whose last dimension is adjacent in memory: itself, wherever it can be."""
    return tensor if tensor is None or tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides over batch and time of each."""
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]
