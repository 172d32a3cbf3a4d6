"""`selective_scan`, its checks, and the one place that chooses an implementation."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from selective_scan.reference import selective_scan_reference

HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the CUDA kernels on CPU tensors, slowly: for tests on machines without a GPU.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

MODULES = {"triton": "selective_scan.cuda", "numba": "selective_scan.cpu",
           "portable": "selective_scan.portable"}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan (S6) of arXiv 2312.00752, Algorithm 2, channel-last, with the gate fused in.

        Δ_t = softplus(delta_t + delta_bias)        (each part only where asked for)
        h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t      h_{−1} = 0     (eq. 2a; ZOH for A, Euler for B)
        y_t = C_t · h_t + D u_t                                    (eq. 2b)
        out_t = y_t · silu(z_t)

    Args:
        u: input, (batch, length, channels).
        delta: step sizes before bias and softplus, (batch, length, channels).
        A: continuous-time decay, real, (channels, d_state); negative for a stable recurrence.
        B: input projection of each step, (batch, length, d_state).
        C: output projection of each step, (batch, length, d_state).
        D: skip connection, (channels,), or None.
        z: gate, (batch, length, channels), or None.
        delta_bias: (channels,), or None.
        delta_softplus: whether softplus is taken of delta (+ bias).
        return_last_state: whether h after the last step is returned, too.

    Every tensor may be float16, bfloat16, float32 or float64, and any two may differ. States and sums are
    float32 (float64 if u is float64). The channels of a token must be adjacent in memory to be read without
    a copy; tokens and batch items may lie anywhere.

    Returns:
        out (batch, length, channels) in u's dtype; with return_last_state also the last state
        (batch, channels, d_state) in float32 or float64. Both are differentiable once; in forward mode and
        within torch.func's transforms (jvp, grad, vmap) by the reference, which is slow.

    Raises:
        ValueError: a shape that does not fit, an empty dimension, or tensors on different devices.
        TypeError: an argument that is not a real floating-point tensor.
    """
    name = choose_implementation(u) if isinstance(u, Tensor) else "none"  # _check raises before it is used
    return run_implementation(name, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def choose_implementation(u: Tensor) -> str:
    """The fastest implementation for u's device and dtype: the one place where this is decided."""
    if in_forward_mode() or in_transform():  # of which operators know nothing: no derivative, or 0
        return "reference"
    if u.dtype != torch.float64:  # the kernels compute in float32
        if u.device.type == "cuda" and HAS_TRITON:
            return "triton"
        if u.device.type == "cpu" and HAS_NUMBA:
            return "numba"
    return "portable"


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives may be asked for, as within torch.func.jvp."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether this runs within torch.func.grad, vmap and the like; torch.compile sees to them itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def refuse_forward_mode() -> None:
    """Raise where an operator's backward would be differentiated in forward mode, and give nothing."""
    if in_forward_mode():
        raise RuntimeError("the scan's backward has no forward-mode derivative; make the graph within the "
                           "dual level, too, where the reference is used")


def available_implementations(device: torch.device | str) -> list[str]:
    """Names that `run_implementation` accepts for tensors on `device`, fastest first."""
    kind = torch.device(device).type
    return [name for name, there in (("triton", HAS_TRITON and (kind == "cuda" or INTERPRETED)),
                                     ("numba", HAS_NUMBA and kind == "cpu"),
                                     ("portable", True), ("reference", True)) if there]


def run_implementation(
    name: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` by the implementation named: for tests and benchmarks."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    if name == "reference":
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                        return_last_state)
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    out, last_state, _ = _forward(*tensors, delta_softplus, save, name)
    return (out, last_state.transpose(1, 2)) if return_last_state else out


# ---- The operator, registered so that torch.compile and torch.export see one opaque node. -----------------


@torch.library.custom_op("vision_mamba2::selective_scan", mutates_args=())
def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
             delta_bias: Tensor | None, delta_softplus: bool, save: bool,
             implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(u):  # where Triton launches its kernels
        return _module(implementation).forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save)


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save, implementation):
    b, l, e = u.shape
    n = A.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    checkpoints = (l - 1) // _module(implementation).CHUNK if save else 0
    return (u.new_empty(b, l, e), u.new_empty(b, n, e, dtype=dtype),
            u.new_empty(b, checkpoints, n, e, dtype=dtype))


@torch.library.custom_op("vision_mamba2::selective_scan_backward", mutates_args=())
def _backward(dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
              C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
              checkpoints: Tensor, implementation: str) -> list[Tensor]:
    """The gradients of the inputs that are not None, in their order, dtypes and shapes."""
    gradients = _module(implementation).backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias,
                                                 delta_softplus, checkpoints)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return [gradient.to(tensor.dtype).contiguous()
            for gradient, tensor in zip(gradients, inputs, strict=True) if tensor is not None]


@_backward.register_fake
def _(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, checkpoints, implementation):
    return [tensor.new_empty(tensor.shape) for tensor in (u, delta, A, B, C, D, z, delta_bias)
            if tensor is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.saved, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlast_state, _):
    refuse_forward_mode()
    *tensors, checkpoints = ctx.saved_tensors
    if not ctx.saved:  # as in a graph exported where nothing asked for a gradient
        checkpoints = _forward(*tensors, ctx.delta_softplus, True, ctx.implementation)[2]
    if dout is None:  # only the last state was used
        dout = torch.zeros_like(tensors[0])
    gradients = iter(_backward(dout, dlast_state, *tensors, ctx.delta_softplus, checkpoints,
                               ctx.implementation))
    return *(None if tensor is None else next(gradients) for tensor in tensors), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _module(implementation: str):
    """The implementation's module, imported where first used: Numba takes half a second."""
    return importlib.import_module(MODULES[implementation])


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Raise for what does not fit, by shapes, dtypes and devices alone: no look at values, no device wait."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    optional = ("D", "z", "delta_bias")
    given = {name: tensor for name, tensor in given.items() if tensor is not None or name not in optional}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, but is {_describe(tensor)}")
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u must be (batch, length, channels), none of them 0, but is {_describe(u)}")
    if A.dim() != 2 or A.shape[0] != u.shape[2] or A.shape[1] == 0:
        raise ValueError(f"A must be (channels, d_state) = ({u.shape[2]}, ≥ 1), but is {_describe(A)}")
    b, l, e = u.shape
    n = A.shape[1]
    expected = {"u": (b, l, e), "delta": (b, l, e), "A": (e, n), "B": (b, l, n), "C": (b, l, n), "D": (e,),
                "z": (b, l, e), "delta_bias": (e,)}
    for name, tensor in given.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]}, but is {_describe(tensor)}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, but u is on {u.device}; move one of them")


def _describe(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(type(value).__name__)
