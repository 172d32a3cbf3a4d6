"""The CUDA kernels against the float64 reference: on a GPU, or on the CPU in Triton's interpreter.

The interpreter is switched on before Triton is imported, so a machine without a GPU runs this file once more,
and what of test_finite.py concerns Triton, in processes of their own (`test_in_tritons_interpreter`).
"""

import copy
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from mamba_ssm_simple import MambaBlock, SelectiveScan, drop_path
from selective_scan import (
    available_implementations,
    causal_conv_silu,
    causal_conv_silu_plain,
    mixer,
    norm_mean_plain,
    run_implementation,
)

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3)}
NAMES = ("out", "last_state", "u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SHAPES = [(2, 1, 3, 1), (1, 2, 5, 3), (2, 7, 37, 16), (1, 19, 11, 64), (1, 131, 3, 5)]  # the last in segments
if torch.cuda.is_available():  # too much for the interpreter
    SHAPES += [(1, 37, 20, 64), (3, 28, 300, 16), (3, 196, 300, 16), (2, 300, 100, 16), (2, 2049, 100, 16),
               (1, 16384, 40, 16)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in TOLERANCE
         if torch.cuda.is_available() or dtype is torch.float32 or shape == SHAPES[2]]

runs_here = pytest.mark.skipif("triton" not in available_implementations("cuda" if torch.cuda.is_available()
                                                                         else "cpu"),
                               reason="no GPU, and Triton's interpreter is off")


@pytest.mark.skipif(torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
                    reason="the kernels run in this process")
def test_in_tritons_interpreter():
    triton = pytest.importorskip("triton")
    if (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
            and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)):
        pytest.skip("Triton's interpreter before 3.7 counts by what NumPy 2.4 took away")
    finite = str(Path(__file__).with_name("test_finite.py"))
    of_one = "causal_conv or block or optional"
    halves = ["-k", of_one], ["-k", f"test_finite and triton or test_cuda and not ({of_one})", finite]

    def run(which: list[str]) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *which]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
                              text=True, timeout=1000)

    with ThreadPoolExecutor(2) as pool:  # the interpreter is for one core
        for done in pool.map(run, halves):
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
            assert " passed" in done.stdout


def make(shape, dtype, device):
    b, l, e, n = shape

    def randn(*size):
        return torch.randn(size, dtype=torch.float64, device=device).to(dtype)

    A = -16 * torch.rand(e, n, device=device)
    D, bias = randn(e).float(), randn(e).float() - 2
    return [randn(b, l, e), randn(b, l, e), A, randn(b, l, n), randn(b, l, n), D, randn(b, l, e), bias]


