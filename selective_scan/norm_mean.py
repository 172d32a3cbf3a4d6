"""The mean token after a LayerNorm, what a classifier's head reads, in one pass on CUDA.

`norm_mean` runs Triton's kernels there, since the gradients of PyTorch's LayerNorm alone take as long as a
block's norms, convolution and residual; `norm_mean_plain` is the same in plain PyTorch, and what the kernels
are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_scan.dispatch import choose_implementation, refuse_forward_mode


def norm_mean(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm (arXiv 1607.06450) of every token, then their mean: global average pooling.

    Args:
        x: (batch, …, channels), floating point.
        weight, bias: (channels,).
        eps: added to the variance.

    Returns:
        (batch, channels) in x's dtype or, under autocast on CUDA, float32. Sums are float32 (float64 if x is
        float64).
    """
    if choose_implementation(x) == "triton":
        out = torch.addcmul(bias, _forward(x.flatten(1, -2).contiguous(), eps), weight)
        return out if torch.is_autocast_enabled("cuda") else out.to(x.dtype)
    return norm_mean_plain(x, weight, bias, eps)


def norm_mean_plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`norm_mean` in plain PyTorch, for any device and dtype."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).flatten(1, -2).mean(dim=1)


# ---- The operator, without weight and bias: what they do is done once an image, after the mean. ------------


@torch.library.custom_op("vision_mamba2::norm_mean", mutates_args=())
def _forward(x: Tensor, eps: float) -> Tensor:
    from selective_scan import block_cuda

    with torch.cuda.device_of(x):  # where Triton launches its kernels
        return block_cuda.norm_mean(x, eps)


@_forward.register_fake
def _(x, eps):
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


@torch.library.custom_op("vision_mamba2::norm_mean_backward", mutates_args=())
def _backward(dout: Tensor, x: Tensor, eps: float) -> Tensor:
    from selective_scan import block_cuda

    return block_cuda.norm_mean_backward(dout.contiguous(), x, eps)


@_backward.register_fake
def _(dout, x, eps):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, dout):
    refuse_forward_mode()
    return _backward(dout, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
