"""The selective scan on CUDA: Triton kernels, nothing to compile at installation.

A program owns one batch item, one block of channels and one segment of time. The states are a tile
[n, channels] in registers; time is sequential. That keeps the whole chip busy for the short rows of images,
where a scan along time leaves most threads idle. Where batch × channels is too small to fill it, time is cut
into segments: A is diagonal and constant, so a segment's decay is exp(A ΣΔ), and what enters it follows from
two passes before (`_plan` chooses; `segment_kernel`, then `carry_kernel`).

The forward keeps the state before every CHUNK steps; the backward recomputes the others from it, KEPT
steps at a time, in registers. Sums over the batch and over channel blocks are made of partial sums in a
fixed order, never by atomics: two runs give the same bits.

States and sums are float32 whatever the inputs are.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.language import constexpr

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # Triton's interpreter runs the same source on a CPU; layouts mean nothing there
    import triton.language as gl
    from triton import jit

    def arange(size, layout):
        return gl.arange(0, size)
else:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl

    @jit
    def arange(size: constexpr, layout: constexpr):
        return gl.arange(0, size, layout)

CHUNK = 8   # steps between state checkpoints
UNROLL = 2  # steps whose inputs are loaded at a time; divides CHUNK
KEPT = 2    # steps whose states the backward keeps in registers at a time; divides CHUNK
LOG2_E = constexpr(1.4426950408889634)
LN_2 = constexpr(0.6931471805599453)


class Plan(NamedTuple):
    """How a shape is cut into programs, and a program's tile [n, channels] into threads."""

    thread_channels: int   # channels of one thread
    lanes_n: int           # lanes of a warp along the states; the others lie along the channels
    warps: int             # along the channels
    registers: int         # of one thread, at most: fewer let more warps hide each other's waiting
    segment: int           # steps of one segment of time, a multiple of CHUNK

    @property
    def block(self) -> int:
        """Channels of one program."""
        return self.thread_channels * (32 // self.lanes_n) * self.warps

    def arguments(self, n: int) -> dict:
        """What a kernel takes of it, for n states."""
        N = max(self.lanes_n, triton.next_power_of_2(n))
        along_n = along_e = None
        if not INTERPRETED:
            tile = gl.BlockedLayout([N // self.lanes_n, self.thread_channels],
                                    [self.lanes_n, 32 // self.lanes_n], [1, self.warps], [1, 0])
            along_n, along_e = gl.SliceLayout(1, tile), gl.SliceLayout(0, tile)
        return {"N": N, "BLOCK": self.block, "ALONG_N": along_n, "ALONG_E": along_e, "num_warps": self.warps,
                "maxnreg": self.registers}


def _plan(batch: int, length: int, channels: int, backward: bool) -> Plan:
    """The one place where a shape chooses its kernel configuration."""
    plan = Plan(thread_channels=2, lanes_n=2, warps=1, registers=168 if backward else 128, segment=0)
    programs = batch * triton.cdiv(channels, plan.block)
    # A step waits for memory and for the step before it: some 2,000 programs hide that on 132 processors.
    segments = max(1, min(2048 // programs, length // 64))
    return plan._replace(segment=triton.cdiv(triton.cdiv(length, segments), CHUNK) * CHUNK)


# ---- Pieces of a step --------------------------------------------------------------------------------------


@jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(y), y = e^−|x|, by a minimax polynomial: log(1 + y) loses digits."""
    y = gl.exp2(-gl.abs(x) * LOG2_E)
    p = 0.00512610214 * y - 0.0290740647
    p = p * y + 0.0775160868
    p = p * y - 0.136022476
    p = p * y + 0.190768807
    p = p * y - 0.24835399
    p = p * y + 0.333181217
    p = p * y - 0.49999445
    p = p * y + 0.999999966
    return gl.maximum(x, 0.0) + y * p


@jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp2(-x * LOG2_E))


@jit
def load_step(pointers, index, limit):
    """One step's channels or states as float32, 0 from `limit` on."""
    return gl.load(pointers, mask=index < limit, other=0.0).to(gl.float32)


@jit
def load_steps(pointers, stride, index, limit, left, STEPS: constexpr):
    """STEPS successive steps, 0 where fewer are left; and the pointers to the step after them.

    All loads come before the first use: a step alone would wait for memory.
    """
    steps = ()
    for k in gl.static_range(STEPS):
        steps = steps + (load_step(pointers, index, gl.where(k < left, limit, 0)),)
        pointers += stride
    return steps, pointers


@jit
def step_size(raw, bias, e, limit, SOFTPLUS: constexpr):
    """Δ from what came in; 0 from `limit` on, where the state then stays as it is."""
    raw += bias
    if SOFTPLUS:
        raw = softplus(raw)
    return gl.where(e < limit, raw, 0.0)


@jit
def load_weights(A, D, bias, e, n, e_inside, n_inside, N_STATE, HAS_D: constexpr, HAS_BIAS: constexpr):
    """A·log₂e as [n, channels], D and Δ bias as [channels], 0 where absent."""
    inside = n_inside[:, None] & e_inside[None, :]
    A2 = gl.load(A + e[None, :] * N_STATE + n[:, None], mask=inside, other=0.0).to(gl.float32) * LOG2_E
    D_e = (e * 0).to(gl.float32)
    if HAS_D:
        D_e = gl.load(D + e, mask=e_inside, other=0.0).to(gl.float32)
    bias_e = (e * 0).to(gl.float32)
    if HAS_BIAS:
        bias_e = gl.load(bias + e, mask=e_inside, other=0.0).to(gl.float32)
    return A2, D_e, bias_e


@jit
def advance(h, dt, x, B_t, A2):
    """h_t = exp(Δ_t A) h_{t−1} + x_t B_t, with x = Δ u."""
    return gl.exp2(dt[None, :] * A2) * h + x[None, :] * B_t[:, None]


# ---- Forward -----------------------------------------------------------------------------------------------


@jit
def forward_kernel(u, delta, A, B, C, D, z, bias, entering, out, last_state, checkpoints,
                   u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
                   length, channels, N_STATE, segment, segments,
                   ALIGN: constexpr, HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr,
                   SOFTPLUS: constexpr, SAVE: constexpr, SEGMENTED: constexpr, N: constexpr, BLOCK: constexpr,
                   ALONG_N: constexpr, ALONG_E: constexpr, CHUNK: constexpr, UNROLL: constexpr):
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    b = (gl.program_id(1) // segments).to(gl.int64)
    part = gl.program_id(1) % segments
    n = arange(N, ALONG_N)
    e_inside, n_inside = e < channels, n < N_STATE
    inside = n_inside[:, None] & e_inside[None, :]
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e_inside, n_inside, N_STATE, HAS_D, HAS_BIAS)
    states = n[:, None] * channels + e[None, :]

    start = part * segment
    stop = gl.minimum(start + segment, length)
    u_t, delta_t = u + b * u_b + start * u_l + e, delta + b * delta_b + start * delta_l + e
    B_l, C_l = B_l * ALIGN, C_l * ALIGN
    B_t, C_t = B + b * B_b * ALIGN + start * B_l + n, C + b * C_b * ALIGN + start * C_l + n
    z_t, out_t = z + b * z_b + start * z_l + e, out + (b * length + start) * channels + e
    h = gl.zeros_like(A2)
    if SEGMENTED:
        h = gl.load(entering + (b * segments + part) * N_STATE * channels + states, mask=inside, other=0.0)
    left = stop - start
    us, u_t = load_steps(u_t, u_l, e, channels, left, UNROLL)
    deltas, delta_t = load_steps(delta_t, delta_l, e, channels, left, UNROLL)
    Bs, B_t = load_steps(B_t, B_l, n, N_STATE, left, UNROLL)
    Cs, C_t = load_steps(C_t, C_l, n, N_STATE, left, UNROLL)
    zs = us
    if HAS_Z:
        zs, z_t = load_steps(z_t, z_l, e, channels, left, UNROLL)
    for first in range(start, stop, UNROLL):
        if SAVE:
            if (first > 0) & (first % CHUNK == 0):
                at = (b * ((length - 1) // CHUNK) + first // CHUNK - 1) * N_STATE * channels
                gl.store(checkpoints + at + states, h, mask=inside)
        # The next steps are on their way while these are worked on.
        left = stop - first - UNROLL
        next_us, u_t = load_steps(u_t, u_l, e, channels, left, UNROLL)
        next_deltas, delta_t = load_steps(delta_t, delta_l, e, channels, left, UNROLL)
        next_Bs, B_t = load_steps(B_t, B_l, n, N_STATE, left, UNROLL)
        next_Cs, C_t = load_steps(C_t, C_l, n, N_STATE, left, UNROLL)
        next_zs = next_us
        if HAS_Z:
            next_zs, z_t = load_steps(z_t, z_l, e, channels, left, UNROLL)
        for k in gl.static_range(UNROLL):
            e_limit = gl.where(first + k < stop, channels, 0)
            dt = step_size(deltas[k], bias_e, e, e_limit, SOFTPLUS)
            h = advance(h, dt, dt * us[k], Bs[k], A2)
            y = gl.sum(h * Cs[k][:, None], axis=0) + D_e * us[k]
            if HAS_Z:
                y = y * zs[k] * sigmoid(zs[k])
            gl.store(out_t, y.to(out.dtype.element_ty), mask=e < e_limit)
            out_t += channels
        us, deltas, Bs, Cs, zs = next_us, next_deltas, next_Bs, next_Cs, next_zs
    if stop == length:
        gl.store(last_state + b * N_STATE * channels + states, h, mask=inside)


# ---- Backward ----------------------------------------------------------------------------------------------


@jit
def backward_kernel(u, delta, A, B, C, D, z, bias, checkpoints, dout, leaving,
                    du, ddelta, dA, dB, dC, dD, dz, dbias,
                    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dout_b, dout_l,
                    length, channels, N_STATE, segment, segments, batch,
                    ALIGN: constexpr, HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr,
                    SOFTPLUS: constexpr, HAS_LEAVING: constexpr, N: constexpr, BLOCK: constexpr,
                    ALONG_N: constexpr, ALONG_E: constexpr, CHUNK: constexpr, KEPT: constexpr):
    """With g_t = ∂loss/∂h_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}:
    ∂B_t = Σ_e g_t Δ_t u_t,  ∂C_t = Σ_e h_t ∂y_t,  ∂(Δ_t u_t) = Σ_n g_t B_t,
    ∂(Δ_t A) = g_t exp(Δ_t A) h_{t−1}.

    `leaving` holds exp(Δ_{t+1} A) g_{t+1} at the last step t of each segment.
    """
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    b = (gl.program_id(1) // segments).to(gl.int64)
    part = gl.program_id(1) % segments
    n = arange(N, ALONG_N)
    e_inside, n_inside = e < channels, n < N_STATE
    inside = n_inside[:, None] & e_inside[None, :]
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e_inside, n_inside, N_STATE, HAS_D, HAS_BIAS)
    states = n[:, None] * channels + e[None, :]
    block = gl.program_id(0).to(gl.int64)

    u_0, delta_0, z_0 = u + b * u_b + e, delta + b * delta_b + e, z + b * z_b + e
    dout_0 = dout + b * dout_b + e
    B_l, C_l = B_l * ALIGN, C_l * ALIGN
    B_0, C_0 = B + b * B_b * ALIGN + n, C + b * C_b * ALIGN + n
    of_b = b * length * channels + e
    du_0, ddelta_0, dz_0 = du + of_b, ddelta + of_b, dz + of_b
    of_b = (block * batch + b) * length * N_STATE + n
    dB_0, dC_0 = dB + of_b, dC + of_b
    g = gl.zeros_like(A2)
    if HAS_LEAVING:
        g = gl.load(leaving + (b * segments + part) * N_STATE * channels + states, mask=inside, other=0.0)
    dA_sum = gl.zeros_like(A2)
    dD_sum = gl.zeros_like(D_e)
    dbias_sum = gl.zeros_like(D_e)
    start = part * segment
    stop = gl.minimum(start + segment, length)
    kept_chunks = gl.cdiv(stop - start, KEPT)
    for i in range(kept_chunks):
        first = start + (kept_chunks - 1 - i) * KEPT
        begin = first // CHUNK * CHUNK
        h = gl.zeros_like(A2)
        if begin > 0:
            at = (b * ((length - 1) // CHUNK) + begin // CHUNK - 1) * N_STATE * channels
            h = gl.load(checkpoints + at + states, mask=inside, other=0.0)
        for t in range(begin, first):
            raw = load_step(delta_0 + t * delta_l, e, channels)
            dt = step_size(raw, bias_e, e, channels, SOFTPLUS)
            x = dt * load_step(u_0 + t * u_l, e, channels)
            h = advance(h, dt, x, load_step(B_0 + t * B_l, n, N_STATE), A2)
        left = stop - first
        us, _ = load_steps(u_0 + first * u_l, u_l, e, channels, left, KEPT)
        raws, _ = load_steps(delta_0 + first * delta_l, delta_l, e, channels, left, KEPT)
        Bs, _ = load_steps(B_0 + first * B_l, B_l, n, N_STATE, left, KEPT)
        dts = ()
        hs = (h,)
        for k in gl.static_range(KEPT):
            e_limit = gl.where(first + k < stop, channels, 0)
            dts = dts + (step_size(raws[k], bias_e, e, e_limit, SOFTPLUS),)
            if k < KEPT - 1:
                h = advance(h, dts[k], dts[k] * us[k], Bs[k], A2)
                hs = hs + (h,)
        Cs, _ = load_steps(C_0 + first * C_l, C_l, n, N_STATE, left, KEPT)
        dys, _ = load_steps(dout_0 + first * dout_l, dout_l, e, channels, left, KEPT)
        if HAS_Z:
            zs, _ = load_steps(z_0 + first * z_l, z_l, e, channels, left, KEPT)
        along_e, along_n = (first + KEPT - 1) * channels, (first + KEPT - 1) * N_STATE
        du_t, ddelta_t, dz_t = du_0 + along_e, ddelta_0 + along_e, dz_0 + along_e
        dB_t, dC_t = dB_0 + along_n, dC_0 + along_n
        for back in gl.static_range(KEPT):
            more = first + KEPT - 1 - back < stop
            now, n_now = e < gl.where(more, channels, 0), n < gl.where(more, N_STATE, 0)
            u_, dt, dy = us[KEPT - 1 - back], dts[KEPT - 1 - back], dys[KEPT - 1 - back]
            B_, C_ = Bs[KEPT - 1 - back][:, None], Cs[KEPT - 1 - back][:, None]
            x = dt * u_
            decay = gl.exp2(dt[None, :] * A2)
            carried_h = decay * hs[KEPT - 1 - back]
            h = carried_h + x[None, :] * B_
            if HAS_Z:
                z_ = zs[KEPT - 1 - back]
                y = gl.sum(h * C_, axis=0) + D_e * u_
                gate = sigmoid(z_)
                silu = z_ * gate
                gl.store(dz_t, (dy * y * (gate + silu * (1.0 - gate))).to(dz.dtype.element_ty), mask=now)
                dz_t -= channels
                dy = dy * silu
            g += C_ * dy[None, :]
            gl.store(dC_t, gl.sum(h * dy[None, :], axis=1), mask=n_now)
            gl.store(dB_t, gl.sum(g * x[None, :], axis=1), mask=n_now)
            d_x = gl.sum(g * B_, axis=0)
            d_exponent = g * carried_h
            d_delta = d_x * u_ + gl.sum(d_exponent * A2, axis=0) * LN_2
            if SOFTPLUS:
                d_delta = d_delta * sigmoid(raws[KEPT - 1 - back] + bias_e)
            dA_sum += d_exponent * dt[None, :]
            g = g * decay
            gl.store(du_t, (d_x * dt + dy * D_e).to(du.dtype.element_ty), mask=now)
            gl.store(ddelta_t, d_delta.to(ddelta.dtype.element_ty), mask=now)
            du_t, ddelta_t = du_t - channels, ddelta_t - channels
            dB_t, dC_t = dB_t - N_STATE, dC_t - N_STATE
            dD_sum += dy * u_
            dbias_sum += gl.where(now, d_delta, 0.0)
    own = b * segments + part
    gl.store(dA + own * N_STATE * channels + states, dA_sum, mask=inside)
    gl.store(dD + own * channels + e, dD_sum, mask=e_inside)
    gl.store(dbias + own * channels + e, dbias_sum, mask=e_inside)


# ---- What enters a segment ---------------------------------------------------------------------------------


@jit
def segment_kernel(u, delta, A, B, C, z, bias, dout, carried, delta_sums,
                   u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dout_b, dout_l,
                   length, channels, N_STATE, segment, segments,
                   ALIGN: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr,
                   REVERSE: constexpr, N: constexpr, BLOCK: constexpr, ALONG_N: constexpr, ALONG_E: constexpr,
                   UNROLL: constexpr):
    """What one segment adds to the state after it (or, in REVERSE, to the gradient before it), and its ΣΔ."""
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    b = (gl.program_id(1) // segments).to(gl.int64)
    part = gl.program_id(1) % segments
    n = arange(N, ALONG_N)
    e_inside, n_inside = e < channels, n < N_STATE
    inside = n_inside[:, None] & e_inside[None, :]
    A2, _, bias_e = load_weights(A, A, bias, e, n, e_inside, n_inside, N_STATE, False, HAS_BIAS)
    h = gl.zeros_like(A2)
    delta_sum = (e * 0).to(gl.float32)
    start = part * segment
    stop = gl.minimum(start + segment, length)
    if REVERSE:
        t, direction = stop - 1, -1
    else:
        t, direction = start, 1
    delta_t = delta + b * delta_b + t * delta_l + e
    u_t, B_t = u + b * u_b + t * u_l + e, B + (b * B_b + t * B_l) * ALIGN + n
    dout_t, C_t = dout + b * dout_b + t * dout_l + e, C + (b * C_b + t * C_l) * ALIGN + n
    z_t = z + b * z_b + t * z_l + e
    for done in range(0, stop - start, UNROLL):
        left = stop - start - done
        deltas, delta_t = load_steps(delta_t, direction * delta_l, e, channels, left, UNROLL)
        if REVERSE:
            inputs, dout_t = load_steps(dout_t, -dout_l, e, channels, left, UNROLL)
            Cs, C_t = load_steps(C_t, -C_l * ALIGN, n, N_STATE, left, UNROLL)
            if HAS_Z:
                zs, z_t = load_steps(z_t, -z_l, e, channels, left, UNROLL)
        else:
            inputs, u_t = load_steps(u_t, u_l, e, channels, left, UNROLL)
            Bs, B_t = load_steps(B_t, B_l * ALIGN, n, N_STATE, left, UNROLL)
        for k in gl.static_range(UNROLL):
            dt = step_size(deltas[k], bias_e, e, gl.where(k < left, channels, 0), SOFTPLUS)
            delta_sum += dt
            if REVERSE:
                dy = inputs[k]
                if HAS_Z:
                    dy = dy * zs[k] * sigmoid(zs[k])
                h = gl.exp2(dt[None, :] * A2) * (h + dy[None, :] * Cs[k][:, None])
            else:
                h = advance(h, dt, dt * inputs[k], Bs[k], A2)
    own = b * segments + part
    gl.store(carried + own * N_STATE * channels + n[:, None] * channels + e[None, :], h, mask=inside)
    gl.store(delta_sums + own * channels + e, delta_sum, mask=e_inside)


@jit
def carry_kernel(A, carried, delta_sums, begin, entering, channels, N_STATE, segments,
                 HAS_BEGIN: constexpr, REVERSE: constexpr, N: constexpr, BLOCK: constexpr, ALONG_N: constexpr,
                 ALONG_E: constexpr):
    """What enters each segment, from what each adds: h ← exp(A ΣΔ) h + carried, segment after segment."""
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    b = gl.program_id(1).to(gl.int64)
    n = arange(N, ALONG_N)
    e_inside = e < channels
    inside = (n < N_STATE)[:, None] & e_inside[None, :]
    A2 = gl.load(A + e[None, :] * N_STATE + n[:, None], mask=inside, other=0.0).to(gl.float32) * LOG2_E
    states = n[:, None] * channels + e[None, :]
    h = gl.zeros_like(A2)
    if HAS_BEGIN:
        h = gl.load(begin + b * N_STATE * channels + states, mask=inside, other=0.0)
    for i in range(segments):
        part = i
        if REVERSE:
            part = segments - 1 - i
        own = b * segments + part
        gl.store(entering + own * N_STATE * channels + states, h, mask=inside)
        total = gl.load(delta_sums + own * channels + e, mask=e_inside, other=0.0)
        added = gl.load(carried + own * N_STATE * channels + states, mask=inside, other=0.0)
        h = gl.exp2(total[None, :] * A2) * h + added


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
    strides, align = _strides(u, delta, B, C, z)
    plan = _plan(b, l, e, backward=False)
    segments = triton.cdiv(l, plan.segment)
    entering = u
    if segments > 1:
        entering = _enter(None, u, delta, A, B, C, z, delta_bias, u, delta_softplus, plan, reverse=False)
    forward_kernel[(triton.cdiv(e, plan.block), b * segments)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, entering, out, last_state, checkpoints,
        *strides, l, e, n, plan.segment, segments, align,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        SAVE=save, SEGMENTED=segments > 1, CHUNK=CHUNK, UNROLL=UNROLL, **plan.arguments(n))
    return out, last_state, checkpoints


def backward(dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
             C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
             checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, or None where there was no input."""
    b, l, e = u.shape
    n = A.shape[1]
    dout, u, delta, B, C, z = map(_rows, (dout, u, delta, B, C, z))
    A, D, delta_bias = map(_contiguous, (A, D, delta_bias))
    strides, align = _strides(u, delta, B, C, z)
    plan = _plan(b, l, e, backward=True)
    segments, blocks = triton.cdiv(l, plan.segment), triton.cdiv(e, plan.block)

    leaving = None if dlast_state is None else dlast_state.float().contiguous()
    if segments > 1:
        leaving = _enter(leaving, u, delta, A, B, C, z, delta_bias, dout, delta_softplus, plan, reverse=True)

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
        *strides, *dout.stride()[:2], l, e, n, plan.segment, segments, b, align,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        HAS_LEAVING=leaving is not None, CHUNK=CHUNK, KEPT=KEPT, **plan.arguments(n))
    return (du, ddelta, dA.sum(0).T, dB.sum(0), dC.sum(0), None if D is None else dD.sum(0), dz,
            None if delta_bias is None else dbias.sum(0))


def _enter(begin: Tensor | None, u, delta, A, B, C, z, delta_bias, dout, delta_softplus: bool, plan: Plan,
           reverse: bool) -> Tensor:
    """The state that enters each segment from `begin` (or, in reverse, the gradient), (b, segments, n, e)."""
    b, l, e = u.shape
    n = A.shape[1]
    segments = triton.cdiv(l, plan.segment)
    strides, align = _strides(u, delta, B, C, z)
    carried, entering = torch.empty(2, b, segments, n, e, device=u.device)
    delta_sums = torch.empty(b, segments, e, device=u.device)
    segment_kernel[(triton.cdiv(e, plan.block), b * segments)](
        u, delta, A, B, C, u if z is None else z, A if delta_bias is None else delta_bias, dout, carried,
        delta_sums, *strides, *dout.stride()[:2], l, e, n, plan.segment, segments, align,
        HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, REVERSE=reverse,
        UNROLL=UNROLL, **plan.arguments(n))
    carry_kernel[(triton.cdiv(e, plan.block), b)](
        A, carried, delta_sums, carried if begin is None else begin, entering, e, n, segments,
        HAS_BEGIN=begin is not None, REVERSE=reverse, **plan.arguments(n))
    return entering


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A tensor (b, l, ·) whose last dimension is adjacent in memory: itself, wherever it can be."""
    return tensor if tensor is None or tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> tuple[list[int], int]:
    """Strides over batch and time of each; those of B and C in units of the second result.

    A unit of 4 tells the compiler that a row of B is aligned, which its specialisation on multiples of 16
    misses for a slice of x_proj's output: one load then brings four states.
    """
    def of(tensor: Tensor | None) -> tuple[int, int]:
        return (0, 0) if tensor is None else tensor.stride()[:2]

    projected = [*of(B), *of(C)]
    align = 4 if all(stride % 4 == 0 for stride in projected) else 1
    return [*of(u), *of(delta), *(stride // align for stride in projected), *of(z)], align
