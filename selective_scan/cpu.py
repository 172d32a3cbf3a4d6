"""The selective scan on the CPU: Numba kernels, no compiler needed.

One task is a slice of the batch times a block of channels; tasks run on PyTorch's number of
threads and share nothing, so results do not depend on that number. Inside a task time is sequential
and channels are innermost, where LLVM turns them into SIMD lanes; the states of one block stay in
the first-level cache. The backward recomputes the states of CHUNK steps at a time from checkpoints.

States and all arithmetic are float32.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from selective_scan.numba_math import LN_2, LOG2_E, exp2, kernel, sigmoid, softplus
from selective_scan.tasks import blocks, run, slices

CHUNK = 16       # steps between checkpoints: 2 · 16 · 16 · 256 floats of scratch fit a second-level cache


@kernel
def step_sizes(delta, bias, with_softplus, dt, slope):
    """Δ of one step: bias added, softplus taken; its derivative by what came in, unless `slope` is empty."""
    if with_softplus:
        softplus(delta, bias, dt, slope)
    else:
        for i in range(dt.size):
            dt[i] = delta[i] + bias[i]
        for i in range(slope.size):
            slope[i] = np.float32(1.0)


@kernel
def copy(source, target):
    for i in range(target.size):
        target[i] = source[i]


@kernel
def forward_task(first, last, channel, length, chunk, save, strides, u, delta, A2, B, C, D, z, bias,
                 with_softplus, memory, out, last_state, checkpoints):
    """Forward of batch items first..last−1 and the A2.shape[1] channels from `channel` on."""
    n, width = A2.shape
    h, dt, du, y, no_slope = memory
    for b in range(first, last):
        h[:] = np.float32(0.0)
        for t in range(length):
            if save and t > 0 and t % chunk == 0:
                for s in range(n):
                    copy(h[s], checkpoints[b, t // chunk - 1, s, channel:channel + width])
            at = b * strides[0, 0] + t * strides[0, 1] + channel
            u_t = u[at:at + width]
            at = b * strides[1, 0] + t * strides[1, 1] + channel
            step_sizes(delta[at:at + width], bias, with_softplus, dt, no_slope)
            for i in range(width):
                du[i] = dt[i] * u_t[i]
                y[i] = D[i] * u_t[i]
            at_B = b * strides[2, 0] + t * strides[2, 1]
            at_C = b * strides[3, 0] + t * strides[3, 1]
            for s in range(n):
                b_s, c_s = B[at_B + s], C[at_C + s]
                for i in range(width):
                    value = exp2(dt[i] * A2[s, i]) * h[s, i] + du[i] * b_s
                    h[s, i] = value
                    y[i] += c_s * value
            out_t = out[b, t, channel:channel + width]
            if z.size > 0:
                at = b * strides[4, 0] + t * strides[4, 1] + channel
                z_t = z[at:at + width]
                for i in range(width):
                    out_t[i] = y[i] * z_t[i] * sigmoid(z_t[i])
            else:
                copy(y, out_t)
        for s in range(n):
            copy(h[s], last_state[b, s, channel:channel + width])


@kernel
def backward_task(first, last, channel, length, chunk, strides, u, delta, A2, B, C, D, z, bias, with_softplus,
                  checkpoints, dout, dlast_state, memory, du, ddelta, dA, dB, dC, dD, dz, dbias):
    """Backward of batch items first..last−1 and the A2.shape[1] channels from `channel` on.

    dA, dD and dbias are this task's own sums over the batch; dB and dC this block's own sums over channels.
    With g_t = ∂loss/∂h_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}:
    ∂B_t = Σ_e g_t Δ_t u_t,  ∂C_t = Σ_e h_t ∂y_t,  ∂(Δ_t u_t) = Σ_n g_t B_t,
    ∂(Δ_t A) = g_t exp(Δ_t A) h_{t−1}.
    """
    n, width = A2.shape
    # Of every step of a chunk: decays and what they carry on of the states; Δ, its slope, Δ u and ∂y.
    h, g, decays, carried, dts, slopes, inputs, dys, y, gate, d_input, d_step = memory
    for b in range(first, last):
        for s in range(n):
            copy(dlast_state[b, s, channel:channel + width], g[s])
        for k0 in range((length - 1) // chunk * chunk, -1, -chunk):
            steps = min(chunk, length - k0)
            if k0 > 0:
                for s in range(n):
                    copy(checkpoints[b, k0 // chunk - 1, s, channel:channel + width], h[s])
            else:
                h[:] = np.float32(0.0)
            for k in range(steps):
                t = k0 + k
                at = b * strides[0, 0] + t * strides[0, 1] + channel
                u_t = u[at:at + width]
                at = b * strides[1, 0] + t * strides[1, 1] + channel
                dt, x, dy = dts[k], inputs[k], dys[k]
                step_sizes(delta[at:at + width], bias, with_softplus, dt, slopes[k])
                for i in range(width):
                    x[i] = dt[i] * u_t[i]
                    y[i] = D[i] * u_t[i]
                dout_t = dout[b, t, channel:channel + width]
                if z.size > 0:
                    at = b * strides[4, 0] + t * strides[4, 1] + channel
                    z_t = z[at:at + width]
                    for i in range(width):
                        gate[i] = sigmoid(z_t[i])
                        dy[i] = dout_t[i] * z_t[i] * gate[i]
                else:
                    copy(dout_t, dy)
                at_B = b * strides[2, 0] + t * strides[2, 1]
                at_C = b * strides[3, 0] + t * strides[3, 1]
                for s in range(n):
                    b_s, c_s = B[at_B + s], C[at_C + s]
                    d_c = np.float32(0.0)
                    for i in range(width):
                        decay = exp2(dt[i] * A2[s, i])
                        before = decay * h[s, i]
                        value = before + x[i] * b_s
                        decays[k, s, i] = decay
                        carried[k, s, i] = before
                        h[s, i] = value
                        y[i] += c_s * value
                        d_c += dy[i] * value
                    dC[b, t, s] = d_c
                if z.size > 0:
                    dz_t = dz[b, t, channel:channel + width]
                    for i in range(width):
                        silu_slope = gate[i] * (np.float32(1.0) + z_t[i] * (np.float32(1.0) - gate[i]))
                        dz_t[i] = dout_t[i] * y[i] * silu_slope
            for k in range(steps - 1, -1, -1):
                t = k0 + k
                at = b * strides[0, 0] + t * strides[0, 1] + channel
                u_t = u[at:at + width]
                dt, slope, x, dy = dts[k], slopes[k], inputs[k], dys[k]
                for i in range(width):
                    d_input[i] = np.float32(0.0)
                    d_step[i] = np.float32(0.0)
                at_B = b * strides[2, 0] + t * strides[2, 1]
                at_C = b * strides[3, 0] + t * strides[3, 1]
                for s in range(n):
                    b_s, c_s = B[at_B + s], C[at_C + s]
                    d_b = np.float32(0.0)
                    for i in range(width):
                        g_i = g[s, i] + dy[i] * c_s
                        d_b += g_i * x[i]
                        d_input[i] += g_i * b_s
                        g[s, i] = g_i * decays[k, s, i]
                        d_exponent = g_i * carried[k, s, i]
                        d_step[i] += d_exponent * A2[s, i]
                        dA[s, i] += d_exponent * dt[i]
                    dB[b, t, s] = d_b
                du_t = du[b, t, channel:channel + width]
                ddelta_t = ddelta[b, t, channel:channel + width]
                for i in range(width):
                    du_t[i] = d_input[i] * dt[i] + dy[i] * D[i]
                    d_delta = (d_input[i] * u_t[i] + d_step[i] * LN_2) * slope[i]
                    ddelta_t[i] = d_delta
                    dD[i] += dy[i] * u_t[i]
                    dbias[i] += d_delta


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
            delta_bias: Tensor | None, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b, l, e) in u's dtype, last state (b, n, e) and checkpoints (b, (l−1)/CHUNK, n, e), float32."""
    b, l, e = u.shape
    n = A.shape[1]
    inputs, strides = sequences(u, delta, B, C, z)
    weights = _weights(A, D, delta_bias)
    out = empty(b, l, e)
    last_state = empty(b, n, e)
    checkpoints = empty(b, (l - 1) // CHUNK if save else 0, n, e)
    results = [tensor.numpy() for tensor in (out, last_state, checkpoints)]

    def task(items: range, channels: slice) -> None:
        u, delta, B, C, z = inputs
        A2, D, bias = (weight[..., channels] for weight in weights)
        width = A2.shape[1]
        memory = scratch((n, width), width, width, width, 0)
        forward_task(items.start, items.stop, channels.start, l, CHUNK, save, strides, u, delta,
                     np.ascontiguousarray(A2), B, C, D, z, bias, delta_softplus, memory, *results)

    run([(task, items, channels) for _, items in slices(b) for _, channels in blocks(e)])
    return out.to(u.dtype), last_state, checkpoints


def backward(dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
             C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
             checkpoints: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias; float32, or None where there was no input."""
    b, l, e = u.shape
    n = A.shape[1]
    inputs, strides = sequences(u, delta, B, C, z)
    weights = _weights(A, D, delta_bias)
    of_batch, of_channels = slices(b), blocks(e)
    if dlast_state is None:
        dlast_state = zeros(b, n, e)
    given = [tensor.float().contiguous().numpy() for tensor in (checkpoints, dout, dlast_state)]
    du, ddelta = empty(b, l, e), empty(b, l, e)
    dz = empty(b, l, e) if z is not None else None
    # Sums over channels are kept for each block, sums over the batch for each slice, then added in order.
    dB, dC = empty(len(of_channels), b, l, n), empty(len(of_channels), b, l, n)
    dA = zeros(len(of_batch), n, e)
    dD, dbias = zeros(2, len(of_batch), e)

    def task(slice_index: int, items: range, block_index: int, channels: slice) -> None:
        u, delta, B, C, z = inputs
        A2, D, bias = (weight[..., channels] for weight in weights)
        own_dA = np.zeros(A2.shape, np.float32)
        state, width = A2.shape, A2.shape[1]
        of_each_step = (CHUNK, width)
        memory = scratch(state, state, (CHUNK, *state), (CHUNK, *state), of_each_step, of_each_step,
                         of_each_step, of_each_step, width, width, width, width)
        backward_task(items.start, items.stop, channels.start, l, CHUNK, strides, u, delta,
                      np.ascontiguousarray(A2), B, C, D, z, bias, delta_softplus, *given, memory,
                      du.numpy(), ddelta.numpy(), own_dA, dB[block_index].numpy(), dC[block_index].numpy(),
                      dD[slice_index, channels].numpy(), NOTHING_3D if dz is None else dz.numpy(),
                      dbias[slice_index, channels].numpy())
        dA[slice_index, :, channels] = torch.from_numpy(own_dA)

    run([(task, i, items, j, channels) for i, items in of_batch for j, channels in of_channels])
    return (du, ddelta, dA.sum(0).T, dB.sum(0) if len(of_channels) > 1 else dB[0],
            dC.sum(0) if len(of_channels) > 1 else dC[0],
            None if D is None else dD.sum(0), dz, None if delta_bias is None else dbias.sum(0))


def scratch(*shapes: int | tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Memory for one task's kernel, float32."""
    return tuple(np.empty(shape, np.float32) for shape in shapes)


NOTHING = np.empty(0, np.float32)
NOTHING_3D = np.empty((0, 0, 0), np.float32)


def sequences(*tensors: Tensor | None) -> tuple[list[np.ndarray], np.ndarray]:
    """The inputs (b, l, ·) as flat arrays with strides over batch and time, copied only where needed.

    Slices of a linear layer's output have rows apart; as flat arrays with explicit strides they need no copy,
    and LLVM still knows that channels are adjacent.
    """
    arrays, strides = [], []
    for tensor in tensors:
        if tensor is None:
            arrays.append(NOTHING)
            strides.append((0, 0))
            continue
        tensor = tensor.detach().float()
        if tensor.stride(2) != 1 or min(tensor.stride()) < 0:
            tensor = tensor.contiguous()
        b, l, channels = tensor.shape
        size = (b - 1) * tensor.stride(0) + (l - 1) * tensor.stride(1) + channels
        arrays.append(tensor.as_strided((size,), (1,)).numpy())
        strides.append(tensor.stride()[:2])
    return arrays, np.array(strides, np.int64)


def empty(*shape: int) -> Tensor:
    """float32 on the CPU, whatever PyTorch's defaults are, which a caller may have set."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def zeros(*shape: int) -> Tensor:
    """As `empty`."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _weights(A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> list[np.ndarray]:
    """A·log₂e as (n, e), D and Δ bias as (e,), zero where absent: what the kernels read."""
    A2 = (A.detach().float() * float(LOG2_E)).T.contiguous()
    absent = zeros(A.shape[0])
    return [A2.numpy(), *((absent if weight is None else weight.detach().float().contiguous()).numpy()
                          for weight in (D, delta_bias))]
