"""The mixer from in_proj's output to its own, keeping little for the backward: CUDA only.

What PyTorch's autograd would keep of a Mamba mixer for the backward (the convolution's input and output, Δ
before and after its projection, the gated output) is most of a training step's memory. `mix_and_project`
keeps in_proj's output and the scan's checkpoints, and computes the rest again; the gated output, which
out_proj's gradient needs, falls out of the scan's backward. It gives what `StateSpace.mix` and out_proj give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selective_scan.dispatch import HAS_TRITON

CHUNK = 16  # steps between checkpoints: half the memory of the scan's own 8, for a tenth of its backward


def saves_memory(xz: Tensor) -> bool:
    """Whether `mix_and_project` takes this input, and there will be a backward to save memory for."""
    return (torch.is_grad_enabled() and xz.device.type == "cuda" and HAS_TRITON
            and xz.dtype != torch.float64)


def mix_and_project(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
                    dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor) -> Tensor:
    """in_proj's output xz (b, l, 2e) → the mixer's output (b, l, d), in xz's dtype.

    The weights are those of the official module: conv1d.weight (e, 1, w), x_proj.weight (r + 2n, e),
    dt_proj.weight (e, r), A_log (e, n), D (e,), out_proj.weight (d, e). Matrix products are in xz's dtype.
    """
    dtype = xz.dtype
    return _forward(xz, conv_weight, conv_bias, x_proj.to(dtype), dt_proj.to(dtype), dt_bias, A_log, D,
                    out_proj.to(dtype))[0]


@torch.library.custom_op("vision_mamba2::mix_and_project", mutates_args=())
def _forward(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor,
             dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor) -> tuple[Tensor, Tensor]:
    from selective_scan import cuda

    z = xz.chunk(2, dim=-1)[1]
    u, _, delta, B, C = _project(xz, conv_weight, conv_bias, x_proj, dt_proj)
    A = -torch.exp(A_log.float())
    out, _, checkpoints = cuda.forward(u, delta, A, B, C, D, z, dt_bias, True, True, CHUNK)
    return out @ out_proj.T, checkpoints


@_forward.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj):
    b, l, _ = xz.shape
    e, n = A_log.shape
    return (xz.new_empty(b, l, out_proj.shape[0]),
            xz.new_empty(b, (l - 1) // CHUNK, n, e, dtype=torch.float32))


@torch.library.custom_op("vision_mamba2::mix_and_project_backward", mutates_args=())
def _backward(dy: Tensor, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
              dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor,
              checkpoints: Tensor) -> list[Tensor]:
    """The gradients of the inputs that are not None, in their order, dtypes and shapes."""
    from selective_scan import causal_conv_cuda, cuda

    r, n = dt_proj.shape[1], A_log.shape[1]
    x, z = xz.chunk(2, dim=-1)
    u, projected, delta, B, C = _project(xz, conv_weight, conv_bias, x_proj, dt_proj)
    A = -torch.exp(A_log.float())
    du, ddelta, out, dxz = (torch.empty_like(tensor, memory_format=torch.contiguous_format)
                            for tensor in (u, delta, u, xz))
    dprojected = torch.empty_like(projected)
    d_dt, dB, dC = dprojected.split([r, n, n], dim=-1)
    dx, dz = dxz.chunk(2, dim=-1)
    dy = dy.contiguous()
    dA, dD, dbias = cuda.backward_into(du, ddelta, dB, dC, dz, out, dy @ out_proj, None, u, delta, A, B, C, D,
                                       z, dt_bias, True, checkpoints, CHUNK)
    d_out_proj = _rows(dy).T @ _rows(out)
    torch.mm(_rows(ddelta), dt_proj, out=_rows(d_dt))
    d_dt_proj = _rows(ddelta).T @ _rows(projected)[:, :r]
    _rows(du).addmm_(_rows(dprojected), x_proj)
    d_x_proj = _rows(dprojected).T @ _rows(u)
    d_conv_weight, d_conv_bias = causal_conv_cuda.backward(du, x, conv_weight, conv_bias, dx)
    gradients = (dxz, d_conv_weight, d_conv_bias, d_x_proj, d_dt_proj, dbias, dA * A, dD, d_out_proj)
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True)
            if tensor is not None]


@_backward.register_fake
def _(dy, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, checkpoints):
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _project(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor,
             dt_proj: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, x_proj's output, and Δ before its bias, B and C from it."""
    from selective_scan import causal_conv_cuda

    u = causal_conv_cuda.forward(xz.chunk(2, dim=-1)[0], conv_weight, conv_bias)
    projected = u @ x_proj.T
    n = (projected.shape[-1] - dt_proj.shape[1]) // 2
    dt, B, C = projected.split([dt_proj.shape[1], n, n], dim=-1)
    return u, projected, dt @ dt_proj.T, B, C


def _rows(tensor: Tensor) -> Tensor:
    """(b, l, ·) as a matrix (b · l, ·), without a copy."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.is_contiguous() else tensor.flatten(0, 1)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):
    *inputs, checkpoints = ctx.saved_tensors
    gradients = iter(_backward(dy, *inputs, checkpoints))
    return tuple(None if tensor is None else next(gradients) for tensor in inputs)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
