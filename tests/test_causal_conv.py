"""The convolution with SiLU on the CPU, against nn.Conv1d and the plain twin in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from selective_scan import causal_conv_silu, causal_conv_silu_plain

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def results(function, tensors, weights):
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], weights.to(out.dtype))
    return [out.detach(), *gradients]


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_the_plain_one_is_conv1d_cut_to_the_past(taps, with_bias, length, seed):
    conv = torch.nn.Conv1d(6, 6, taps, groups=6, padding=taps - 1, bias=with_bias)
    x = torch.randn(2, length, 6)
    expected = F.silu(conv(x.transpose(1, 2))[..., :length].transpose(1, 2))
    assert torch.allclose(causal_conv_silu_plain(x, conv.weight, conv.bias), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (3, 37, 300, 4), (2, 7, 20, 3), (1, 2, 5, 1), (40, 9, 8, 4),
                                   (2, 3, 5, 9), (2, 70, 20, 32)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_every_gradient(shape, dtype, with_bias, seed):
    b, l, e, taps = shape
    both = torch.randn(b, l, 2 * e).to(dtype)
    for x in (both[..., e:], both[..., :e].contiguous()):  # a slice of in_proj's output, and a copy
        tensors = [x, torch.randn(e, 1, taps).to(dtype), torch.randn(e).to(dtype) if with_bias else None]
        weights = torch.randn(b, l, e).to(dtype)
        right = results(causal_conv_silu_plain, [None if t is None else t.double() for t in tensors], weights)
        for got, expected in zip(results(causal_conv_silu, tensors, weights), right, strict=True):
            assert got.dtype == dtype
            assert (got.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_pytorchs_default_dtype_and_autocast_change_no_bit(seed):
    tensors = [torch.randn(2, 5, 3), torch.randn(3, 1, 4), torch.randn(3)]
    weights = torch.randn(2, 5, 3)
    expected = results(causal_conv_silu, tensors, weights)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = results(causal_conv_silu, tensors, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(causal_conv_silu, tensors, weights), expected))
        assert causal_conv_silu_plain(*tensors).dtype == torch.float32


def test_float64_is_exact(seed):
    tensors = [torch.randn(2, 5, 3), torch.randn(3, 1, 4), torch.randn(3)]
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(causal_conv_silu, leaves)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch.func itself
def test_forward_mode_derivatives_are_those_of_the_plain_one(seed):
    x, weight, bias, dx = torch.randn(2, 5, 3), torch.randn(3, 1, 4), torch.randn(3), torch.randn(2, 5, 3)
    expected, got = (torch.func.jvp(lambda x, f=function: f(x, weight, bias), (x,), (dx,))[1]
                     for function in (causal_conv_silu_plain, causal_conv_silu))
    assert torch.equal(got, expected) and expected.abs().max() > 0.1


def test_a_forward_mode_derivative_of_a_backward_is_refused(seed):
    x = torch.randn(2, 5, 3, requires_grad=True)
    out = causal_conv_silu(x, torch.randn(3, 1, 4), None)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones(2, 5, 3), torch.ones(2, 5, 3)))


@pytest.mark.parametrize(("x", "weight", "bias", "message"), [
    ((2, 5, 3), (4, 1, 4), None, r"weight must be \(channels, 1, w\) = \(3, 1, ≥ 1\)"),
    ((2, 5, 3), (3, 1, 0), None, "weight must be"),
    ((2, 5, 3), (3, 1, 4), (1,), r"bias must have shape \(3,\), but is \(1,\)"),
    ((0, 5, 3), (3, 1, 4), None, "x must be"),
    ((5, 3), (3, 1, 4), None, "x must be"),
])
def test_shapes_that_do_not_fit(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        causal_conv_silu(torch.randn(x), torch.randn(weight), None if bias is None else torch.randn(bias))


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        causal_conv_silu(torch.ones(2, 5, 3, dtype=torch.int64), torch.randn(3, 1, 4), None)
