"""Causal depthwise convolution with SiLU on the CPU, in Numba: each input is read once, nothing is kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from selective_scan.cpu import empty, sequences, zeros
from selective_scan.numba_math import kernel, sigmoid
from selective_scan.tasks import blocks, run, slices


@kernel
def forward_task(first, last, channel, length, strides, x, weight, bias, s, out):
    """Forward of batch items first..last−1 and the channels of weight (w, channels) from `channel` on.

    s (channels,) is memory for the convolution of one step.
    """
    taps, width = weight.shape
    for b in range(first, last):
        for t in range(length):
            for i in range(width):
                s[i] = bias[i]
            for k in range(max(0, taps - 1 - t), taps):
                at = b * strides[0, 0] + (t - taps + 1 + k) * strides[0, 1] + channel
                x_k, w_k = x[at:at + width], weight[k]
                for i in range(width):
                    s[i] += w_k[i] * x_k[i]
            out_t = out[b, t, channel:channel + width]
            for i in range(width):
                out_t[i] = s[i] * sigmoid(s[i])


@kernel
def backward_task(first, last, channel, length, strides, dout, x, weight, bias, s, dx, dweight, dbias):
    """Backward of the same; dweight (w, channels) and dbias are this task's own sums over the batch.

    With s the convolution: ∂x_t = Σ_k weight_k ∂s_{t+w−1−k},  ∂weight_k = Σ_t ∂s_t x_{t−w+1+k}.
    """
    taps, width = weight.shape
    for b in range(first, last):
        for t in range(length):
            dx_t = dx[b, t, channel:channel + width]
            for i in range(width):
                s[i] = bias[i]
                dx_t[i] = np.float32(0.0)
            oldest = max(0, taps - 1 - t)
            for k in range(oldest, taps):
                at = b * strides[1, 0] + (t - taps + 1 + k) * strides[1, 1] + channel
                x_k, w_k = x[at:at + width], weight[k]
                for i in range(width):
                    s[i] += w_k[i] * x_k[i]
            at = b * strides[0, 0] + t * strides[0, 1] + channel
            dout_t = dout[at:at + width]
            for i in range(width):
                gate = sigmoid(s[i])
                s[i] = dout_t[i] * gate * (np.float32(1.0) + s[i] * (np.float32(1.0) - gate))
                dbias[i] += s[i]
            for k in range(oldest, taps):
                at = b * strides[1, 0] + (t - taps + 1 + k) * strides[1, 1] + channel
                x_k, w_k, dw_k = x[at:at + width], weight[k], dweight[k]
                dx_k = dx[b, t - taps + 1 + k, channel:channel + width]
                for i in range(width):
                    dx_k[i] += w_k[i] * s[i]
                    dw_k[i] += s[i] * x_k[i]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, e) in x's dtype."""
    b, l, e = x.shape
    (values,), strides = sequences(x)
    taps, shift = _weights(weight, bias)
    out = empty(b, l, e)

    def task(items: range, channels: slice) -> None:
        forward_task(items.start, items.stop, channels.start, l, strides, values,
                     np.ascontiguousarray(taps[:, channels]), shift[channels],
                     np.empty_like(shift[channels]), out.numpy())

    run([(task, items, channels) for _, items in slices(b) for _, channels in blocks(e)])
    return out.to(x.dtype)


def backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
             dx: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x to `dx` and returns those of weight (e, 1, w) and bias (e,), float32."""
    b, l, e = x.shape
    given, strides = sequences(dout, x)
    taps, shift = _weights(weight, bias)
    own_dx = dx if dx.dtype == torch.float32 else empty(b, l, e)
    of_batch = slices(b)
    dweight = zeros(len(of_batch), *taps.shape)
    dbias = zeros(len(of_batch), e)

    def task(index: int, items: range, channels: slice) -> None:
        own_dweight = np.zeros_like(taps[:, channels])
        backward_task(items.start, items.stop, channels.start, l, strides, *given,
                      np.ascontiguousarray(taps[:, channels]), shift[channels],
                      np.empty_like(shift[channels]), own_dx.numpy(), own_dweight,
                      dbias[index, channels].numpy())
        dweight[index, :, channels] = torch.from_numpy(own_dweight)

    run([(task, i, items, channels) for i, items in of_batch for _, channels in blocks(e)])
    if own_dx is not dx:
        dx.copy_(own_dx)
    return dweight.sum(0).T.reshape(weight.shape), dbias.sum(0)


def _weights(weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight as (w, e) and bias as (e,), zero where absent."""
    shift = zeros(len(weight)) if bias is None else bias.detach().float().contiguous()
    return weight.detach().float().squeeze(1).T.contiguous().numpy(), shift.numpy()
