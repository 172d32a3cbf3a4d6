"""selective_scan_fn against the recurrence written out in mamba_ssm's layouts, float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from selective_scan import selective_scan_fn

b, e, l, n, groups = 2, 6, 19, 4, 3
NAMES = ("out", "state", "u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def written_out(u, delta, A, B, C, D, z, delta_bias):
    def to_channels(tensor):  # (b, e, n, l)
        if tensor.dim() == 2:
            return tensor[None, :, :, None].expand(b, e, n, l)
        tensor = tensor[:, None] if tensor.dim() == 3 else tensor
        return tensor.repeat_interleave(e // tensor.shape[1], dim=1)

    delta = F.softplus(delta + delta_bias[:, None])
    B, C = to_channels(B), to_channels(C)
    h, ys = torch.zeros(b, e, n, dtype=u.dtype, device=u.device), []
    for t in range(l):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    return (torch.stack(ys, -1) + D[:, None] * u) * F.silu(z), h


@pytest.mark.parametrize("dims", list(itertools.product((2, 3, 4), repeat=2)), ids=str)
def test_every_layout_of_b_and_c(dims, device):
    shapes = {2: (e, n), 3: (b, n, l), 4: (b, groups, n, l)}
    tensors = [torch.randn(shape, dtype=torch.float64, device=device)
               for shape in ((b, e, l), (b, e, l), (e, n), shapes[dims[0]], shapes[dims[1]], (e,), (b, e, l),
                             (e,))]
    tensors[2] = -tensors[2].abs()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = written_out(*leaves)
    weights = [torch.randn_like(tensor) for tensor in expected]
    wanted = torch.autograd.grad(expected, leaves, weights)
    narrow = [tensor.float().requires_grad_() for tensor in tensors]
    got = selective_scan_fn(*narrow, delta_softplus=True, return_last_state=True)
    gradients = torch.autograd.grad(got, narrow, [weight.float() for weight in weights])
    for name, value, right in zip(NAMES, (*got, *gradients),
                                  (*expected, *wanted), strict=True):
        error = (value.double() - right).norm() / right.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("varying", [{}, {"C": torch.full((1, 1, 3), 1e-3)}], ids=["constant", "C varies"])
def test_constant_ones_keep_their_states_in_float32(varying, device):
    """u · B is beyond float16, what comes of it is not."""
    u, C = torch.full((1, 1, 3), 300.0), torch.full((1, 1), 1e-3)
    given = {"u": u, "delta": u / 300, "A": -torch.ones(1, 1), "B": u, "C": C, **varying}
    given = {name: tensor.half().to(device) for name, tensor in given.items()}
    out, state = selective_scan_fn(**given, return_last_state=True)
    exact = selective_scan_fn(**{name: tensor.double() for name, tensor in given.items()})
    assert (out.dtype, state.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=0)


def test_a_transposed_view_is_read_without_a_copy(device):
    u = torch.randn(b, l, e, device=device).transpose(1, 2)
    assert selective_scan_fn(u, u, -torch.rand(e, n, device=device), torch.randn(b, n, l, device=device),
                             torch.randn(b, n, l, device=device)).shape == (b, e, l)
    assert u.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"A": torch.randn(e, n, dtype=torch.complex64)}, TypeError, "A must be real"),
    ({"B": torch.randn(b, 4, n, l)}, ValueError, "B must have shape"),
    ({"B": torch.randn(b, 2, n, l), "C": torch.randn(b, 3, n, l)}, ValueError, "2 groups of B and 3 of C"),
    ({"u": torch.randn(b, e)}, ValueError, r"u must have 3 dimensions .* shapes \(2, 6\)"),
    ({"A": -torch.rand(2 * e, n)}, ValueError, r"A must have shape \(6, 4\)"),
    *(({name: torch.randn(shape), **constant}, ValueError, f"{name} must have shape")
      for constant in ({}, {"C": torch.randn(e, n)})
      for name, shape in {"delta": (b, 2 * e, l), "z": (1, e, l), "D": (1,), "delta_bias": (2 * e,),
                          "B": (1, n)}.items()),
])
def test_what_does_not_fit_is_named(change, error, words):
    arguments = {"u": torch.randn(b, e, l), "delta": torch.rand(b, e, l), "A": -torch.rand(e, n),
                 "B": torch.randn(b, n, l), "C": torch.randn(b, n, l), **change}
    with pytest.raises(error, match=words):
        selective_scan_fn(**arguments)