def results(name, tensors, weights, softplus=True):
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    out, state = run_implementation(name, *leaves, delta_softplus=softplus, return_last_state=True)
    inputs = [leaf for leaf in leaves if leaf is not None]
    weights = [weight.to(tensor.dtype) for weight, tensor in zip(weights, (out, state), strict=True)]
    gradients = iter(torch.autograd.grad([out, state], inputs, weights))
    return [out.detach(), state.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def assert_close(got, right, dtype):
    for index, (name, a, b) in enumerate(zip(NAMES, got, right, strict=True)):
        if a is None:
            continue
        # (Where there is one step alone, the gradient of A is zero: no state comes before it.)
        error = ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        limit = TOLERANCE[dtype][index > 1]
        assert error < limit, f"{name}: relative error {error:.1e}, allowed {limit:.0e}"


@runs_here
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_output_and_every_gradient(shape, dtype, seed, device):
    tensors = make(shape, dtype, device)
    b, l, e, n = shape
    weights = torch.randn(b, l, e, device=device).to(dtype), torch.randn(b, e, n, device=device)
    right = results("reference" if l < 1000 else "portable", [tensor.double() for tensor in tensors], weights)
    got = results("triton", tensors, weights)
    assert_close(got, right, dtype)
    if torch.cuda.is_available():  # the interpreter does one thing after the other
        again = results("triton", tensors, weights)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"


@runs_here
def test_sequences_that_share_a_program(seed, device):
    from selective_scan import cuda

    tensors = make((7, 9, 20, 4), torch.float32, device)
    weights = torch.randn(7, 9, 20, device=device), torch.randn(7, 20, 4, device=device)
    right = results("reference", [tensor.double() for tensor in tensors], weights)
    with mock.patch.object(cuda, "RESIDENT", 2):  # as if there were room for two: one takes four, one three
        assert cuda._plan(7, 9, 20, 4, cuda.CHUNK, backward=True).items == 4
        assert_close(results("triton", tensors, weights), right, torch.float32)


@runs_here
def test_more_segments_than_are_carried_at_once(seed, device):
    from selective_scan import cuda

    shape = 1, 141, 20, 4  # eighteen segments
    tensors = make(shape, torch.float32, device)
    weights = torch.randn(1, 141, 20, device=device), torch.randn(1, 20, 4, device=device)
    right = results("reference", [tensor.double() for tensor in tensors], weights)
    plan = cuda._plan
    with mock.patch.object(cuda, "_plan", lambda *given, **kind: plan(*given, **kind)._replace(segment=8)):
        assert_close(results("triton", tensors, weights), right, torch.float32)


@runs_here
def test_eight_states_of_a_long_sequence(seed, device):
    """Two lanes for the states of a channel where time is cut into enough segments; else four."""
    from selective_scan import cuda

    shape = 1, 21, 70, 8
    assert [cuda._plan(*given, cuda.CHUNK, backward=True).lanes_n
            for given in ((64, 784, 256, 8), (64, 196, 128, 8), shape)] == [2, 4, 4]
    tensors = make(shape, torch.float32, device)
    weights = torch.randn(1, 21, 70, device=device), torch.randn(1, 70, 8, device=device)
    right = results("reference", [tensor.double() for tensor in tensors], weights)
    plan = cuda._plan

    def two_lanes(*given, backward):
        return plan(*given, backward=backward)._replace(**({"lanes_n": 2} if backward else {}))

    with mock.patch.object(cuda, "_plan", two_lanes):
        assert_close(results("triton", tensors, weights), right, torch.float32)


@runs_here
@pytest.mark.parametrize(("absent", "softplus"), [((), False), ((5,), True), ((6,), False), ((7,), True),
                                                  ((5, 6, 7), False)], ids=str)
def test_optional_arguments(absent, softplus, seed, device):
    tensors = make((1, 11, 20, 4), torch.float32, device)
    tensors = [None if i in absent else tensor for i, tensor in enumerate(tensors)]
    if not softplus:
        tensors[1], tensors[7] = (None if i in absent else tensors[i].abs() for i in (1, 7))
    weights = torch.randn(1, 11, 20, device=device), torch.randn(1, 20, 4, device=device)
    wide = [None if tensor is None else tensor.double() for tensor in tensors]
    assert_close(results("triton", tensors, weights, softplus), results("reference", wide, weights, softplus),
                 torch.float32)


@runs_here
def test_slices_of_a_projection_are_read_where_they_lie(seed, device):
    u, delta, A, B, C, D, z, bias = make((2, 11, 24, 4), torch.float32, device)
    weights = torch.randn(2, 11, 24, device=device), torch.randn(2, 24, 4, device=device)
    plain = results("triton", [u, delta, A, B, C, D, z, bias], weights)
    both, projected = torch.cat([u, z], dim=2), torch.cat([torch.randn_like(B[..., :3]), B, C], dim=2)
    sliced = [both[..., :24], delta, A, projected[..., 3:7], projected[..., 7:], D, both[..., 24:], bias]
    assert all(torch.equal(a, b) for a, b in zip(results("triton", sliced, weights), plain, strict=True))


@runs_here
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 19, 20, 4), (1, 5, 200, 4), (2, 7, 20, 3), (1, 2, 5, 1),
                                   (1, 3, 5, 9), (1, 35, 20, 19), (2, 17, 130, 8)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_causal_conv(shape, with_bias, dtype, seed, device):
    b, l, e, taps = shape
    x = torch.randn(b, l, 2 * e, device=device).to(dtype)[..., e:]
    tensors = [x, torch.randn(e, 1, taps, device=device)]
    if with_bias:
        tensors.append(torch.randn(e, device=device))
    weights = torch.randn(b, l, e, device=device).to(dtype)

    def run(function, tensors, weights):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves, *[None] * (not with_bias))
        return [out.detach(), *torch.autograd.grad(out, leaves, weights)]

    right = run(causal_conv_silu_plain, [tensor.double() for tensor in tensors], weights.double())
    got = run(lambda *given: torch.ops.vision_mamba2.causal_conv_silu(*given, "triton"), tensors, weights)
    for index, (a, expected) in enumerate(zip(got, right, strict=True)):
        assert (a.double() - expected).norm() < TOLERANCE[dtype][index > 0] * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too much for the interpreter")
