"""The selective scan in plain PyTorch with a backward of its own: any device, float64 included.

Autograd through a loop over time would keep every state of every step; here the states of CHUNK steps at a
time are recomputed from checkpoints, as the kernels do. Batches are worked through in pieces small enough
for a CPU's cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8                                         # steps between state checkpoints
PIECE = {"cpu": 2**18}                            # elements of one (b, CHUNK, n, e) tensor: 1 MiB in float32
PIECE_ELSEWHERE = 2**24


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
            delta_bias: Tensor | None, delta_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b, l, e) in u's dtype, last state (b, n, e), checkpoints (b, (l−1)/CHUNK, n, e).

    The last two are float64 for float64 inputs, else float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    b, l, e = u.shape
    n = A.shape[1]
    y = u.new_empty(b, l, e, dtype=dtype)
    last_state = u.new_empty(b, n, e, dtype=dtype)
    checkpoints = u.new_empty(b, (l - 1) // CHUNK if save else 0, n, e, dtype=dtype)
    for piece in _pieces(b, n * e, u.device):
        u_, delta_, B_, C_ = (tensor[piece].to(dtype) for tensor in (u, delta, B, C))
        delta_, _ = _step_sizes(delta_, delta_bias, delta_softplus)
        h = u.new_zeros(len(u_), n, e, dtype=dtype)
        for start in range(0, l, CHUNK):
            if save and start > 0:
                checkpoints[piece, start // CHUNK - 1] = h
            now = slice(start, start + CHUNK)
            _, hs = _states(h, u_[:, now], delta_[:, now], A.to(dtype), B_[:, now])
            y[piece, now] = _einsum("blne,bln->ble", hs, C_[:, now])
            h = hs[:, -1]
        last_state[piece] = h
    if D is not None:
        y.addcmul_(D.to(dtype), u.to(dtype))
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(u.dtype), last_state, checkpoints


def backward(dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
             C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
             checkpoints: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, or None where there was no input."""
    dtype = checkpoints.dtype
    b, l, e = u.shape
    n = A.shape[1]
    A = A.to(dtype)
    du, ddelta = (u.new_empty(b, l, e, dtype=dtype) for _ in range(2))
    dB, dC = (u.new_empty(b, l, n, dtype=dtype) for _ in range(2))
    dz = None if z is None else torch.empty_like(du)
    dA = torch.zeros_like(A)
    dD, dbias = (u.new_zeros(e, dtype=dtype) for _ in range(2))
    for piece in _pieces(b, n * e, u.device):
        u_, raw, B_, C_, dy = (tensor[piece].to(dtype) for tensor in (u, delta, B, C, dout))
        delta_, slope = _step_sizes(raw, delta_bias, delta_softplus)
        if z is not None:
            z_, dout_ = z[piece].to(dtype), dy
            gate = torch.sigmoid(z_)
            dy = dout_ * z_ * gate
        g = torch.zeros_like(u_[:, 0, None] * A.T) if dlast_state is None else dlast_state[piece].to(dtype)
        for start in range((l - 1) // CHUNK * CHUNK, -1, -CHUNK):
            now = slice(start, start + CHUNK)
            h = checkpoints[piece, start // CHUNK - 1] if start > 0 else torch.zeros_like(g)
            decay, hs = _states(h, u_[:, now], delta_[:, now], A, B_[:, now])
            if z is not None:
                y = _einsum("blne,bln->ble", hs, C_[:, now])
                if D is not None:
                    y = y + D.to(dtype) * u_[:, now]
                dz[piece, now] = dout_[:, now] * y * gate[:, now] * (1 + z_[:, now] * (1 - gate[:, now]))
            # g_t = ∂loss/∂h_t = C_t ∂y_t + exp(Δ_{t+1} A) g_{t+1}
            gs = _einsum("ble,bln->blne", dy[:, now], C_[:, now])
            for t in range(gs.shape[1] - 1, -1, -1):
                g = gs[:, t].add_(g) * decay[:, t]
            before = torch.cat([h[:, None], hs[:, :-1]], dim=1)
            d_exponent = decay.mul_(before).mul_(gs)
            d_input = _einsum("blne,bln->ble", gs, B_[:, now])
            du[piece, now] = d_input * delta_[:, now]
            ddelta[piece, now] = d_input * u_[:, now] + _einsum("blne,en->ble", d_exponent, A)
            dA += _einsum("blne,ble->en", d_exponent, delta_[:, now])
            dB[piece, now] = _einsum("blne,ble->bln", gs, delta_[:, now] * u_[:, now])
            dC[piece, now] = _einsum("blne,ble->bln", hs, dy[:, now])
        ddelta[piece] *= slope
        dbias += ddelta[piece].sum((0, 1))
        dD += (dy * u_).sum((0, 1))
        if D is not None:
            du[piece].addcmul_(dy, D.to(dtype))
    return du, ddelta, dA, dB, dC, None if D is None else dD, dz, None if delta_bias is None else dbias


def _einsum(equation: str, *tensors: Tensor) -> Tensor:
    """In the tensors' own dtype, where autocast would have it in half precision."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.einsum(equation, *tensors)


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor | float]:
    """Δ and its derivative by what came in."""
    if bias is not None:
        delta = delta + bias.to(delta.dtype)
    return (F.softplus(delta, threshold=40), torch.sigmoid(delta)) if softplus else (delta, 1.0)


def _states(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decays exp(ΔA) and states (b, l, n, e) of a chunk that begins in state h (b, n, e)."""
    decay = torch.exp(delta[:, :, None] * A.T)
    hs = (delta * u)[:, :, None] * B[..., None]
    for t in range(hs.shape[1]):
        h = hs[:, t].addcmul_(decay[:, t], h)
    return decay, hs


def _pieces(batch: int, states: int, device: torch.device) -> list[slice]:
    size = max(1, PIECE.get(device.type, PIECE_ELSEWHERE) // (CHUNK * states))
    return [slice(i, i + size) for i in range(0, batch, size)]
