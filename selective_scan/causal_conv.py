"""The short convolution before the scan: causal, depthwise, with its SiLU, in one pass.

`causal_conv_silu` runs a fused kernel where there is one (Triton on CUDA, Numba on the CPU);
`causal_conv_silu_plain` is the same in plain PyTorch, and what the kernels are tested against.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_scan.dispatch import choose_implementation, refuse_forward_mode

MODULES = {"triton": "selective_scan.causal_conv_cuda", "numba": "selective_scan.causal_conv_cpu"}


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a depthwise convolution over the present token and the w−1 before it (2312.00752, section 3.4).

        out_t = silu(bias + Σ_k weight_k x_{t−w+1+k}),    x before the first token 0

    Args:
        x: (batch, length, channels), floating point; the channels of a token adjacent, else it is copied.
        weight: (channels, 1, w), as `nn.Conv1d` keeps it.
        bias: (channels,), or None.

    Returns:
        (batch, length, channels) in x's dtype; sums are float32 (float64 if x is float64).

    Raises:
        ValueError: shapes that do not fit each other, or an empty one.
        TypeError: an x that is not of floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be of floating point, but is {x.dtype}")
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, channels), none of them 0, but is {tuple(x.shape)}")
    channels = x.shape[2]
    if weight.dim() != 3 or weight.shape[:2] != (channels, 1) or weight.shape[2] == 0:
        raise ValueError(f"weight must be (channels, 1, w) = ({channels}, 1, ≥ 1), but is "
                         f"{tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must have shape ({channels},), but is {tuple(bias.shape)}")
    name = choose_implementation(x)
    return _forward(x, weight, bias, name) if name in MODULES else causal_conv_silu_plain(x, weight, bias)


def causal_conv_silu_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv_silu` in plain PyTorch, for any device and dtype.

    Written as a channels-last 2-D convolution of height 1: PyTorch's 1-D convolution would transpose.
    """
    taps = weight.shape[-1]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    image = x.transpose(1, 2).unsqueeze(2)                                            # (b, e, 1, l)
    image = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, taps - 1), groups=weight.shape[0])
    return F.silu(image[..., :x.shape[1]].squeeze(2).transpose(1, 2)).to(x.dtype)  # autocast's is another


# ---- The operator, registered so that torch.compile and torch.export see one opaque node. -----------------


@torch.library.custom_op("vision_mamba2::causal_conv_silu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
    with torch.cuda.device_of(x):  # where Triton launches its kernels
        return importlib.import_module(MODULES[implementation]).forward(x, weight, bias)


@_forward.register_fake
def _(x, weight, bias, implementation):
    return x.new_empty(x.shape)


@torch.library.custom_op("vision_mamba2::causal_conv_silu_backward", mutates_args=())
def _backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
              implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = importlib.import_module(MODULES[implementation]).backward(dout, x, weight, bias, dx)
    # Contiguous, as the fake one says, or torch.compile refuses it.
    return dx, dweight.to(weight.dtype).contiguous(), dbias.to(weight.dtype if bias is None else bias.dtype)


@_backward.register_fake
def _(dout, x, weight, bias, implementation):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx, dout):
    refuse_forward_mode()
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(dout, x, weight, bias, ctx.implementation)
    return dx, dweight, None if bias is None else dbias, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
