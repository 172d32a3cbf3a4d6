"""The selective scan on CUDA: Triton kernels, nothing to compile at installation.

A program owns one batch item (or some, one after another), one block of channels and one segment of time.
The states are a tile [n, channels] in registers; time is sequential. That keeps the whole chip busy for the
short rows of images, where a scan along time leaves most threads idle.

What a step waits for is memory and, in the backward, the other lanes. So the inputs of the next group of
steps are on their way into shared memory while one group is worked on; registers would not do, because what
waits for an exponential then often waits for them, too. In the forward a lane has a channel with its states,
and needs no other lane. In the backward a thread has four states of four channels: half of each sum, over
channels and over states, is then its own, and lanes hand on the other half through shared memory, once for a
group of steps. That is where the backward's time goes, so what can be computed again or kept in registers
does not pass through it. What concerns a channel alone (softplus, gate, their slopes) is computed one channel
a lane.

The forward keeps the state before every CHUNK steps; the backward recomputes the others from it. Sums over
the batch and over channel blocks are made of partial sums in a fixed order, never by atomics: two runs give
the same bits.

Where batch × channels is too small to fill the chip, time is cut into segments: A is diagonal and constant,
so a segment's decay is exp(A ΣΔ), and what enters it follows from two passes before (`_plan` chooses;
`segment_kernel`, then `carry_kernel`).

States and sums are float32 whatever the inputs are.
"""

from __future__ import annotations

import math
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

    from selective_scan.interpreted import (
        along,
        arange,
        arrived,
        asked,
        copy,
        shared,
        shared_group,
        shared_groups,
        shared_parts,
    )
