"""The selective scan by its definition: slow, short, differentiable, the oracle of every test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
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
    """`selective_scan` (see the package) by its definition, on any device.

    float64 inputs are computed in float64, all others in float32; the output has u's dtype, the last
    state the dtype of the computation. Gradients come from autograd and are as exact.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    out_dtype = u.dtype
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))

    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta, threshold=40)  # 20, the default, is too early for float64

    # h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t,   y_t = C_t · h_t          (arXiv 2312.00752, eq. 2; for B the
    # first order of eq. 4, as in the official code)
    h = u.new_zeros(u.shape[0], *A.shape)                                # (b, e, n)
    ys = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)                      # (b, e, n)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None]).sum(-1))  # no product of matrices, which autocast would round
    y = torch.stack(ys, dim=1)                                           # (b, l, e)

    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype)
    return (y, h) if return_last_state else y