def test_more_sequences_than_an_axis_of_programs_has(seed):
    tensors = make((70_000, 2, 3, 1), torch.float32, "cuda")
    weights = torch.randn(70_000, 2, 3, device="cuda"), torch.randn(70_000, 3, 1, device="cuda")
    wide = [tensor.double() for tensor in tensors]
    assert_close(results("triton", tensors, weights), results("reference", wide, weights), torch.float32)
    for taps in (4, 9):
        x, weight = torch.randn(70_000, 2, 3, device="cuda"), torch.randn(3, 1, taps, device="cuda")
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        precise = [leaf.detach().double().requires_grad_() for leaf in leaves]  # and no TF32 in it
        got, right = (torch.autograd.grad(function(*given, None).square().sum(), given)
                      for function, given in ((causal_conv_silu, leaves), (causal_conv_silu_plain, precise)))
        for a, expected in zip(got, right, strict=True):
            assert (a - expected).norm() < 1e-5 * expected.norm()


def output_and_gradients(module, x, dy, function):
    """Of `function(x)`, what `module` computes: the output, and the gradients of x and of its parameters."""
    x = x.detach().requires_grad_()
    out = function(x)
    gradients = torch.autograd.grad(out, [x, *module.parameters()], dy.to(out.dtype))
    return dict(zip(("out", "x", *dict(module.named_parameters())), (out, *gradients), strict=True))


def assert_equal_modules(given, dy, module, one_operator):
    """Output and gradients of the operator are those of the module line by line in float64.

    In bfloat16 products follow each other, and there are few tokens over which their roundings average out;
    so the operator may be as far off as three times what the module is, line by line under autocast. Triton's
    interpreter cuts bfloat16 off where a GPU rounds it, which averages out nowhere.
    """
    wide = copy.deepcopy(module).double()
    right = output_and_gradients(wide, given.double(), dy.double(), wide)
    got = output_and_gradients(module, given, dy, one_operator)
    plain = {}
    if given.dtype == torch.bfloat16:
        with (mock.patch.object(SelectiveScan, "fuses", lambda *_: False),
              torch.autocast(given.device.type, torch.bfloat16)):
            plain = output_and_gradients(module, given, dy, module)
    for name, expected in right.items():
        error, limit = distance(got[name], expected), 1e-5
        if plain:
            least = 2e-2 if given.is_cuda else 1e-1
            limit = max(least, 3 * distance(plain[name], expected))
        assert error < limit, f"{name}: relative error {error:.1e}, allowed {limit:.0e}"


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@runs_here
@pytest.mark.parametrize(("shape", "dtype"), [
    ((1, 19, 20, 4), torch.float32), ((2, 5, 24, 16), torch.float32), ((2, 5, 24, 16), torch.bfloat16)],
    ids=str)
def test_the_mixer_in_one_is_the_mixer_line_by_line(shape, dtype, seed, device):
    b, l, d, n = shape
    module = SelectiveScan(d, n).to(device)
    given, dy = torch.randn(2, b, l, d, device=device).to(dtype).unbind()
    assert_equal_modules(given, dy, module, lambda x: mixer(x, module.weights()))


@runs_here
@pytest.mark.parametrize(("scan", "index", "taps", "dtype"), [
    ("row", 0, 4, torch.float32), ("row", 0, 4, torch.bfloat16),
    *(("cross", index, 4, torch.float32) for index in range(4)), ("cross", 3, 4, torch.bfloat16),
    ("alternate", 1, 9, torch.float32), ("alternate", 0, 9, torch.bfloat16)], ids=str)
def test_the_block_in_one_is_the_block_line_by_line(scan, index, taps, dtype, seed, device):
    module = MambaBlock(20, scan, index, d_state=4, d_conv=taps).to(device)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    given, dy = torch.randn(2, 2, 2, 3, 20, device=device).to(dtype).unbind()
    assert_equal_modules(given, dy, module, module.fused)


@runs_here
@pytest.mark.parametrize(("shape", "dtype"), [
    ((1, 1, 1), torch.float32), ((2, 37, 20), torch.float32), ((3, 300, 33), torch.float16),
    ((2, 41, 1100), torch.bfloat16)], ids=str)
