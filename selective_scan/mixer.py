"""The whole mixer, or the block around it, as one operator that keeps little for the backward: CUDA only.

What PyTorch's autograd would keep of a Mamba block (the norm's output, in_proj's, the convolution's, Δ before
and after its projection, the gated output) is most of a training step's memory. `mixer` and `mamba_block`
keep their input and the scan's checkpoints and compute the rest again; the gated output, which out_proj's
gradient needs, falls out of the scan's backward. They give what `SelectiveScan.forward` and
`MambaBlock.forward` (after its `position_conv`) give line by line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selective_scan.dispatch import choose_implementation, refuse_forward_mode


class Weights(NamedTuple):
    """A mixer's weights, as the official module keeps them; e channels, n states, rank r, w taps."""

    in_proj: Tensor           # (2e, d)
    conv_weight: Tensor       # (e, 1, w)
    conv_bias: Tensor | None  # (e,)
    x_proj: Tensor            # (r + 2n, e)
    dt_proj: Tensor           # (e, r)
    dt_bias: Tensor           # (e,)
    A_log: Tensor             # (e, n)
    D: Tensor                 # (e,)
    out_proj: Tensor          # (d, e)


def saves_memory(x: Tensor) -> bool:
    """Whether these operators take this input, and there will be a backward to save memory for."""
    return torch.is_grad_enabled() and choose_implementation(x) == "triton"


def mixer(x: Tensor, weights: Weights) -> Tensor:
    """x (b, l, d) → (b, l, d), in x's dtype or, under autocast, in autocast's: `SelectiveScan.forward`."""
    return _forward(x[:, None], None, None, None, *weights, 0.0, "right", _dtype(x))[0][:, 0]


