"""The selective scan on CUDA: Triton kernels, nothing to compile at installation.

A program is one warp and owns one batch item, one block of channels and one segment of time. The states are a
tile [n, channels] in registers, four states of four channels in a thread; time is sequential. That keeps the
whole chip busy for the short rows of images, where a scan along time leaves most threads idle.

Time goes in groups of GROUP steps. What concerns a channel alone (softplus, gate, their slopes) is computed
for a whole group at once, one channel a lane, and handed to the recurrence through shared memory: in the
recurrence's own layout every lane along the states would compute it again. The warp's own shared memory
needs no barrier but the warp's.

The forward keeps the state before every CHUNK steps; the backward recomputes the others from it. Sums over
the batch and over channel blocks are made of partial sums in a fixed order, never by atomics: two runs give
the same bits.

Where batch × channels is too small to fill the chip, time is cut into segments: A is diagonal and constant,
so a segment's decay is exp(A ΣΔ), and what enters it follows from two passes before (`_plan` chooses;
`segment_kernel`, then `carry_kernel`).

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

    from selective_scan.interpreted import along, arange, convert, shared
else:
    from triton import constexpr_function
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl

    @jit
    def arange(size: constexpr, layout: constexpr):
        return gl.arange(0, size, layout)

    @constexpr_function
    def along(layout, axis):
        """The layout of a tile's rows (axis 1 summed away) or columns (axis 0)."""
        return gl.SliceLayout(axis, layout)

    convert = gl.convert_layout

    @jit
    def shared(rows: constexpr, columns: constexpr):
        """Shared memory of float32, row after row."""
        return gl.allocate_shared_memory(gl.float32, [rows, columns],
                                         gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

CHUNK = 8   # steps between state checkpoints, where the caller asks for no other number
GROUP = 4   # steps whose inputs are loaded, and whose states the backward keeps, at a time; divides CHUNK
LOG2_E = constexpr(1.4426950408889634)
LN_2 = constexpr(0.6931471805599453)


class Plan(NamedTuple):
    """How a shape is cut into programs, and a program's tile [n, channels] into threads."""

    lanes_n: int    # lanes of a warp along the states; the others lie along the channels, four for each
    registers: int  # of one thread, at most: fewer let more warps hide each other's waiting
    segment: int    # steps of one segment of time, a multiple of a chunk

    @property
    def block(self) -> int:
        """Channels of one program."""
        return 4 * 32 // self.lanes_n

    def arguments(self, n: int) -> dict:
        """What a kernel takes of it, for n states."""
        N = max(self.lanes_n, triton.next_power_of_2(n))
        states = steps = parts = projected = None
        if not INTERPRETED:
            states = gl.BlockedLayout([N // self.lanes_n, 4],
                                      [self.lanes_n, 32 // self.lanes_n], [1, 1], [1, 0])
            steps = gl.BlockedLayout([GROUP, 1], [1, 32], [1, 1], [1, 0])
            parts = gl.BlockedLayout([GROUP * self.lanes_n, 1], [1, 32], [1, 1], [1, 0])
            projected = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])
        return {"N": N, "BLOCK": self.block, "LANES": self.lanes_n, "STATES": states, "STEPS": steps,
                "PARTS": parts, "PROJECTED": projected, "num_warps": 1, "maxnreg": self.registers}


def _plan(batch: int, length: int, channels: int, n: int, chunk: int, backward: bool) -> Plan:
    """The one place where a shape chooses its kernel configuration."""
    # Four states of four channels a thread: half of each sum, over channels and over states, is then done
    # before the first shuffle, and shared memory is read in the widest words.
    lanes_n = max(4, triton.next_power_of_2(n) // 4)
    plan = Plan(lanes_n, registers=168 if backward else 128, segment=0)
    programs = batch * triton.cdiv(channels, plan.block)
    # A step waits for memory and for the step before it: some 2,000 programs hide that on 132 processors.
    segments = max(1, min(2048 // programs, length // 64))
    return plan._replace(segment=triton.cdiv(triton.cdiv(length, segments), chunk) * chunk)


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
def step_size(raw, inside, SOFTPLUS: constexpr):
    """Δ from what came in, bias included; 0 outside, where the state then stays as it is."""
    if SOFTPLUS:
        raw = softplus(raw)
    return gl.where(inside, raw, 0.0)


@jit
def load_weights(A, D, bias, e, n, e_steps, channels, N_STATE, HAS_D: constexpr, HAS_BIAS: constexpr):
    """A·log₂e as [n, channels], D and Δ bias as [1, channels], 0 where absent."""
    inside = (n < N_STATE)[:, None] & (e < channels)[None, :]
    A2 = gl.load(A + e[None, :] * N_STATE + n[:, None], mask=inside, other=0.0).to(gl.float32) * LOG2_E
    D_e = (e_steps * 0).to(gl.float32)
    if HAS_D:
        D_e = gl.load(D + e_steps, mask=e_steps < channels, other=0.0).to(gl.float32)
    bias_e = (e_steps * 0).to(gl.float32)
    if HAS_BIAS:
        bias_e = gl.load(bias + e_steps, mask=e_steps < channels, other=0.0).to(gl.float32)
    return A2, D_e[None, :], bias_e[None, :]


@jit
def load_group(pointer, offsets, inside):
    return gl.load(pointer + offsets, mask=inside, other=0.0).to(gl.float32)


@jit
def step_of(rows, k: constexpr, STATES: constexpr):
    """Step k of [GROUP, channels] in shared memory, [1, channels]."""
    return rows.slice(k, 1).load(STATES)


@jit
def column_of(rows, k: constexpr):
    """Where step k of [GROUP, n] lies in shared memory, as a column [n, 1]."""
    return rows.permute([1, 0]).slice(k, 1, dim=1)


@jit
def sum_states(x, LANES: constexpr):
    """What each of LANES lanes has to add to Σ_n x, [LANES, channels], of x [n, channels].

    The lanes' parts are added up one group later, where one lane holds a channel: sooner, it takes shuffles.
    """
    return gl.sum(gl.reshape(x, [LANES, x.shape[0] // LANES, x.shape[1]]), axis=1)


@jit
def sum_lanes(parts, LANES: constexpr, PARTS: constexpr, STEPS: constexpr):
    """[GROUP, channels] from the parts of `sum_states` in shared memory, [GROUP · LANES, channels]."""
    x = parts.load(PARTS)
    return convert(gl.sum(gl.reshape(x, [x.shape[0] // LANES, LANES, x.shape[1]]), axis=1), STEPS)


@jit
def advance(h, dts, xs, Bs, k: constexpr, A2, STATES: constexpr):
    """h_t = exp(Δ_t A) h_{t−1} + x_t B_t for step k of the group, with x = Δ u."""
    decay = gl.exp2(step_of(dts, k, STATES) * A2)
    return decay * h + step_of(xs, k, STATES) * column_of(Bs, k).load(STATES)


# ---- Forward -----------------------------------------------------------------------------------------------


@jit
def forward_kernel(u, delta, A, B, C, D, z, bias, entering, out, last_state, checkpoints,
                   u_b, u_l: constexpr, delta_b, delta_l: constexpr, B_b, B_l: constexpr, C_b,
                   C_l: constexpr, z_b, z_l: constexpr,
                   length, channels: constexpr, N_STATE: constexpr, segment, segments,
                   HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr,
                   SOFTPLUS: constexpr, SAVE: constexpr, SEGMENTED: constexpr, N: constexpr, BLOCK: constexpr,
                   LANES: constexpr, STATES: constexpr, STEPS: constexpr, PARTS: constexpr,
                   PROJECTED: constexpr, CHUNK: constexpr, GROUP: constexpr):
    ALONG_N: constexpr = along(STATES, 1)
    ALONG_E: constexpr = along(STATES, 0)
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    n = arange(N, ALONG_N)
    e_steps = gl.program_id(0) * BLOCK + arange(BLOCK, along(STEPS, 0))
    k_steps = arange(GROUP, along(STEPS, 1))
    n_projected = arange(N, along(PROJECTED, 0))
    k_projected = arange(GROUP, along(PROJECTED, 1))
    e_inside, n_inside = (e_steps < channels)[None, :], (n_projected < N_STATE)[None, :]
    b = (gl.program_id(1) // segments).to(gl.int64)
    part = gl.program_id(1) % segments
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e_steps, channels, N_STATE, HAS_D, HAS_BIAS)
    states = n[:, None] * channels + e[None, :]
    states_inside = (n < N_STATE)[:, None] & (e < channels)[None, :]

    start = part * segment
    stop = gl.minimum(start + segment, length)
    t = b * 0 + start
    u_t, delta_t, z_t = u + b * u_b + t * u_l, delta + b * delta_b + t * delta_l, z + b * z_b + t * z_l
    B_t, C_t = B + b * B_b + t * B_l, C + b * C_b + t * C_l
    out_t = out + (b * length + t) * channels
    of_u = k_steps[:, None] * u_l + e_steps[None, :]
    of_delta = k_steps[:, None] * delta_l + e_steps[None, :]
    of_z, of_out = k_steps[:, None] * z_l + e_steps[None, :], k_steps[:, None] * channels + e_steps[None, :]
    of_B = k_projected[:, None] * B_l + n_projected[None, :]
    of_C = k_projected[:, None] * C_l + n_projected[None, :]
    dts, xs, ys = shared(GROUP, BLOCK), shared(GROUP, BLOCK), shared(GROUP * LANES, BLOCK)
    Bs, Cs = shared(GROUP, N), shared(GROUP, N)

    h = gl.zeros_like(A2)
    if SEGMENTED:
        h = gl.load(entering + (b * segments + part) * N_STATE * channels + states, mask=states_inside,
                    other=0.0)
    inside = (k_steps < stop - start)[:, None] & e_inside
    projected_inside = (k_projected < stop - start)[:, None] & n_inside
    next_u, next_delta = load_group(u_t, of_u, inside), load_group(delta_t, of_delta, inside)
    next_B, next_C = load_group(B_t, of_B, projected_inside), load_group(C_t, of_C, projected_inside)
    next_z = next_u
    if HAS_Z:
        next_z = load_group(z_t, of_z, inside)
    for first in range(start, stop, GROUP):
        if SAVE:
            if (first > 0) & (first % CHUNK == 0):
                at = (b * ((length - 1) // CHUNK) + first // CHUNK - 1) * N_STATE * channels
                gl.store(checkpoints + at + states, h.to(checkpoints.dtype.element_ty), mask=states_inside)
        u_, z_, now = next_u, next_z, inside
        dt = step_size(next_delta + bias_e, inside, SOFTPLUS)
        dts.store(dt)
        xs.store(dt * u_)
        Bs.store(next_B)
        Cs.store(next_C)
        # The next group is on its way while this one is worked on.
        u_t, delta_t, z_t = u_t + GROUP * u_l, delta_t + GROUP * delta_l, z_t + GROUP * z_l
        B_t, C_t = B_t + GROUP * B_l, C_t + GROUP * C_l
        inside = (k_steps < stop - first - GROUP)[:, None] & e_inside
        projected_inside = (k_projected < stop - first - GROUP)[:, None] & n_inside
        next_u, next_delta = load_group(u_t, of_u, inside), load_group(delta_t, of_delta, inside)
        next_B, next_C = load_group(B_t, of_B, projected_inside), load_group(C_t, of_C, projected_inside)
        next_z = next_u
        if HAS_Z:
            next_z = load_group(z_t, of_z, inside)
        for k in gl.static_range(GROUP):
            h = advance(h, dts, xs, Bs, k, A2, STATES)
            ys.slice(k * LANES, LANES).store(sum_states(h * column_of(Cs, k).load(STATES), LANES))
        y = sum_lanes(ys, LANES, PARTS, STEPS) + D_e * u_
        if HAS_Z:
            y = y * z_ * sigmoid(z_)
        gl.store(out_t + of_out, y.to(out.dtype.element_ty), mask=now)
        out_t += GROUP * channels
    if stop == length:
        gl.store(last_state + b * N_STATE * channels + states, h, mask=states_inside)


# ---- Backward ----------------------------------------------------------------------------------------------


@jit
def backward_kernel(u, delta, A, B, C, D, z, bias, checkpoints, dout, leaving,
                    out, du, ddelta, dz, weight_sums, projected_sums,
                    u_b, u_l: constexpr, delta_b, delta_l: constexpr, B_b, B_l: constexpr, C_b,
                    C_l: constexpr, z_b, z_l: constexpr, dout_b, dout_l: constexpr,
                    dz_b, dz_l: constexpr, length, channels: constexpr, N_STATE: constexpr, segment, segments,
                    batch,
                    HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr,
                    SOFTPLUS: constexpr, HAS_LEAVING: constexpr, HAS_OUT: constexpr, N: constexpr,
                    BLOCK: constexpr, LANES: constexpr, STATES: constexpr, STEPS: constexpr,
                    PARTS: constexpr, PROJECTED: constexpr, CHUNK: constexpr, GROUP: constexpr):
    """With g_t = ∂loss/∂h_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}:
    ∂B_t = Σ_e g_t Δ_t u_t,  ∂C_t = Σ_e h_t ∂y_t,  ∂(Δ_t u_t) = Σ_n g_t B_t,
    ∂(Δ_t A) = g_t exp(Δ_t A) h_{t−1}.

    `leaving` holds exp(Δ_{t+1} A) g_{t+1} at the last step t of each segment.
    """
    ALONG_N: constexpr = along(STATES, 1)
    ALONG_E: constexpr = along(STATES, 0)
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    n = arange(N, ALONG_N)
    e_steps = gl.program_id(0) * BLOCK + arange(BLOCK, along(STEPS, 0))
    k_steps = arange(GROUP, along(STEPS, 1))
    n_projected = arange(N, along(PROJECTED, 0))
    k_projected = arange(GROUP, along(PROJECTED, 1))
    e_inside, n_inside = (e_steps < channels)[None, :], (n_projected < N_STATE)[None, :]
    b = (gl.program_id(1) // segments).to(gl.int64)
    part = gl.program_id(1) % segments
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e_steps, channels, N_STATE, HAS_D, HAS_BIAS)
    states = n[:, None] * channels + e[None, :]
    states_inside = (n < N_STATE)[:, None] & (e < channels)[None, :]

    start = part * segment
    stop = gl.minimum(start + segment, length)
    groups = gl.cdiv(stop - start, GROUP)
    u_0, delta_0, z_0, dout_0 = u + b * u_b, delta + b * delta_b, z + b * z_b, dout + b * dout_b
    B_0, C_0 = B + b * B_b, C + b * C_b
    of_u = k_steps[:, None] * u_l + e_steps[None, :]
    of_delta = k_steps[:, None] * delta_l + e_steps[None, :]
    of_z, of_dout = k_steps[:, None] * z_l + e_steps[None, :], k_steps[:, None] * dout_l + e_steps[None, :]
    of_dz = k_steps[:, None] * dz_l + e_steps[None, :]
    of_out = k_steps[:, None] * channels + e_steps[None, :]
    of_B = k_projected[:, None] * B_l + n_projected[None, :]
    of_C = k_projected[:, None] * C_l + n_projected[None, :]
    of_sums = k_projected[:, None] * N_STATE + n_projected[None, :]
    dts, xs, dys = shared(GROUP, BLOCK), shared(GROUP, BLOCK), shared(GROUP, BLOCK)
    d_xs, d_exponents = shared(GROUP * LANES, BLOCK), shared(GROUP * LANES, BLOCK)
    ys = d_xs  # read before the others are written
    Bs, Cs, dCs, dBs = shared(GROUP, N), shared(GROUP, N), shared(GROUP, N), shared(GROUP, N)
    carried_hs = shared(GROUP * N, BLOCK)

    g = gl.zeros_like(A2)
    if HAS_LEAVING:
        g = gl.load(leaving + (b * segments + part) * N_STATE * channels + states, mask=states_inside,
                    other=0.0)
    dA_sum = gl.zeros_like(A2)
    dD_sum = gl.zeros_like(D_e)
    dbias_sum = gl.zeros_like(D_e)
    for i in range(groups):
        first = start + (groups - 1 - i) * GROUP
        begin = first // CHUNK * CHUNK
        h = gl.zeros_like(A2)
        if begin > 0:
            at = (b * ((length - 1) // CHUNK) + begin // CHUNK - 1) * N_STATE * channels
            h = gl.load(checkpoints + at + states, mask=states_inside, other=0.0).to(gl.float32)
        for before in range(begin, first, GROUP):
            t = b * 0 + before
            dt = step_size(load_group(delta_0 + t * delta_l, of_delta, e_inside) + bias_e, e_inside, SOFTPLUS)
            dts.store(dt)
            xs.store(dt * load_group(u_0 + t * u_l, of_u, e_inside))
            Bs.store(load_group(B_0 + t * B_l, of_B, n_inside))
            for k in gl.static_range(GROUP):
                h = advance(h, dts, xs, Bs, k, A2, STATES)

        t = b * 0 + first
        inside = (k_steps < stop - first)[:, None] & e_inside
        projected_inside = (k_projected < stop - first)[:, None] & n_inside
        raw = load_group(delta_0 + t * delta_l, of_delta, inside) + bias_e
        u_ = load_group(u_0 + t * u_l, of_u, inside)
        dy = load_group(dout_0 + t * dout_l, of_dout, inside)
        Bs.store(load_group(B_0 + t * B_l, of_B, projected_inside))
        Cs.store(load_group(C_0 + t * C_l, of_C, projected_inside))
        slope = dy
        if HAS_Z:
            z_ = load_group(z_0 + t * z_l, of_z, inside)
            gate = sigmoid(z_)
            slope = dy * gate * (1.0 + z_ * (1.0 - gate))  # ∂loss/∂z = slope · y
            silu = z_ * gate
            dy = dy * silu
        dt = step_size(raw, inside, SOFTPLUS)
        dts.store(dt)
        xs.store(dt * u_)
        dys.store(dy)
        for k in gl.static_range(GROUP):
            carried = gl.exp2(step_of(dts, k, STATES) * A2) * h
            carried_hs.slice(k * N, N).store(carried)
            h = carried + step_of(xs, k, STATES) * column_of(Bs, k).load(STATES)
            if HAS_Z:
                ys.slice(k * LANES, LANES).store(sum_states(h * column_of(Cs, k).load(STATES), LANES))
            column_of(dCs, k).store(gl.sum(h * step_of(dys, k, STATES), axis=1, keep_dims=True))
        t = b * length + first
        if HAS_Z:
            y = sum_lanes(ys, LANES, PARTS, STEPS) + D_e * u_
            gl.store(dz + b * dz_b + (b * 0 + first) * dz_l + of_dz, (slope * y).to(dz.dtype.element_ty),
                     mask=inside)
            if HAS_OUT:
                gl.store(out + t * channels + of_out, (y * silu).to(out.dtype.element_ty), mask=inside)
        for k in gl.static_range(GROUP - 1, -1, -1):
            dt_k = step_of(dts, k, STATES)
            g += column_of(Cs, k).load(STATES) * step_of(dys, k, STATES)
            column_of(dBs, k).store(gl.sum(g * step_of(xs, k, STATES), axis=1, keep_dims=True))
            d_xs.slice(k * LANES, LANES).store(sum_states(g * column_of(Bs, k).load(STATES), LANES))
            d_exponent = g * carried_hs.slice(k * N, N).load(STATES)
            d_exponents.slice(k * LANES, LANES).store(sum_states(d_exponent * A2, LANES))
            dA_sum += d_exponent * dt_k
            g = g * gl.exp2(dt_k * A2)
        own = projected_sums + ((gl.program_id(0).to(gl.int64) * 2 * batch + b) * length + first) * N_STATE
        gl.store(own + of_sums, dBs.load(PROJECTED), mask=projected_inside)
        own += (b * 0 + batch) * length * N_STATE
        gl.store(own + of_sums, dCs.load(PROJECTED), mask=projected_inside)
        d_x, dt, dy = sum_lanes(d_xs, LANES, PARTS, STEPS), dts.load(STEPS), dys.load(STEPS)
        d_delta = d_x * u_ + sum_lanes(d_exponents, LANES, PARTS, STEPS) * LN_2
        if SOFTPLUS:
            d_delta = d_delta * sigmoid(raw)
        d_delta = gl.where(inside, d_delta, 0.0)
        gl.store(du + t * channels + of_out, (d_x * dt + dy * D_e).to(du.dtype.element_ty), mask=inside)
        gl.store(ddelta + t * channels + of_out, d_delta.to(ddelta.dtype.element_ty), mask=inside)
        dD_sum += gl.sum(dy * u_, axis=0)[None, :]
        dbias_sum += gl.sum(d_delta, axis=0)[None, :]
    own = weight_sums + (b * segments + part) * (N_STATE + 2) * channels
    gl.store(own + states, dA_sum, mask=states_inside)
    gl.store(own + N_STATE * channels + e_steps[None, :], dD_sum, mask=e_inside)
    gl.store(own + (N_STATE + 1) * channels + e_steps[None, :], dbias_sum, mask=e_inside)


# ---- What enters a segment ---------------------------------------------------------------------------------


@jit
def segment_kernel(u, delta, A, B, C, z, bias, dout, carried, delta_sums,
                   u_b, u_l: constexpr, delta_b, delta_l: constexpr, B_b, B_l: constexpr, C_b,
                   C_l: constexpr, z_b, z_l: constexpr, dout_b, dout_l: constexpr,
                   length, channels: constexpr, N_STATE: constexpr, segment, segments,
                   HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr,
                   REVERSE: constexpr, N: constexpr, BLOCK: constexpr, LANES: constexpr, STATES: constexpr,
                   STEPS: constexpr, PARTS: constexpr, PROJECTED: constexpr, GROUP: constexpr):
    """What one segment adds to the state after it (or, in REVERSE, to the gradient before it), and its ΣΔ."""
    ALONG_N: constexpr = along(STATES, 1)
    ALONG_E: constexpr = along(STATES, 0)
    e = gl.program_id(0) * BLOCK + arange(BLOCK, ALONG_E)
    n = arange(N, ALONG_N)
    e_steps = gl.program_id(0) * BLOCK + arange(BLOCK, along(STEPS, 0))
    k_steps = arange(GROUP, along(STEPS, 1))
    n_projected = arange(N, along(PROJECTED, 0))
    k_projected = arange(GROUP, along(PROJECTED, 1))
    e_inside, n_inside = (e_steps < channels)[None, :], (n_projected < N_STATE)[None, :]
    b = (gl.program_id(1) // segments).to(gl.int64)
    part = gl.program_id(1) % segments
    A2, _, bias_e = load_weights(A, A, bias, e, n, e_steps, channels, N_STATE, False, HAS_BIAS)

    start = part * segment
    stop = gl.minimum(start + segment, length)
    t = b * 0 + start
    sign: constexpr = -1 if REVERSE else 1
    if REVERSE:
        t = b * 0 + stop - 1
    # Forward it is u and B that drive the state; in reverse the gradient of y, and C.
    drive_t, onto_t = u + b * u_b + t * u_l, B + b * B_b + t * B_l
    drive_l: constexpr = dout_l if REVERSE else u_l
    onto_l: constexpr = C_l if REVERSE else B_l
    if REVERSE:
        drive_t, onto_t = dout + b * dout_b + t * dout_l, C + b * C_b + t * C_l
    delta_t, z_t = delta + b * delta_b + t * delta_l, z + b * z_b + t * z_l
    of_delta = sign * k_steps[:, None] * delta_l + e_steps[None, :]
    of_z = sign * k_steps[:, None] * z_l + e_steps[None, :]
    of_drive = sign * k_steps[:, None] * drive_l + e_steps[None, :]
    of_onto = sign * k_projected[:, None] * onto_l + n_projected[None, :]
    dts, xs, ontos = shared(GROUP, BLOCK), shared(GROUP, BLOCK), shared(GROUP, N)

    h = gl.zeros_like(A2)
    delta_sum = gl.zeros_like(bias_e)
    inside = (k_steps < stop - start)[:, None] & e_inside
    projected_inside = (k_projected < stop - start)[:, None] & n_inside
    next_delta, next_drive = load_group(delta_t, of_delta, inside), load_group(drive_t, of_drive, inside)
    next_onto = load_group(onto_t, of_onto, projected_inside)
    next_z = next_drive
    if REVERSE and HAS_Z:
        next_z = load_group(z_t, of_z, inside)
    for done in range(0, stop - start, GROUP):
        dt = step_size(next_delta + bias_e, inside, SOFTPLUS)
        x = next_drive
        if not REVERSE:
            x = dt * x
        elif HAS_Z:
            x = x * next_z * sigmoid(next_z)
        dts.store(dt)
        xs.store(x)
        ontos.store(next_onto)
        delta_sum += gl.sum(dt, axis=0)[None, :]
        # The next group is on its way while this one is worked on.
        delta_t, drive_t = delta_t + sign * GROUP * delta_l, drive_t + sign * GROUP * drive_l
        onto_t, z_t = onto_t + sign * GROUP * onto_l, z_t + sign * GROUP * z_l
        inside = (k_steps < stop - start - done - GROUP)[:, None] & e_inside
        projected_inside = (k_projected < stop - start - done - GROUP)[:, None] & n_inside
        next_delta, next_drive = load_group(delta_t, of_delta, inside), load_group(drive_t, of_drive, inside)
        next_onto = load_group(onto_t, of_onto, projected_inside)
        if REVERSE and HAS_Z:
            next_z = load_group(z_t, of_z, inside)
        for k in gl.static_range(GROUP):
            if REVERSE:
                h += step_of(xs, k, STATES) * column_of(ontos, k).load(STATES)
                h = gl.exp2(step_of(dts, k, STATES) * A2) * h
            else:
                h = advance(h, dts, xs, ontos, k, A2, STATES)
    own = b * segments + part
    inside = (n < N_STATE)[:, None] & (e < channels)[None, :]
    gl.store(carried + own * N_STATE * channels + n[:, None] * channels + e[None, :], h, mask=inside)
    gl.store(delta_sums + own * channels + e_steps[None, :], delta_sum, mask=e_inside)


@jit
def carry_kernel(A, carried, delta_sums, begin, entering, channels: constexpr, N_STATE: constexpr, segments,
                 HAS_BEGIN: constexpr, REVERSE: constexpr, N: constexpr, BLOCK: constexpr,
                 LANES: constexpr, STATES: constexpr, STEPS: constexpr, PARTS: constexpr,
                 PROJECTED: constexpr):
    """What enters each segment, from what each adds: h ← exp(A ΣΔ) h + carried, segment after segment."""
    e = gl.program_id(0) * BLOCK + arange(BLOCK, along(STATES, 0))
    b = gl.program_id(1).to(gl.int64)
    n = arange(N, along(STATES, 1))
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


# ---- Sums over programs ------------------------------------------------------------------------------------


@jit
def sum_weights_kernel(weight_sums, dA, dD, dbias, programs, channels, N_STATE, ROWS: constexpr,
                       COLUMNS: constexpr, TILE: constexpr):
    """∂A (e, n), ∂D and ∂Δ bias, from those of each program, (programs, n + 2, e); each sum in one order."""
    column = gl.program_id(0) * COLUMNS + arange(COLUMNS, along(TILE, 0))
    row = arange(ROWS, along(TILE, 1))
    width = (N_STATE + 2) * channels
    total = (row[:, None] * column[None, :] * 0).to(gl.float32)
    for first in range(0, programs, ROWS):
        inside = (row < programs - first)[:, None] & (column < width)[None, :]
        at = weight_sums + (gl.program_id(0) * 0 + first).to(gl.int64) * width
        total += gl.load(at + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    total = gl.sum(total, axis=0)
    n, e = column // channels, column % channels
    gl.store(dA + e * N_STATE + n, total, mask=n < N_STATE)
    gl.store(dD + e, total, mask=n == N_STATE)
    gl.store(dbias + e, total, mask=n == N_STATE + 1)


@jit
def sum_projected_kernel(projected_sums, dB, dC, blocks, size, dB_l, dC_l, N_STATE: constexpr,
                         COLUMNS: constexpr, TILE: constexpr):
    """∂B and ∂C, rows dB_l and dC_l apart, from those of each channel block, (blocks, 2, size)."""
    column = gl.program_id(0).to(gl.int64) * COLUMNS + arange(COLUMNS, TILE)
    inside = column < 2 * size
    total = (column * 0).to(gl.float32)
    for _ in range(blocks):
        total += gl.load(projected_sums + column, mask=inside, other=0.0)
        projected_sums += 2 * size
    gl.store(dB + column // N_STATE * dB_l + column % N_STATE, total.to(dB.dtype.element_ty),
             mask=column < size)
    column -= size
    gl.store(dC + column // N_STATE * dC_l + column % N_STATE, total.to(dC.dtype.element_ty),
             mask=inside & (column >= 0))


# ---- Launches ----------------------------------------------------------------------------------------------


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
            delta_bias: Tensor | None, delta_softplus: bool, save: bool, chunk: int = CHUNK,
            kept: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b, l, e) in u's dtype, last state (b, n, e) float32, checkpoints (b, (l−1)/chunk, n, e) `kept`.

    `chunk` is a multiple of GROUP: longer ones take less memory, and more time in the backward.
    """
    b, l, e = u.shape
    n = A.shape[1]
    u, delta, B, C, z = map(_rows, (u, delta, B, C, z))
    A, D, delta_bias = map(_contiguous, (A, D, delta_bias))
    out = torch.empty(b, l, e, device=u.device, dtype=u.dtype)
    last_state = torch.empty(b, n, e, device=u.device)
    checkpoints = torch.empty(b, (l - 1) // chunk if save else 0, n, e, device=u.device, dtype=kept)
    plan = _plan(b, l, e, n, chunk, backward=False)
    segments = triton.cdiv(l, plan.segment)
    entering = u
    if segments > 1:
        entering = _enter(None, u, delta, A, B, C, z, delta_bias, u, delta_softplus, plan, reverse=False)
    forward_kernel[(triton.cdiv(e, plan.block), b * segments)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, entering, out, last_state, checkpoints,
        *_strides(u, delta, B, C, z), l, e, n, plan.segment, segments,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        SAVE=save, SEGMENTED=segments > 1, CHUNK=chunk, GROUP=GROUP, **plan.arguments(n))
    return out, last_state, checkpoints


def backward(dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
             C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
             checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, or None where there was no input."""
    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty(tensor.shape, device=u.device, dtype=tensor.dtype)

    du, ddelta, dB, dC, dz = map(like, (u, delta, B, C, z))
    dA, dD, dbias = backward_into(du, ddelta, dB, dC, dz, None, dout, dlast_state, u, delta, A, B, C, D, z,
                                  delta_bias, delta_softplus, checkpoints, CHUNK)
    return (du, ddelta, dA, dB, dC, None if D is None else dD, dz, None if delta_bias is None else dbias)


def backward_into(du: Tensor, ddelta: Tensor, dB: Tensor, dC: Tensor, dz: Tensor | None, out: Tensor | None,
                  dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
                  C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
                  delta_softplus: bool, checkpoints: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Writes what `backward` returns of sequences, and `out` again if given; returns those of A, D and bias.

    dB, dC and dz may be parts of wider tensors; du, ddelta and out are contiguous. `out` needs z.
    """
    b, l, e = u.shape
    n = A.shape[1]
    dout, u, delta, B, C, z = map(_rows, (dout, u, delta, B, C, z))
    A, D, delta_bias = map(_contiguous, (A, D, delta_bias))
    plan = _plan(b, l, e, n, chunk, backward=True)
    segments, blocks = triton.cdiv(l, plan.segment), triton.cdiv(e, plan.block)
    leaving = None if dlast_state is None else dlast_state.float().contiguous()
    if segments > 1:
        leaving = _enter(leaving, u, delta, A, B, C, z, delta_bias, dout, delta_softplus, plan, reverse=True)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=u.device)

    # What each program has of ∂A, ∂D and ∂Δ bias, and each channel block of ∂B and ∂C.
    weight_sums, projected_sums = empty(b * segments, n + 2, e), empty(blocks, 2, b, l, n)
    backward_kernel[(blocks, b * segments)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, checkpoints, dout, u if leaving is None else leaving,
        u if out is None else out, du, ddelta, du if dz is None else dz, weight_sums, projected_sums,
        *_strides(u, delta, B, C, z, dout, dz), l, e, n, plan.segment, segments, b,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        HAS_LEAVING=leaving is not None, HAS_OUT=out is not None, CHUNK=chunk, GROUP=GROUP,
        **plan.arguments(n))
    dA, dD, dbias = empty(e, n), empty(e), empty(e)
    rows, columns = 32, 32
    sum_weights_kernel[(triton.cdiv((n + 2) * e, columns),)](
        weight_sums, dA, dD, dbias, b * segments, e, n, ROWS=rows, COLUMNS=columns,
        TILE=None if INTERPRETED else gl.BlockedLayout([8, 1], [1, 32], [4, 1], [1, 0]), num_warps=4)
    columns = 256
    sum_projected_kernel[(triton.cdiv(2 * b * l * n, columns),)](
        projected_sums, dB, dC, blocks, b * l * n, dB.stride(1), dC.stride(1), n, COLUMNS=columns,
        TILE=None if INTERPRETED else gl.BlockedLayout([2], [32], [4], [0]), num_warps=4)
    return dA, dD, dbias


def _enter(begin: Tensor | None, u, delta, A, B, C, z, delta_bias, dout, delta_softplus: bool, plan: Plan,
           reverse: bool) -> Tensor:
    """The state that enters each segment from `begin` (or, in reverse, the gradient), (b, segments, n, e)."""
    b, l, e = u.shape
    n = A.shape[1]
    segments = triton.cdiv(l, plan.segment)
    carried, entering = torch.empty(2, b, segments, n, e, device=u.device)
    delta_sums = torch.empty(b, segments, e, device=u.device)
    segment_kernel[(triton.cdiv(e, plan.block), b * segments)](
        u, delta, A, B, C, u if z is None else z, A if delta_bias is None else delta_bias, dout, carried,
        delta_sums, *_strides(u, delta, B, C, z, dout), l, e, n, plan.segment, segments,
        HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, REVERSE=reverse,
        GROUP=GROUP, **plan.arguments(n))
    carry_kernel[(triton.cdiv(e, plan.block), b)](
        A, carried, delta_sums, carried if begin is None else begin, entering, e, n, segments,
        HAS_BEGIN=begin is not None, REVERSE=reverse, **plan.arguments(n))
    return entering


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A tensor (b, l, ·) whose last dimension is adjacent in memory: itself, wherever it can be."""
    return tensor if tensor is None or tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides over batch and time of each.

    Those over time are constants of the kernels: an address is then one register and a number in the
    instruction, and the compiler sees how a slice of x_proj's output is aligned.
    """
    return [stride for tensor in tensors for stride in
            ((0, 0) if tensor is None else tensor.stride()[:2])]
