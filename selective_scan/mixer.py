"""The whole mixer as one operator that keeps little for the backward: CUDA only.

What PyTorch's autograd would keep of a Mamba mixer (in_proj's output, the convolution's, Δ before and after
its projection, the gated output) is most of a training step's memory. `mixer` keeps its input and the scan's
checkpoints and computes the rest again; the gated output, which out_proj's gradient needs, falls out of the
scan's backward. It gives what `SelectiveScan.forward` gives line by line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_scan.dispatch import HAS_TRITON

CHUNK = 16  # steps between checkpoints: half the memory of the scan's own 8, for a tenth of its backward


def saves_memory(x: Tensor) -> bool:
    """Whether `mixer` takes this input, and there will be a backward to save memory for."""
    return torch.is_grad_enabled() and x.device.type == "cuda" and HAS_TRITON and x.dtype != torch.float64


def mixer(x: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
          dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor) -> Tensor:
    """x (b, l, d) → (b, l, d), in x's dtype or, under autocast, in autocast's.

    The weights are those of the official module: in_proj.weight (2e, d), conv1d.weight (e, 1, w),
    x_proj.weight (r + 2n, e), dt_proj.weight (e, r), A_log (e, n), D (e,), out_proj.weight (d, e).
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return _forward(x.to(dtype), in_proj.to(dtype), conv_weight, conv_bias, x_proj.to(dtype),
                    dt_proj.to(dtype), dt_bias, A_log, D, out_proj.to(dtype))[0]


@torch.library.custom_op("vision_mamba2::mixer", mutates_args=())
def _forward(x: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
             dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
             out_proj: Tensor) -> tuple[Tensor, Tensor]:
    from selective_scan import cuda

    xz, u, _, delta, B, C = _project(x, in_proj, conv_weight, conv_bias, x_proj, dt_proj)
    A = -torch.exp(A_log.float())
    z = xz.chunk(2, dim=-1)[1]
    out, _, checkpoints = cuda.forward(u, delta, A, B, C, D, z, dt_bias, True, True, CHUNK)
    return out @ out_proj.T, checkpoints


@_forward.register_fake
def _(x, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj):
    b, l, _ = x.shape
    e, n = A_log.shape
    return (x.new_empty(b, l, out_proj.shape[0]),
            x.new_empty(b, (l - 1) // CHUNK, n, e, dtype=torch.float32))


@torch.library.custom_op("vision_mamba2::mixer_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor | None,
              x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor,
              checkpoints: Tensor) -> list[Tensor]:
    """The gradients of the inputs that are not None, in their order, dtypes and shapes."""
    from selective_scan import causal_conv_cuda, cuda

    r, n = dt_proj.shape[1], A_log.shape[1]
    xz, u, projected, delta, B, C = _project(x, in_proj, conv_weight, conv_bias, x_proj, dt_proj)
    A = -torch.exp(A_log.float())
    du, dxz, dprojected = torch.empty_like(u), torch.empty_like(xz), torch.empty_like(projected)
    d_dt, dB, dC = dprojected.split([r, n, n], dim=-1)
    dx, dz = dxz.chunk(2, dim=-1)
    dy = dy.contiguous()
    dout = dy @ out_proj
    # The scan reads a step's Δ and ∂out before it writes there: ∂Δ and out itself take their places.
    dA, dD, d_dt_bias = cuda.backward_into(du, delta, dB, dC, dz, dout, dout, None, u, delta, A, B, C, D,
                                           xz.chunk(2, dim=-1)[1], dt_bias, True, checkpoints, CHUNK)
    ddelta, out = delta, dout
    d_out_proj = _matrix(dy).T @ _matrix(out)
    torch.mm(_matrix(ddelta), dt_proj, out=_matrix(d_dt))
    d_dt_proj = _matrix(ddelta).T @ _matrix(projected)[:, :r]
    _matrix(du).addmm_(_matrix(dprojected), x_proj)
    d_x_proj = _matrix(dprojected).T @ _matrix(u)
    d_conv_weight, d_conv_bias = causal_conv_cuda.backward(du, xz.chunk(2, dim=-1)[0], conv_weight, conv_bias,
                                                           dx)
    d_in_proj = _matrix(dxz).T @ _matrix(x)
    inputs = (x, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    gradients = (dxz @ in_proj, d_in_proj, d_conv_weight, d_conv_bias, d_x_proj, d_dt_proj, d_dt_bias, dA * A,
                 dD, d_out_proj)
    return [gradient.to(tensor.dtype).contiguous()
            for gradient, tensor in zip(gradients, inputs, strict=True) if tensor is not None]


@_backward.register_fake
def _(dy, x, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, checkpoints):
    inputs = (x, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _project(x: Tensor, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
             dt_proj: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """in_proj's output, u, x_proj's output, and Δ before its bias, B and C from it."""
    from selective_scan import causal_conv_cuda

    xz = x @ in_proj.T
    u = causal_conv_cuda.forward(xz.chunk(2, dim=-1)[0], conv_weight, conv_bias)
    projected = u @ x_proj.T
    n = (projected.shape[-1] - dt_proj.shape[1]) // 2
    dt, B, C = projected.split([dt_proj.shape[1], n, n], dim=-1)
    return xz, u, projected, dt @ dt_proj.T, B, C


def _matrix(tensor: Tensor) -> Tensor:
    """(b, l, ·) as a matrix (b · l, ·): a view, for all that is made here."""
    return tensor.flatten(0, 1)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):
    *inputs, checkpoints = ctx.saved_tensors
    gradients = iter(_backward(dy, *inputs, checkpoints))
    return tuple(None if tensor is None else next(gradients) for tensor in inputs)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