def mamba_block(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, direction: str,
                scale: Tensor | None, weights: Weights) -> Tensor:
    """A map x (b, height, width, d) + scale · mixer(LayerNorm(x)), scanned in one direction.

    Args:
        x: any strides; one that is not contiguous is copied.
        norm_weight, norm_bias, eps: LayerNorm's, (d,).
        direction: "right", "down", "left" or "up": the order of the tokens.
        scale: (b,) float32, of each image's branch (drop path), or None for 1.
        weights: the mixer's.

    Returns:
        (b, height, width, d) in the wider of x's dtype and that of the products (x's or autocast's).
    """
    return _forward(x.contiguous(), norm_weight, norm_bias, scale, *weights, eps, direction, _dtype(x))[0]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def _checkpoints(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Steps between checkpoints of the state, and their dtype: the same bytes a step for any inputs.

    Beside inputs of half precision a checkpoint rounded once loses nothing; bfloat16 has float32's range.
    """
    return (16, torch.float32) if dtype == torch.float32 else (8, torch.bfloat16)


@torch.library.custom_op("vision_mamba2::block", mutates_args=())
def _forward(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, scale: Tensor | None,
             in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor,
             dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor, eps: float, direction: str,
             dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without norm_weight the mixer alone: no norm, and no residual.

    Besides the output what the backward needs: the checkpoints, A, and the matrices in `dtype`.
    """
    from selective_scan import block_cuda, cuda

    given = Weights(in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    with torch.cuda.device_of(x):  # where Triton launches its kernels
        A, matrices = -torch.exp(A_log.float()), _cast(given, dtype)
        weights = _with(given, matrices)
        sequence = _enter(x, norm_weight, norm_bias, eps, direction, dtype)
        xz, u, _, delta, B, C = _project(sequence, weights)
        chunk, kept = _checkpoints(dtype)
        out, _, checkpoints = cuda.forward(u, delta, A, B, C, D, xz.chunk(2, dim=-1)[1], dt_bias, True,
                                           True, chunk, kept)
        branch = out @ weights.out_proj.T
        if norm_weight is None:
            return branch.view(x.shape), checkpoints, A, matrices
        return block_cuda.add_residual(x, branch, scale, direction), checkpoints, A, matrices


@_forward.register_fake
def _(x, norm_weight, norm_bias, scale, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
      out_proj, eps, direction, dtype):
    b, height, width, _ = x.shape
    e, n = A_log.shape
    chunk, kept = _checkpoints(dtype)
    out = dtype if norm_weight is None else torch.promote_types(x.dtype, dtype)
    given = Weights(in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    return (x.new_empty(x.shape, dtype=out),
            x.new_empty(b, (height * width - 1) // chunk, n, e, dtype=kept),
            x.new_empty(e, n, dtype=torch.float32), x.new_empty(_cast_size(given, dtype), dtype=dtype))


@torch.library.custom_op("vision_mamba2::block_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
              scale: Tensor | None, in_proj: Tensor, conv_weight: Tensor, conv_bias: Tensor | None,
              x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, out_proj: Tensor,
              eps: float, direction: str, dtype: torch.dtype, checkpoints: Tensor, A: Tensor,
              matrices: Tensor) -> list[Tensor]:
    """The gradients of x, of the norm and of the weights that are not None, in their order and dtypes."""
    from selective_scan import block_cuda

    given = Weights(in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj)
    dy = dy.contiguous()
    sequence = _enter(x, norm_weight, norm_bias, eps, direction, dtype)
    dbranch = block_cuda.residual_backward(dy, scale, direction, dtype)
    dsequence, dweights = _mixer_backward(dbranch, sequence, _with(given, matrices), dt_proj.shape[1], A,
                                          checkpoints)
    if norm_weight is None:
        gradients = [dsequence.view(x.shape)]
    else:
        gradients = block_cuda.norm_backward(dsequence, dy, x, norm_weight, eps, direction)
    inputs = [x, norm_weight, norm_bias, *given]
    gradients = [*gradients, *[None] * (3 - len(gradients)), *dweights]
    return [gradient.to(tensor.dtype).contiguous()
            for gradient, tensor in zip(gradients, inputs, strict=True) if tensor is not None]


@_backward.register_fake
def _(dy, x, norm_weight, norm_bias, scale, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log,
      D, out_proj, eps, direction, dtype, checkpoints, A, matrices):
    inputs = (x, norm_weight, norm_bias, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
              out_proj)
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _mixer_backward(dy: Tensor, x: Tensor, weights: Weights, rank: int, A: Tensor,
                    checkpoints: Tensor) -> tuple[Tensor, Weights]:
    """Gradients of the mixer's input x (b, l, d) and of its weights, from its output's, (b, l, d).

    `rank` is that of Δ without what `weights_cuda` fills it up with.
    """
    from selective_scan import causal_conv_cuda, cuda, weights_cuda

    _, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, _, D, out_proj = weights
    r, n = dt_proj.shape[1], A.shape[1]
    xz, u, projected, delta, B, C = _project(x, weights)
    du, dxz, dprojected = torch.empty_like(u), torch.empty_like(xz), torch.empty_like(projected)
    d_dt, dB, dC = dprojected.split([r, n, n], dim=-1)
    dx, dz = dxz.chunk(2, dim=-1)
    dout = dy @ out_proj
    # The scan reads a step's Δ and ∂out before it writes there: ∂Δ and out itself take their places.
    dA, dD, d_dt_bias = cuda.backward_into(du, delta, dB, dC, dz, dout, dout, None, u, delta, A, B, C, D,
                                           xz.chunk(2, dim=-1)[1], dt_bias, True, checkpoints,
                                           _checkpoints(x.dtype)[0])
    ddelta, out = delta, dout
    d_out_proj = _weight_gradient(dy, out)
    torch.mm(_matrix(ddelta), dt_proj, out=_matrix(d_dt))
    d_dt_proj = _weight_gradient(ddelta, projected[..., :r])
    _matrix(du).addmm_(_matrix(dprojected), x_proj)
    d_x_proj = _weight_gradient(dprojected, u)
    d_x_proj, d_dt_proj = weights_cuda.without_filling(d_x_proj, d_dt_proj, rank)
    d_conv_weight, d_conv_bias = causal_conv_cuda.backward(du, xz.chunk(2, dim=-1)[0], conv_weight, conv_bias,
                                                           dx)
    d_in_proj = _weight_gradient(dxz, x)
    return dxz @ weights.in_proj, Weights(d_in_proj, d_conv_weight, d_conv_bias, d_x_proj, d_dt_proj,
                                          d_dt_bias, dA * A, dD, d_out_proj)


def _enter(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, direction: str,
           dtype: torch.dtype) -> Tensor:
    """What goes into the mixer, (b, l, d) of `dtype`."""
    from selective_scan import block_cuda

    if norm_weight is None:
        return x.flatten(1, 2).to(dtype)
    return block_cuda.norm_to_sequence(x, norm_weight, norm_bias, eps, direction, dtype)


def _project(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """in_proj's output, u, x_proj's output, and Δ before its bias, B and C from it."""
    from selective_scan import causal_conv_cuda

    xz = x @ weights.in_proj.T
    u = causal_conv_cuda.forward(xz.chunk(2, dim=-1)[0], weights.conv_weight, weights.conv_bias)
    projected = u @ weights.x_proj.T
    r, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
    dt, B, C = projected.split([r, n, n], dim=-1)
    return xz, u, projected, dt @ weights.dt_proj.T, B, C


PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj")  # the matrices of a mixer


def _matrices(weights: Weights) -> list[Tensor]:
    return [getattr(weights, name) for name in PRODUCTS]


def _cast_size(weights: Weights, dtype: torch.dtype) -> int:
    """Numbers in what `_cast` returns: none where nothing is to be cast."""
    from selective_scan import weights_cuda

    matrices = _matrices(weights)
    return 0 if all(matrix.dtype == dtype for matrix in matrices) else weights_cuda.starts(matrices)[-1]


def _cast(weights: Weights, dtype: torch.dtype) -> Tensor:
    """The matrices of the products in `dtype`, in one array for `_with`."""
    from selective_scan import weights_cuda

    if _cast_size(weights, dtype) == 0:
        return weights.D.new_empty(0, dtype=dtype)
    return weights_cuda.cast(_matrices(weights), dtype)


def _with(weights: Weights, matrices: Tensor) -> Weights:
    """The weights with what `_cast` made of them."""
    from selective_scan import weights_cuda

    if matrices.numel() == 0:
        return weights
    views = weights_cuda.views(matrices, _matrices(weights))
    return weights._replace(**dict(zip(PRODUCTS, views, strict=True)))


def _weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """∂(x Wᵀ)/∂W of matrices (b, l, ·), float32: summed over many tokens, it is not rounded to half."""
    dout, x = _matrix(dout).T, _matrix(x)
    if dout.dtype == torch.float32 or not dout.is_cuda:  # Triton's interpreter runs on the CPU
        return dout @ x
    return torch.mm(dout, x, out_dtype=torch.float32)


def _matrix(tensor: Tensor) -> Tensor:
    """(b, l, ·) as a matrix (b · l, ·): a view, for all that is made here."""
    return tensor.flatten(0, 1)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.direction, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    refuse_forward_mode()
    *tensors, checkpoints, A, matrices = ctx.saved_tensors
    gradients = iter(_backward(dy, *tensors, ctx.eps, ctx.direction, ctx.dtype, checkpoints, A, matrices))
    scale = 3  # it has no gradient: random numbers
    return (*(None if tensor is None or index == scale else next(gradients)
              for index, tensor in enumerate(tensors)), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
