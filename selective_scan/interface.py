"""`selective_scan_fn` as other people's code knows it, with that code's layouts, on CPU and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from selective_scan import dispatch


def selective_scan_fn(
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
    """A drop-in for `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, for real A.

    Args:
        u, delta, z: (batch, dim, length). Transposed views of channel-last tensors are read without a copy.
        A: (dim, state), real.
        B, C: (dim, state), the same at every step; (batch, state, length); or (batch, groups, state, length),
            each group for dim / groups neighbouring channels.
        D, delta_bias: (dim,). delta_softplus, return_last_state: as in `selective_scan`.

    A constant B or C, which Mamba itself does not use, costs memory for all states of all steps.

    Returns:
        out (batch, dim, length) in u's dtype; with return_last_state also the state (batch, dim, state).

    Raises:
        TypeError: complex A. ValueError: a shape that does not fit.
    """
    if A.is_complex():
        raise TypeError(f"A must be real, but is {A.dtype}; complex A is not supported")
    _check(u, delta, A, B, C, D, z, delta_bias)
    u, delta = u.transpose(1, 2), delta.transpose(1, 2)
    z = None if z is None else z.transpose(1, 2)
    scan = _constant if B.dim() == 2 or C.dim() == 2 else _grouped
    out, last_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out = out.transpose(1, 2)
    return (out, last_state) if return_last_state else out


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Raise ValueError for shapes that do not fit: what is too much would be cut off, a one be repeated."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"u must have 3 dimensions and A 2, but they have shapes {tuple(u.shape)} and "
                         f"{tuple(A.shape)}")
    b, e, l = u.shape
    n = A.shape[1]
    groups = [tensor.shape[1] for tensor in (B, C) if tensor.dim() == 4]
    varying = [(e, n), (b, n, l), *((b, count, n, l) for count in groups if count and e % count == 0)]
    for name, tensor, shapes in (("delta", delta, [(b, e, l)]), ("A", A, [(e, n)]), ("B", B, varying),
                                 ("C", C, varying), ("D", D, [(e,)]), ("z", z, [(b, e, l)]),
                                 ("delta_bias", delta_bias, [(e,)])):
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, but has "
                             f"{tuple(tensor.shape)}")


def _grouped(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> tuple[Tensor, Tensor]:
    """B and C (b, [groups,] n, l): one scan for each group of channels."""
    B, C = ((tensor if tensor.dim() == 4 else tensor[:, None]).transpose(2, 3) for tensor in (B, C))
    groups = max(B.shape[1], C.shape[1])
    if B.shape[1] not in (1, groups) or C.shape[1] not in (1, groups):
        raise ValueError(f"{B.shape[1]} groups of B and {C.shape[1]} of C do not fit {u.shape[2]} channels")
    size = u.shape[2] // groups
    results = []
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        D_, bias = (None if tensor is None else tensor[part] for tensor in (D, delta_bias))
        results.append(dispatch.selective_scan(
            u[..., part], delta[..., part], A[part], B[:, min(group, B.shape[1] - 1)],
            C[:, min(group, C.shape[1] - 1)], D_, None if z is None else z[..., part], bias, delta_softplus,
            return_last_state=True))
    if groups == 1:
        return results[0]
    outs, states = zip(*results, strict=True)
    return torch.cat(outs, dim=2), torch.cat(states, dim=1)


def _constant(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> tuple[Tensor, Tensor]:
    """B or C (e, n): every state as a channel of its own with B = 1, weighted and summed afterwards.

    That is right because the recurrence is linear and diagonal: a constant B only scales its states.
    """
    b, l, e = u.shape
    n = A.shape[1]
    given, u = u.dtype, u.to(torch.promote_types(u.dtype, torch.float32))  # states, as ever, are not of half

    def weights(tensor: Tensor) -> Tensor:
        """What the states (b, l, e, n) are multiplied by."""
        if tensor.dim() == 2:
            return tensor
        tensor = (tensor if tensor.dim() == 4 else tensor[:, None]).permute(0, 3, 1, 2)  # (b, l, groups, n)
        return tensor.repeat_interleave(e // tensor.shape[2], dim=2)

    # A varying B enters with u; a constant one scales the states afterwards.
    inputs = u[..., None] * weights(B) if B.dim() > 2 else u[..., None].expand(b, l, e, n)
    bias = None if delta_bias is None else delta_bias.repeat_interleave(n)
    ones = torch.ones(b, l, 1, dtype=u.dtype, device=u.device)
    states = dispatch.selective_scan(inputs.reshape(b, l, e * n), delta.repeat_interleave(n, dim=2),
                                     A.reshape(e * n, 1), ones, ones, delta_bias=bias,
                                     delta_softplus=delta_softplus).unflatten(2, (e, n))
    if B.dim() == 2:
        states = states * B
    y = (states * weights(C)).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(u.dtype))
    return y.to(given), states[:, -1]