def test_norm_and_mean_in_one(shape, dtype, seed, device, monkeypatch):
    from selective_scan import block_cuda

    monkeypatch.setattr(block_cuda, "PROGRAMS", 4)  # a program then has several tiles, the last a part
    x, weight, bias = (torch.randn(*size, device=device) for size in (shape, shape[2:], shape[2:]))
    x, dy = x.to(dtype), torch.randn(shape[0], shape[2], device=device)

    def run(function, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dy.to(out.dtype))

    right = run(lambda *given: norm_mean_plain(*given, 1e-5), x.double(), weight.double(), bias.double())
    got = run(lambda x, weight, bias: torch.addcmul(bias, torch.ops.vision_mamba2.norm_mean(x, 1e-5), weight),
              x, weight, bias)
    for a, expected in zip(got, right, strict=True):
        limit = 1e-5 if a.dtype == torch.float32 else 1e-2
        assert (a.double() - expected).norm() <= limit * expected.norm() + 1e-6


@runs_here
def test_many_rows_are_summed_in_parts(seed, device):
    from selective_scan.sums_cuda import sum_rows

    for rows in (1, 513, 1024, 1025):
        x = torch.randn(rows, 37, device=device)
        right = x.double().sum(0).float()
        for split in (1, 16, 37):
            first, others = sum_rows(x, split)
            torch.testing.assert_close(first, right[:split], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(others, right[split:], rtol=1e-5, atol=1e-4)


@runs_here
def test_matrices_are_cast_and_found_again(seed, device):
    from selective_scan import weights_cuda

    for rank, more in ((3, 5), (8, 0), (9, 7)):
        shapes = (40, 70), (rank + 8, 35), (35, rank), (9, 35)
        given = [torch.randn(*shape, device=device) for shape in shapes]
        right = [*given]
        right[1] = torch.cat([given[1][:rank], given[1].new_zeros(more, 35), given[1][rank:]])
        right[2] = torch.cat([given[2], given[2].new_zeros(35, more)], dim=1)
        found = weights_cuda.views(weights_cuda.cast(given, torch.float16), given)
        assert all(torch.equal(a, b.half()) for a, b in zip(found, right, strict=True))
        assert all(torch.equal(a, b) for a, b in
                   zip(weights_cuda.without_filling(*right[1:3], rank), given[1:3], strict=True))


@runs_here
@pytest.mark.parametrize("scan", ["row", "cross"])
def test_a_dropped_path_leaves_an_image_as_it_was(scan, seed, device):
    module = MambaBlock(20, scan, 1, d_state=4, drop_path=0.5).to(device)
    x = torch.randn(3, 1, 2, 20, device=device)
    whole = module.eval().fused(x.requires_grad_()) - x

    def kept_by(number: int) -> torch.Tensor:
        torch.manual_seed(number)
        return drop_path(torch.ones(3, device=device), 0.5, training=True) > 0

    torch.manual_seed(next(number for number in itertools.count(seed) if 0 < kept_by(number).sum() < 3))
    y = module.train().fused(x) - x
    kept = y.flatten(1).abs().amax(1) > 0
    assert 0 < kept.sum() < 3
    torch.testing.assert_close(y[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_position_conv_comes_before_the_block_in_one(seed):
    module = MambaBlock(20, "cross", 1, d_state=4, position_conv=True).cuda()
    plain = copy.deepcopy(module).cpu().double()
    x = torch.randn(2, 3, 5, 20, device="cuda", requires_grad=True)
    x_plain = x.detach().cpu().double().requires_grad_()
    got, right = ((y, *torch.autograd.grad(y.square().sum(), [given, block.position_conv.weight]))
                  for block, given in ((module, x), (plain, x_plain)) for y in [block(given)])
    for a, b in zip(got, right, strict=True):
        assert (a.cpu().double() - b).norm() <= 1e-2 * b.norm()  # TF32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compile_export_and_graph_capture(seed):
    from mamba_ssm_simple import VisionMamba2

    model = VisionMamba2(d_model=32, num_blocks=2).cuda().eval()
    images = torch.randn(4, 1, 28, 28, device="cuda")
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4)
    compiled.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(images).sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()(images)
        torch.testing.assert_close(exported, expected, rtol=1e-3, atol=1e-4)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(images)
        images.copy_(torch.randn_like(images))
        graph.replay()
        torch.testing.assert_close(captured, model(images), rtol=1e-3, atol=1e-4)
