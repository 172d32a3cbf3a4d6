"""The short convolution before the scan: causal, depthwise, with its SiLU, in one pass.

`causal_conv_silu` runs a fused kernel where there is one (Triton on CUDA, Numba on the CPU);
`causal_conv_silu_plain` is the same in plain PyTorch, and what the kernels are tested against.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_scan.dispatch import choose_implementation

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
        ValueError: shapes that do not fit each other.
    """
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != (x.shape[2], 1):
        raise ValueError(f"weight must be (channels, 1, w) for x (batch, length, channels), but they are "
                         f"{tuple(weight.shape)} and {tuple(x.shape)}")
    name = choose_implementation(x)
    if name == "portable":
        return causal_conv_silu_plain(x, weight, bias)
    return _forward(x, weight, bias, name)


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
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(dout, x, weight, bias, ctx.implementation)
    return dx, dweight, None if bias is None else dbias, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