else:
    from triton import constexpr_function
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton < 3.8

    @jit
    def arange(size: constexpr, layout: constexpr):
        return gl.arange(0, size, layout)

    @constexpr_function
    def along(layout, axis):
        """The layout of a tile's rows (axis 1 summed away) or columns (axis 0)."""
        return gl.SliceLayout(axis, layout)

    @jit
    def shared(rows: constexpr, columns: constexpr):
        """Shared memory of float32, row after row."""
        return gl.allocate_shared_memory(gl.float32, [rows, columns],
                                         gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    @jit
    def shared_group(x, rows: constexpr, columns: constexpr):
        """Shared memory for a group of steps of what x points to."""
        return gl.allocate_shared_memory(x.dtype.element_ty, [rows, columns],
                                         gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    @jit
    def shared_groups(x, rows: constexpr, columns: constexpr):
        """The same for two groups: one on its way, one worked on."""
        return gl.allocate_shared_memory(x.dtype.element_ty, [2, rows, columns],
                                         gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    @jit
    def shared_parts(group: constexpr, rows: constexpr, columns: constexpr):
        """Shared memory of float32 for each step of a group; lanes write to rows of their own at once."""
        # Swizzled: else they would meet in a few banks.
        return gl.allocate_shared_memory(gl.float32, [group, rows, columns], gl.SwizzledSharedLayout(
            4, max(1, 32 // columns), max(1, min(8, columns // 4)), [2, 1, 0]))

    @jit
    def asked(ASYNC: constexpr):
        """All is asked for by `copy` that is to be waited for together."""
        if ASYNC:
            async_copy.commit_group()

    @jit
    def arrived(ASYNC: constexpr):
        """Wait until all that was asked for is there."""
        if ASYNC:
            async_copy.wait_group(0)

CHUNK = 8   # steps between state checkpoints, where the caller asks for no other number
AHEAD = 8   # steps that the forward works on at a time: memory has so long to answer
GROUP = 4   # steps that the backward works on at a time, and whose states it keeps; `stack` knows the number
RESIDENT = 1056  # warps of the backward that an H100 holds at once: its registers allow two a scheduler
LOG2_E = constexpr(1.4426950408889634)
LN_2 = constexpr(0.6931471805599453)


class Plan(NamedTuple):
    """How a shape is cut into programs, and a program's tile [n, channels] into threads."""

    warps: int      # of one program, side by side along the channels
    lanes_n: int    # lanes of a warp along the states; the others lie along the channels
    channels: int   # of one thread
    registers: int  # of one thread, at most
    segment: int    # steps of one segment of time, a multiple of a chunk
    items: int = 1  # of the batch, one after another in a program of the backward

    @property
    def lanes_e(self) -> int:
        """Lanes of a program along the channels."""
        return self.warps * 32 // self.lanes_n

    @property
    def block(self) -> int:
        """Channels of one program."""
        return self.channels * self.lanes_e

    def arguments(self, n: int, wide: int = 4, backward: bool = False) -> dict:
        """What a kernel takes of it, for n states and inputs of which 16 bytes are `wide` numbers.

        Layouts: STATES of a tile [n, channels]; ROWS of [steps, channels] and PROJECTED of [steps, n], as
        they are fetched; OWN of [lanes, channels], each channel in one lane; SUMS of [steps, lanes, n],
        summed over its middle.
        """
        def fetched(columns: int) -> gl.BlockedLayout:
            across = min(wide, columns)
            lanes = min(32, columns // across)
            return gl.BlockedLayout([1, across], [32 // lanes, lanes], [self.warps, 1], [1, 0])

        N = max(self.lanes_n, triton.next_power_of_2(n))
        states = own = sums = rows = projected = None
        if not INTERPRETED:
            rows, projected = fetched(self.block), fetched(N)
            lanes, warps = [self.lanes_n, 32 // self.lanes_n], [1, self.warps]
            states = gl.BlockedLayout([N // self.lanes_n, self.channels], lanes, warps, [1, 0])
            own = gl.BlockedLayout([self.lanes_n, 1], [1, 32], warps, [1, 0])
            sums = gl.BlockedLayout([1, 1, 1], [1, 2, 16], [self.warps, 1, 1], [2, 1, 0])
        arguments = {"N": N, "BLOCK": self.block, "STATES": states, "num_warps": self.warps,
                     "maxnreg": self.registers, "ROWS": rows, "PROJECTED": projected}
        if backward:
            arguments |= {"LANES_N": self.lanes_n, "LANES_E": self.lanes_e, "OWN": own, "SUMS": sums}
        return arguments


def _plan(batch: int, length: int, channels: int, n: int, chunk: int, backward: bool) -> Plan:
    """The one place where a shape chooses its kernel configuration."""
    N = triton.next_power_of_2(n)
    warps = min(2, triton.next_power_of_2(triton.cdiv(channels, 32)))
    if backward:
        plan = Plan(warps, lanes_n=min(32, max(4, N // 4)), channels=4, registers=255, segment=0)
    else:
        plan = Plan(warps, lanes_n=max(1, N // 16), channels=1, registers=168, segment=0)
    # Each of the 528 schedulers of 132 processors wants a warp, and hides what a step waits for with a second
    # one. What is missing is made up for by segments of time, at the price of a pass more over the inputs. In
    # the forward that is nearly all of the work again, so more has to be missing (found by measuring).
    few, enough = (800, 1056) if backward else (200, 1584)

    def cut(block: int) -> tuple[int, int]:
        """Warps without segments, and segments, for so many channels a program."""
        warps_given = warps * batch * triton.cdiv(channels, block)
        fitting = max(1, min(enough // warps_given, length // 48))
        return warps_given, fitting if warps_given < few else 1

    given, segments = cut(plan.block)
    if backward and N == 8:
        # Two lanes for 8 states add up less among them, but make half as many programs: a tenth better at 784
        # tokens, where segments make up for those, and worse at 196, where they do not. Not tried elsewhere.
        wider = plan._replace(lanes_n=2)
        wider_given, wider_segments = cut(wider.block)
        if wider_segments > 1 and wider_given * wider_segments > 0.9 * enough:
            plan, given, segments = wider, wider_given, wider_segments
    # Of far more short sequences than fit at once, programs take several each, one after another: weights are
    # then loaded, and their gradients written, fewer times.
    items = triton.cdiv(given, RESIDENT) if backward and given > 3 * RESIDENT else 1
    return plan._replace(segment=triton.cdiv(triton.cdiv(length, segments), chunk) * chunk, items=items)


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
    """A·log₂e as [n, channels] of n and e; D and Δ bias as [channels] of e_steps; 0 where absent."""
    inside = (n < N_STATE)[:, None] & (e < channels)[None, :]
    A2 = gl.load(A + e[None, :] * N_STATE + n[:, None], mask=inside, other=0.0).to(gl.float32) * LOG2_E
    D_e = (e_steps * 0).to(gl.float32)
    if HAS_D:
        D_e = gl.load(D + e_steps, mask=e_steps < channels, other=0.0).to(gl.float32)
    bias_e = (e_steps * 0).to(gl.float32)
    if HAS_BIAS:
        bias_e = gl.load(bias + e_steps, mask=e_steps < channels, other=0.0).to(gl.float32)
    return A2, D_e, bias_e


@jit
def states_at(pointer, e, n, channels: constexpr):
    """Where the states [n, channels] lie that begin at `pointer`."""
    return (pointer + e)[None, :] + n[:, None] * channels


@jit
def fetch(inputs, b, t, left, where, WIDTH: constexpr, UNIT: constexpr, ASYNC: constexpr):
    """Ask for a group of steps of item b, from t on, of which `left` are to come; zeros after them.

    inputs  of some sequences: places in shared memory, pointers, strides over the batch in UNITs, over time
    where   a group's steps and the columns, of which there are WIDTH, as the lanes fetch them
    """
    places, pointers, batch_strides, strides = inputs
    k, column = where
    inside = (k < left)[:, None] & (column < WIDTH)[None, :]
    for i in gl.static_range(len(places)):
        row = pointers[i] + b * batch_strides[i] * UNIT + (b * 0 + t) * strides[i]
        pointer = row + k[:, None] * strides[i] + column[None, :]
        if ASYNC:
            copy(places[i], pointer, inside)
        else:
            places[i].store(gl.load(pointer, mask=inside, other=0.0))


@jit
def into(slot, inputs):
    """The inputs with one of their two places."""
    places, pointers, batch_strides, strides = inputs
    chosen = ()
    for i in gl.static_range(len(places)):
        chosen += (places[i].index(slot),)
    return chosen, pointers, batch_strides, strides


@jit
def row_of(group, k: constexpr, LAYOUT: constexpr):
    """Step k of a group in shared memory, [channels] float32."""
    return gl.sum(group.slice(k, 1).load(LAYOUT).to(gl.float32), axis=0)


@jit
def column_of(rows, k: constexpr):
    """Where step k of [GROUP, n] lies in shared memory, as a column [n, 1]."""
    return rows.permute([1, 0]).slice(k, 1, dim=1)


@jit
def sum_states(x, LANES_N: constexpr):
    """What each of LANES_N lanes has to add to Σ_n x, [LANES_N, channels], of x [n, channels].

    The lanes' parts are added up where one lane holds a channel, a group later: sooner, it takes shuffles.
    """
    return gl.sum(gl.reshape(x, [LANES_N, x.shape[0] // LANES_N, x.shape[1]]), axis=1)


@jit
def sum_channels(x, LANES_E: constexpr):
    """What each of LANES_E lanes has to add to Σ_e x, [LANES_E, n], of x [n, channels]."""
    parts = gl.sum(gl.reshape(x, [x.shape[0], LANES_E, x.shape[1] // LANES_E]), axis=2)
    return gl.permute(parts, (1, 0))


@jit
def stack(parts):
    """What `sum_channels` made of each of four steps, [LANES_E, n], as [4, LANES_E, n]."""
    both = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))   # [LANES_E, n, 2, 2]
    return gl.reshape(gl.permute(both, (2, 3, 0, 1)), [4, both.shape[0], both.shape[1]])


@jit
def shared_steps(rows: constexpr, columns: constexpr, GROUP: constexpr):
    """Shared memory for each step of a group: apart, so that no step waits for what another writes."""
    buffers = ()
    for _ in gl.static_range(GROUP):
        buffers += (shared(rows, columns),)
    return buffers


@jit
def advance(h, dt, x, Bs, k: constexpr, A2, STATES: constexpr):
    """h_t = exp(Δ_t A) h_{t−1} + x_t B_t for step k of the group, with x = Δ u; both [1, channels]."""
    return gl.exp2(dt * A2) * h + x * column_of(Bs, k).load(STATES)


# ---- Forward -----------------------------------------------------------------------------------------------


@jit
def forward_kernel(u, delta, A, B, C, D, z, bias, entering, out, last_state, checkpoints,
                   u_b, u_l: constexpr, delta_b, delta_l: constexpr, B_b, B_l: constexpr, C_b,
                   C_l: constexpr, z_b, z_l: constexpr, UNIT: constexpr,
                   length, channels: constexpr, N_STATE: constexpr, segment, segments,
                   HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr,
                   SOFTPLUS: constexpr, SAVE: constexpr, SEGMENTED: constexpr, N: constexpr, BLOCK: constexpr,
                   STATES: constexpr, ROWS: constexpr, PROJECTED: constexpr, ASYNC: constexpr,
                   ASYNC_PROJECTED: constexpr, CHUNK: constexpr, GROUP: constexpr):
    # One axis of programs, because the others have 65,535 at most.
    BLOCKS: constexpr = (channels + BLOCK - 1) // BLOCK
    block, program = gl.program_id(0) % BLOCKS, gl.program_id(0) // BLOCKS
    e = block * BLOCK + arange(BLOCK, along(STATES, 0))
    n = arange(N, along(STATES, 1))
    inside = e < channels
    states_inside = (n < N_STATE)[:, None] & inside[None, :]
    b = (program // segments).to(gl.int64)
    part = program % segments
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, e, channels, N_STATE, HAS_D, HAS_BIAS)

    start = part * segment
    stop = gl.minimum(start + segment, length)
    out_0 = out + b * length * channels
    us, deltas = shared_groups(u, GROUP, BLOCK), shared_groups(delta, GROUP, BLOCK)
    zs = shared_groups(z, GROUP, BLOCK) if HAS_Z else us
    raw_Bs, raw_Cs = shared_groups(B, GROUP, N), shared_groups(C, GROUP, N)
    Bs, Cs = shared(GROUP, N), shared(GROUP, N)
    rows = (us, deltas), (u, delta), (u_b, delta_b), (u_l, delta_l)
    if HAS_Z:
        rows = (us, deltas, zs), (u, delta, z), (u_b, delta_b, z_b), (u_l, delta_l, z_l)
    projected = (raw_Bs, raw_Cs), (B, C), (B_b, C_b), (B_l, C_l)
    in_rows = arange(GROUP, along(ROWS, 1)), block * BLOCK + arange(BLOCK, along(ROWS, 0))
    in_projected = arange(GROUP, along(PROJECTED, 1)), arange(N, along(PROJECTED, 0))

    h = gl.zeros_like(A2)
    if SEGMENTED:
        h = gl.load(states_at(entering + (b * segments + part) * N_STATE * channels, e, n, channels),
                    mask=states_inside, other=0.0)
    fetch(into(0, rows), b, start, stop - start, in_rows, channels, UNIT, ASYNC)
    fetch(into(0, projected), b, start, stop - start, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
    asked(ASYNC or ASYNC_PROJECTED)
    slot = 0
    for first in range(start, stop, GROUP):
        if SAVE:
            if (first > 0) & (first % CHUNK == 0):
                at = (b * ((length - 1) // CHUNK) + first // CHUNK - 1) * N_STATE * channels
                gl.store(states_at(checkpoints + at, e, n, channels), h.to(checkpoints.dtype.element_ty),
                         mask=states_inside)
        arrived(ASYNC or ASYNC_PROJECTED)
        Bs.store(raw_Bs.index(slot).load(PROJECTED).to(gl.float32))
        Cs.store(raw_Cs.index(slot).load(PROJECTED).to(gl.float32))
        # The next group is on its way while this one is worked on.
        t, left = b * 0 + first, stop - first
        fetch(into(1 - slot, rows), b, t + GROUP, left - GROUP, in_rows, channels, UNIT, ASYNC)
        fetch(into(1 - slot, projected), b, t + GROUP, left - GROUP, in_projected, N_STATE, UNIT,
              ASYNC_PROJECTED)
        asked(ASYNC or ASYNC_PROJECTED)
        for k in gl.static_range(GROUP):
            there = inside & (k < left)
            u_ = row_of(us.index(slot), k, STATES)
            dt = step_size(row_of(deltas.index(slot), k, STATES) + bias_e, there, SOFTPLUS)
            h = advance(h, dt[None, :], (dt * u_)[None, :], Bs, k, A2, STATES)
            y = gl.sum(h * column_of(Cs, k).load(STATES), axis=0) + D_e * u_
            if HAS_Z:
                z_ = row_of(zs.index(slot), k, STATES)
                y = y * z_ * sigmoid(z_)
            gl.store(out_0 + (t + k) * channels + e, y.to(out.dtype.element_ty), mask=there)
        slot = 1 - slot
    if stop == length:
        gl.store(states_at(last_state + b * N_STATE * channels, e, n, channels), h, mask=states_inside)


# ---- Backward ----------------------------------------------------------------------------------------------


@jit
def load_checkpoint(checkpoints, b, first, length, e, n, inside, channels: constexpr, N_STATE: constexpr,
                    CHUNK: constexpr):
    """The state before the chunk that step `first` is in."""
    before = first // CHUNK - 1
    at = (b * ((length - 1) // CHUNK) + gl.maximum(before, 0)) * N_STATE * channels
    h = gl.load(states_at(checkpoints + at, e, n, channels), mask=inside & (before >= 0), other=0.0)
    return h.to(gl.float32)


@jit
def leaving_gradient(leaving, A2, own, e, n, inside, channels: constexpr, N_STATE: constexpr,
                     HAS_LEAVING: constexpr):
    """What comes from the steps after a segment, [n, channels]."""
    if HAS_LEAVING:
        return gl.load(states_at(leaving + own * N_STATE * channels, e, n, channels), mask=inside, other=0.0)
    return gl.zeros_like(A2)


@jit
def backward_kernel(u, delta, A, B, C, D, z, bias, checkpoints, dout, leaving,
                    out, du, ddelta, dz, weight_sums, projected_sums,
                    u_b, u_l: constexpr, delta_b, delta_l: constexpr, B_b, B_l: constexpr, C_b,
                    C_l: constexpr, z_b, z_l: constexpr, dout_b, dout_l: constexpr,
                    dz_b, dz_l: constexpr, UNIT: constexpr, length, channels: constexpr,
                    N_STATE: constexpr, segment, segments, batch, items, MANY: constexpr,
                    HAS_D: constexpr, HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr,
                    HAS_LEAVING: constexpr, HAS_OUT: constexpr, N: constexpr, BLOCK: constexpr,
                    LANES_N: constexpr, LANES_E: constexpr, STATES: constexpr, OWN: constexpr,
                    SUMS: constexpr, ROWS: constexpr, PROJECTED: constexpr, ASYNC: constexpr,
                    ASYNC_PROJECTED: constexpr, CHUNK: constexpr, GROUP: constexpr):
    """With g_t = ∂loss/∂h_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}:
    ∂B_t = Σ_e g_t Δ_t u_t,  ∂C_t = Σ_e h_t ∂y_t,  ∂(Δ_t u_t) = Σ_n g_t B_t,
    ∂(Δ_t A) = g_t exp(Δ_t A) h_{t−1}.

    `leaving` holds exp(Δ_{t+1} A) g_{t+1} at the last step t of each segment.
    """
    e = gl.program_id(0) * BLOCK + arange(BLOCK, along(STATES, 0))
    n = arange(N, along(STATES, 1))
    own_e = gl.program_id(0) * BLOCK + arange(BLOCK, along(OWN, 0))
    k_projected, n_projected = arange(GROUP, along(along(SUMS, 1), 1)), arange(N, along(along(SUMS, 1), 0))
    own_inside = own_e < channels
    states_inside = (n < N_STATE)[:, None] & (e < channels)[None, :]
    # With MANY, of `items` sequences of one segment each; else of one segment of one sequence.
    b = (gl.program_id(1) // segments * items).to(gl.int64)
    part = gl.program_id(1) % segments
    A2, D_e, bias_e = load_weights(A, D, bias, e, n, own_e, channels, N_STATE, HAS_D, HAS_BIAS)

    start = part * segment
    stop = gl.minimum(start + segment, length)
    groups, whole = gl.cdiv(stop - start, GROUP), gl.minimum(stop - start, GROUP)
    of_sums = k_projected[:, None] * N_STATE + n_projected[None, :]
    # Each of a channel alone, one channel a lane; parts of sums over the states; and parts of those over the
    # channels. What is read before something else is written shares its place.
    dts, xs = shared_steps(1, BLOCK, GROUP), shared_steps(1, BLOCK, GROUP)
    dys = shared_steps(1, BLOCK, GROUP)
    d_xs, d_exponents = shared_steps(LANES_N, BLOCK, GROUP), shared_steps(LANES_N, BLOCK, GROUP)
    dCs = shared_parts(GROUP, LANES_E, N)
    ys, dBs = d_xs, dCs
    Bs, Cs = shared(GROUP, N), shared(GROUP, N)
    # The inputs as they lie in memory, of a group; and of the one before that its states come from.
    us, past_us = shared_group(u, GROUP, BLOCK), shared_group(u, GROUP, BLOCK)
    deltas, past_deltas = shared_group(delta, GROUP, BLOCK), shared_group(delta, GROUP, BLOCK)
    douts = shared_group(dout, GROUP, BLOCK)
    zs = shared_group(z, GROUP, BLOCK) if HAS_Z else us
    raw_Bs, past_raw_Bs = shared_group(B, GROUP, N), shared_group(B, GROUP, N)
    raw_Cs = shared_group(C, GROUP, N)
    rows = (us, deltas, douts), (u, delta, dout), (u_b, delta_b, dout_b), (u_l, delta_l, dout_l)
    if HAS_Z:
        rows = ((us, deltas, douts, zs), (u, delta, dout, z), (u_b, delta_b, dout_b, z_b),
                (u_l, delta_l, dout_l, z_l))
    projected = (raw_Bs, raw_Cs), (B, C), (B_b, C_b), (B_l, C_l)
    past_rows = (past_us, past_deltas), (u, delta), (u_b, delta_b), (u_l, delta_l)
    past_projected = (past_raw_Bs,), (B,), (B_b,), (B_l,)
    in_rows = arange(GROUP, along(ROWS, 1)), gl.program_id(0) * BLOCK + arange(BLOCK, along(ROWS, 0))
    in_projected = arange(GROUP, along(PROJECTED, 1)), arange(N, along(PROJECTED, 0))

    dA_sum = gl.zeros_like(A2)
    dD_sum = gl.zeros_like(D_e)
    dbias_sum = gl.zeros_like(D_e)
    g = gl.zeros_like(A2)
    last = start + (groups - 1) * GROUP
    before, next_b = last, b
    h = load_checkpoint(checkpoints, b, last, length, e, n, states_inside, channels, N_STATE, CHUNK)
    fetch(rows, b, last, stop - last, in_rows, channels, UNIT, ASYNC)
    fetch(projected, b, last, stop - last, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
    past = last // CHUNK * CHUNK
    fetch(past_rows, b, past, stop - past, in_rows, channels, UNIT, ASYNC)
    fetch(past_projected, b, past, stop - past, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
    asked(ASYNC or ASYNC_PROJECTED)
    count = groups
    if MANY:
        count = groups * gl.minimum(items, batch - gl.program_id(1) * items)
    for _ in range(count):
        first, left, b = before, stop - before, next_b
        if first == last:
            g = leaving_gradient(leaving, A2, b * segments + part, e, n, states_inside, channels, N_STATE,
                                 HAS_LEAVING)
        arrived(ASYNC or ASYNC_PROJECTED)
        for past in range(first // CHUNK * CHUNK, first, GROUP):  # from the checkpoint to this group
            if CHUNK > 2 * GROUP:
                if past % CHUNK > 0:  # the first of them is here already
                    fetch(past_rows, b, past, GROUP, in_rows, channels, UNIT, ASYNC)
                    fetch(past_projected, b, past, GROUP, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
                    asked(ASYNC or ASYNC_PROJECTED)
                    arrived(ASYNC or ASYNC_PROJECTED)
            Bs.store(past_raw_Bs.load(PROJECTED).to(gl.float32))
            for k in gl.static_range(GROUP):
                dt = step_size(row_of(past_deltas, k, OWN) + bias_e, own_inside, SOFTPLUS)
                dts[k].store(dt[None, :])
                xs[k].store((dt * row_of(past_us, k, OWN))[None, :])
            for k in gl.static_range(GROUP):
                h = advance(h, dts[k].load(STATES), xs[k].load(STATES), Bs, k, A2, STATES)

        # What concerns a channel alone.
        Bs.store(raw_Bs.load(PROJECTED).to(gl.float32))
        Cs.store(raw_Cs.load(PROJECTED).to(gl.float32))
        u_, delta_, dt, dy, slope, silu = (), (), (), (), (), ()
        for k in gl.static_range(GROUP):
            u_ += (row_of(us, k, OWN),)
            delta_ += (row_of(deltas, k, OWN) + bias_e,)
            dt += (step_size(delta_[k], own_inside & (k < left), SOFTPLUS),)
            dout_k = row_of(douts, k, OWN)
            if HAS_Z:
                z_ = row_of(zs, k, OWN)
                gate = sigmoid(z_)
                slope += (dout_k * gate * (1.0 + z_ * (1.0 - gate)),)  # ∂loss/∂z = slope · y
                silu += (z_ * gate,)
                dy += (dout_k * silu[k],)
            else:
                dy += (dout_k,)
            dts[k].store(dt[k][None, :])
            xs[k].store((dt[k] * u_[k])[None, :])
            dys[k].store(dy[k][None, :])
        # The group before is on its way while this one is worked on.
        before, to_come = gl.maximum(first - GROUP, start), whole
        if MANY:
            done = (first == start).to(gl.int32)
            before += done * (last - start)
            next_b, to_come = gl.minimum(b + done, batch - 1), stop - before
        fetch(rows, next_b, before, to_come, in_rows, channels, UNIT, ASYNC)
        fetch(projected, next_b, before, to_come, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
        past = before // CHUNK * CHUNK
        if MANY:
            to_come = stop - past
        fetch(past_rows, next_b, past, to_come, in_rows, channels, UNIT, ASYNC)
        fetch(past_projected, next_b, past, to_come, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
        asked(ASYNC or ASYNC_PROJECTED)

        # The states, forwards.
        decay, carried, dC_parts = (), (), ()
        for k in gl.static_range(GROUP):
            decay += (gl.exp2(dts[k].load(STATES) * A2),)
            carried += (decay[k] * h,)
            h = carried[k] + xs[k].load(STATES) * column_of(Bs, k).load(STATES)
            if HAS_Z:
                ys[k].store(sum_states(h * column_of(Cs, k).load(STATES), LANES_N))
            dC_parts += (sum_channels(h * dys[k].load(STATES), LANES_E),)
        dCs.store(stack(dC_parts))
        t = b * length + first
        if HAS_Z:
            for k in gl.static_range(GROUP):
                there = own_inside & (k < left)
                y = gl.sum(ys[k].load(OWN), axis=0) + D_e * u_[k]
                gl.store(dz + b * dz_b + (b * 0 + first + k) * dz_l + own_e,
                         (slope[k] * y).to(dz.dtype.element_ty), mask=there)
                if HAS_OUT:
                    gl.store(out + (t + k) * channels + own_e, (y * silu[k]).to(out.dtype.element_ty),
                             mask=there)
        projected_inside = (k_projected < left)[:, None] & (n_projected < N_STATE)[None, :]
        own = projected_sums + ((gl.program_id(0).to(gl.int64) * 2 * batch + b) * length + first) * N_STATE
        gl.store(own + (b * 0 + batch) * length * N_STATE + of_sums, gl.sum(dCs.load(SUMS), axis=1),
                 mask=projected_inside)

        # Their gradients, backwards; the registers of the states are free for those of the group before.
        h = load_checkpoint(checkpoints, next_b, before, length, e, n, states_inside, channels, N_STATE,
                            CHUNK)
        dB_parts = ()
        for k in gl.static_range(GROUP - 1, -1, -1):
            g += column_of(Cs, k).load(STATES) * dys[k].load(STATES)
            dB_parts += (sum_channels(g * xs[k].load(STATES), LANES_E),)
            d_xs[k].store(sum_states(g * column_of(Bs, k).load(STATES), LANES_N))
            d_exponent = g * carried[k]
            d_exponents[k].store(sum_states(d_exponent * A2, LANES_N))
            dt_k = dts[k].load(STATES)
            dA_sum += d_exponent * dt_k
            # Registers are left for two decays; the other two are computed again.
            g = g * gl.exp2(dt_k * A2) if k < GROUP - 2 else g * decay[k]
        dBs.store(stack((dB_parts[3], dB_parts[2], dB_parts[1], dB_parts[0])))
        gl.store(own + of_sums, gl.sum(dBs.load(SUMS), axis=1), mask=projected_inside)
        for k in gl.static_range(GROUP):
            there = own_inside & (k < left)
            d_x = gl.sum(d_xs[k].load(OWN), axis=0)
            d_delta = d_x * u_[k] + gl.sum(d_exponents[k].load(OWN), axis=0) * LN_2
            if SOFTPLUS:
                d_delta = d_delta * sigmoid(delta_[k])
            d_delta = gl.where(there, d_delta, 0.0)
            gl.store(du + (t + k) * channels + own_e, (d_x * dt[k] + dy[k] * D_e).to(du.dtype.element_ty),
                     mask=there)
            gl.store(ddelta + (t + k) * channels + own_e, d_delta.to(ddelta.dtype.element_ty), mask=there)
            dD_sum += dy[k] * u_[k]
            dbias_sum += d_delta
    own = weight_sums + gl.program_id(1).to(gl.int64) * (N_STATE + 2) * channels
    gl.store(states_at(own, e, n, channels), dA_sum, mask=states_inside)
    gl.store(own + N_STATE * channels + own_e, dD_sum, mask=own_inside)
    gl.store(own + (N_STATE + 1) * channels + own_e, dbias_sum, mask=own_inside)


# ---- What enters a segment ---------------------------------------------------------------------------------


@jit
def segment_kernel(u, delta, A, B, C, z, bias, dout, carried, delta_sums,
                   u_b, u_l: constexpr, delta_b, delta_l: constexpr, B_b, B_l: constexpr, C_b,
                   C_l: constexpr, z_b, z_l: constexpr, dout_b, dout_l: constexpr, UNIT: constexpr,
                   length, channels: constexpr, N_STATE: constexpr, segment, segments,
                   HAS_Z: constexpr, HAS_BIAS: constexpr, SOFTPLUS: constexpr,
                   REVERSE: constexpr, N: constexpr, BLOCK: constexpr, STATES: constexpr,
                   ROWS: constexpr, PROJECTED: constexpr, ASYNC: constexpr, ASYNC_PROJECTED: constexpr,
                   GROUP: constexpr):
    """What one segment adds to the state after it (or, in REVERSE, to the gradient before it), and its ΣΔ.

    Of the last (in REVERSE the first) segment nobody asks.
    """
    e = gl.program_id(0) * BLOCK + arange(BLOCK, along(STATES, 0))
    n = arange(N, along(STATES, 1))
    inside = e < channels
    b = (gl.program_id(1) // (segments - 1)).to(gl.int64)
    part = gl.program_id(1) % (segments - 1)
    if REVERSE:
        part += 1
    A2, _, bias_e = load_weights(A, A, bias, e, n, e, channels, N_STATE, False, HAS_BIAS)

    start = part * segment
    stop = gl.minimum(start + segment, length)
    # Forward it is u and B that drive the state; in reverse the gradient of y, and C, and time counts down.
    deltas = shared_groups(delta, GROUP, BLOCK)
    if REVERSE:
        t = 1 - stop
        xs, raw_ontos = shared_groups(dout, GROUP, BLOCK), shared_groups(C, GROUP, N)
        rows = (xs, deltas), (dout, delta), (dout_b, delta_b), (-dout_l, -delta_l)
        projected = (raw_ontos,), (C,), (C_b,), (-C_l,)
        zs = xs
        if HAS_Z:
            zs = shared_groups(z, GROUP, BLOCK)
            rows = (xs, deltas, zs), (dout, delta, z), (dout_b, delta_b, z_b), (-dout_l, -delta_l, -z_l)
    else:
        t = start
        xs, raw_ontos = shared_groups(u, GROUP, BLOCK), shared_groups(B, GROUP, N)
        rows = (xs, deltas), (u, delta), (u_b, delta_b), (u_l, delta_l)
        projected = (raw_ontos,), (B,), (B_b,), (B_l,)
    in_rows = arange(GROUP, along(ROWS, 1)), gl.program_id(0) * BLOCK + arange(BLOCK, along(ROWS, 0))
    in_projected = arange(GROUP, along(PROJECTED, 1)), arange(N, along(PROJECTED, 0))
    ontos = shared(GROUP, N)

    h = gl.zeros_like(A2)
    delta_sum = gl.zeros_like(bias_e)
    left = stop - start
    fetch(into(0, rows), b, t, left, in_rows, channels, UNIT, ASYNC)
    fetch(into(0, projected), b, t, left, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
    asked(ASYNC or ASYNC_PROJECTED)
    slot = 0
    for _ in range(0, stop - start, GROUP):
        arrived(ASYNC or ASYNC_PROJECTED)
        ontos.store(raw_ontos.index(slot).load(PROJECTED).to(gl.float32))
        now_left, t, left = left, t + GROUP, left - GROUP
        # The next group is on its way while this one is worked on.
        fetch(into(1 - slot, rows), b, t, left, in_rows, channels, UNIT, ASYNC)
        fetch(into(1 - slot, projected), b, t, left, in_projected, N_STATE, UNIT, ASYNC_PROJECTED)
        asked(ASYNC or ASYNC_PROJECTED)
        for k in gl.static_range(GROUP):
            dt = step_size(row_of(deltas.index(slot), k, STATES) + bias_e, inside & (k < now_left), SOFTPLUS)
            x = row_of(xs.index(slot), k, STATES)
            if REVERSE:
                if HAS_Z:
                    z_ = row_of(zs.index(slot), k, STATES)
                    x = x * z_ * sigmoid(z_)
                h += x[None, :] * column_of(ontos, k).load(STATES)
                h = gl.exp2(dt[None, :] * A2) * h
            else:
                h = advance(h, dt[None, :], (dt * x)[None, :], ontos, k, A2, STATES)
            delta_sum += dt
        slot = 1 - slot
    own = b * segments + part
    gl.store(states_at(carried + own * N_STATE * channels, e, n, channels), h,
             mask=(n < N_STATE)[:, None] & inside[None, :])
    gl.store(delta_sums + own * channels + e, delta_sum, mask=inside)


@jit
def carry_kernel(A, carried, delta_sums, begin, entering, channels, N_STATE: constexpr, segments,
                 HAS_BEGIN: constexpr, REVERSE: constexpr, STEPS: constexpr, COLUMNS: constexpr,
                 TILE: constexpr):
    """What enters each segment, from what each adds: h ← exp(A ΣΔ) h + carried, segment after segment.

    Every state has a lane of its own, and STEPS segments are loaded at once: memory is waited for seldom.
    """
    column = gl.program_id(0) * COLUMNS + arange(COLUMNS, TILE)
    size = N_STATE * channels
    b = gl.program_id(1).to(gl.int64)
    inside, e = column < size, column % channels
    A2 = gl.load(A + e * N_STATE + column // channels, mask=inside, other=0.0).to(gl.float32) * LOG2_E
    h = gl.zeros_like(A2)
    if HAS_BEGIN:
        h = gl.load(begin + b * size + column, mask=inside, other=0.0)
    own, step = b * segments, 1
    if REVERSE:
        own, step = b * segments + segments - 1, -1
    for first in range(0, segments, STEPS):
        totals, added = (), ()
        for k in gl.static_range(STEPS):
            there = inside & (column * 0 + first + k < segments - 1)
            totals += (gl.load(delta_sums + (own + k * step) * channels + e, mask=there, other=0.0),)
            added += (gl.load(carried + (own + k * step) * size + column, mask=there, other=0.0),)
        for k in gl.static_range(STEPS):
            gl.store(entering + (own + k * step) * size + column, h,
                     mask=inside & (column * 0 + first + k < segments))
            h = gl.exp2(totals[k] * A2) * h + added[k]
        own += STEPS * step


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
    size = gl.program_id(0).to(gl.int64) * 0 + size  # twice of it may not fit into 32 bits
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

    `chunk` is a multiple of AHEAD: longer ones take less memory, and more time in the backward.
    """
    b, l, e = u.shape
    n = A.shape[1]
    u, delta, B, C, z = map(_rows, (u, delta, B, C, z))
    A, D, delta_bias = map(_contiguous, (A, D, delta_bias))
    out = torch.empty(b, l, e, device=u.device, dtype=u.dtype)
    last_state = torch.empty(b, n, e, device=u.device, dtype=torch.float32)
    checkpoints = torch.empty(b, (l - 1) // chunk if save else 0, n, e, device=u.device, dtype=kept)
    plan = _plan(b, l, e, n, chunk, backward=False)
    segments = triton.cdiv(l, plan.segment)
    entering = u
    if segments > 1:
        entering = _enter(None, u, delta, A, B, C, z, delta_bias, u, delta_softplus, plan.segment,
                          reverse=False)
    unit = _unit(u, delta, B, C, z)
    forward_kernel[(triton.cdiv(e, plan.block) * b * segments,)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, entering, out, last_state, checkpoints,
        *_strides(unit, u, delta, B, C, z), unit, l, e, n, plan.segment, segments,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        SAVE=save, SEGMENTED=segments > 1, CHUNK=chunk, GROUP=AHEAD, ASYNC=_async(unit, u, delta, z),
        ASYNC_PROJECTED=_async(unit, B, C), **plan.arguments(n, 16 // u.element_size()))
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
        leaving = _enter(leaving, u, delta, A, B, C, z, delta_bias, dout, delta_softplus, plan.segment,
                         reverse=True)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=u.device, dtype=torch.float32)

    # What each program has of ∂A, ∂D and ∂Δ bias, and each channel block of ∂B and ∂C.
    programs = triton.cdiv(b, plan.items) * segments
    weight_sums, projected_sums = empty(programs, n + 2, e), empty(blocks, 2, b, l, n)
    unit = _unit(u, delta, B, C, z, dout)
    backward_kernel[(blocks, programs)](
        u, delta, A, B, C, A if D is None else D, u if z is None else z,
        A if delta_bias is None else delta_bias, checkpoints, dout, u if leaving is None else leaving,
        u if out is None else out, du, ddelta, du if dz is None else dz, weight_sums, projected_sums,
        *_strides(unit, u, delta, B, C, z, dout), *_strides(1, dz), unit, l, e, n, plan.segment, segments,
        b, plan.items, MANY=plan.items > 1,
        HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
        HAS_LEAVING=leaving is not None, HAS_OUT=out is not None, CHUNK=chunk, GROUP=GROUP,
        ASYNC=_async(unit, u, delta, z, dout), ASYNC_PROJECTED=_async(unit, B, C),
        **plan.arguments(n, 16 // u.element_size(), backward=True))
    dA, dD, dbias = empty(e, n), empty(e), empty(e)
    rows, columns = 32, 32
    sum_weights_kernel[(triton.cdiv((n + 2) * e, columns),)](
        weight_sums, dA, dD, dbias, programs, e, n, ROWS=rows, COLUMNS=columns,
        TILE=None if INTERPRETED else gl.BlockedLayout([8, 1], [1, 32], [4, 1], [1, 0]), num_warps=4)
    columns = 256
    sum_projected_kernel[(triton.cdiv(2 * b * l * n, columns),)](
        projected_sums, dB, dC, blocks, b * l * n, dB.stride(1), dC.stride(1), n, COLUMNS=columns,
        TILE=None if INTERPRETED else gl.BlockedLayout([2], [32], [4], [0]), num_warps=4)
    return dA, dD, dbias


def _enter(begin: Tensor | None, u, delta, A, B, C, z, delta_bias, dout, delta_softplus: bool, segment: int,
           reverse: bool) -> Tensor:
    """The state that enters each segment from `begin` (or, in reverse, the gradient), (b, segments, n, e)."""
    b, l, e = u.shape
    n = A.shape[1]
    segments = triton.cdiv(l, segment)
    plan = _plan(b, l, e, n, CHUNK, backward=False)
    carried, entering = torch.empty(2, b, segments, n, e, device=u.device, dtype=torch.float32)
    delta_sums = torch.empty(b, segments, e, device=u.device, dtype=torch.float32)
    unit = _unit(u, delta, B, C, z, dout)
    segment_kernel[(triton.cdiv(e, plan.block), b * (segments - 1))](
        u, delta, A, B, C, u if z is None else z, A if delta_bias is None else delta_bias, dout, carried,
        delta_sums, *_strides(unit, u, delta, B, C, z, dout), unit, l, e, n, segment, segments,
        HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, REVERSE=reverse,
        ASYNC=_async(unit, u, delta, z, dout), ASYNC_PROJECTED=_async(unit, B, C), GROUP=AHEAD,
        **plan.arguments(n, 16 // u.element_size()))
    columns = 128
    carry_kernel[(triton.cdiv(n * e, columns), b)](
        A, carried, delta_sums, carried if begin is None else begin, entering, e, n, segments,
        HAS_BEGIN=begin is not None, REVERSE=reverse, STEPS=min(16, triton.next_power_of_2(segments)),
        COLUMNS=columns, TILE=None if INTERPRETED else gl.BlockedLayout([1], [32], [4], [0]), num_warps=4)
    return entering


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A tensor (b, l, ·) whose last dimension is adjacent in memory: itself, wherever it can be."""
    return tensor if tensor is None or tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _unit(*tensors: Tensor | None) -> int:
    """What strides over the batch are multiples of, at most 16: tells the compiler how rows are aligned."""
    return math.gcd(16, *(tensor.stride(0) for tensor in tensors if tensor is not None))


def _async(unit: int, *tensors: Tensor | None) -> bool:
    """Whether the device can copy these into shared memory by itself: from Ampere on, four bytes or more."""
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return all(tensor is None or tensor.element_size() >= 4
               or tensor.data_ptr() % 16 == unit % 2 == tensor.stride(1) % 2 == tensor.shape[2] % 2 == 0
               for tensor in tensors)


def _strides(unit: int, *tensors: Tensor | None) -> list[int]:
    """Strides over batch, in units, and time of each.

    Those over time are constants of the kernels: an address is then one register and a number in the
    instruction, and the compiler sees how a slice of x_proj's output is aligned.
    """
    return [stride for tensor in tensors for stride in
            ((0, 0) if tensor is None else (tensor.stride(0) // unit, tensor.stride(1)))]
