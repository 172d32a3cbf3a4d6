"""selective_scan: every implementation against the reference in float64: outputs and every gradient."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from selective_scan import (
    available_implementations,
    choose_implementation,
    dispatch,
    run_implementation,
    selective_scan,
)
from tests.commands import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the fixture `device` puts tensors, too
IMPLEMENTATIONS = [name for name in available_implementations(DEVICE) if name != "reference"]
KERNELS = [name for name in IMPLEMENTATIONS if name != "portable"]

# The largest ‖a − b‖ / ‖b‖ of (outputs, gradients) against the reference in float64 on the same inputs.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (1e-2, 2e-2),
}

# (b, l, e, n): lengths about the chunk of 8 and far from it, channels that fill no SIMD register and more
# than one block of 256, batches of one and of more than the 32 slices.
SHAPES = [(2, 1, 300, 16), (2, 2, 37, 5), (2, 7, 37, 64), (3, 8, 3, 16), (1, 9, 300, 5),
          (35, 17, 3, 5), (2, 37, 300, 16), (2, 37, 3, 64), (1, 300, 37, 16), (2, 300, 37, 1),
          (1, 300, 300, 5)]
SMALL = (2, 19, 37, 5)
MANY_TASKS = (33, 50, 300, 5)  # more than one block of channels, slices of two items
if dispatch.INTERPRETED:  # Triton's interpreter would take minutes for the large ones
    SHAPES = [shape for shape in SHAPES if math.prod(shape) <= 40_000]
    MANY_TASKS = (3, 19, 37, 5)
OPTIONAL = ("D", "z", "delta_bias")

pytestmark = pytest.mark.usefixtures("seed")
for_each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)
for_each_kernel = pytest.mark.parametrize("name", KERNELS)
not_interpreted = pytest.mark.skipif(dispatch.INTERPRETED, reason="Triton's interpreter is for one thread")


# ---- Helpers ----------------------------------------------------------------------------------------------


def random_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *,
                  without: tuple[str, ...] = (), **dtypes: torch.dtype) -> dict[str, Tensor]:
    """Arguments of `selective_scan` by name, of `dtype` or of the dtype given by name."""
    b, l, e, n = shape
    inputs = {
        "u": torch.randn(b, l, e),
        "delta": 0.5 * torch.rand(b, l, e),  # positive, so that states stay bounded without softplus, too
        "A": -torch.exp(0.5 * torch.randn(e, n)),
        "B": torch.randn(b, l, n),
        "C": torch.randn(b, l, n),
        "D": torch.randn(e),
        "z": torch.randn(b, l, e),
        "delta_bias": 0.5 * torch.rand(e),
    }
    return {name: tensor.to(DEVICE, dtypes.get(name, dtype))
            for name, tensor in inputs.items() if name not in without}


def random_like(out: Tensor, last_state: Tensor) -> list[Tensor]:
    """Gradients of output and last state, of such values as both the tested and the reference can hold."""
    return [torch.randn(out.shape, device=out.device).to(out.dtype),
            torch.randn(last_state.shape, device=out.device).to(last_state.dtype)]


def run(name: str, inputs: dict[str, Tensor], softplus: bool = True,
        cotangents: list[Tensor | None] | None = None) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Output, last state and every gradient by name; and the gradients of the first two that were used."""
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
    results = run_implementation(name, **leaves, delta_softplus=softplus, return_last_state=True)
    cotangents = random_like(*results) if cotangents is None else cotangents
    used = [(result, cotangent.to(result.dtype))
            for result, cotangent in zip(results, cotangents, strict=True) if cotangent is not None]
    gradients = torch.autograd.grad([result for result, _ in used], list(leaves.values()),
                                    [cotangent for _, cotangent in used], allow_unused=True)
    values = {"output": results[0].detach(), "last state": results[1].detach()}
    for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        values[f"gradient of {key}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return values, cotangents


def assert_agrees(name: str, inputs: dict[str, Tensor], softplus: bool = True,
                  tolerance: torch.dtype | None = None, use: tuple[bool, bool] = (True, True)) -> None:
    """Implementation `name` agrees with the reference in float64 on the same, already rounded, values.

    tolerance: the dtype whose tolerances hold, if not u's. use: whether the loss uses output and last state.
    """
    values, cotangents = run(name, inputs, softplus)
    if use != (True, True):
        cotangents = [cotangent if used else None for cotangent, used in zip(cotangents, use, strict=True)]
        values, _ = run(name, inputs, softplus, cotangents)
    doubles = {key: tensor.double() for key, tensor in inputs.items()}
    exact, _ = run("reference", doubles, softplus, cotangents)
    of_output, of_gradients = TOLERANCES[tolerance or inputs["u"].dtype]
    errors = {what: relative_error(value, exact[what]) for what, value in values.items()}
    limits = {what: of_gradients if what.startswith("gradient") else of_output for what in values}
    wrong = [f"{what}: {error:.2g} > {limits[what]:.2g}" for what, error in errors.items()
             if not error <= limits[what]]
    assert not wrong, f"{name}: relative errors {'; '.join(wrong)}"
    for key, tensor in inputs.items():
        gradient = values[f"gradient of {key}"]
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype), f"{name}: gradient of {key}"
    assert values["output"].dtype == inputs["u"].dtype
    assert values["last state"].dtype == torch.promote_types(inputs["u"].dtype, torch.float32)


def relative_error(a: Tensor, b: Tensor) -> float:
    norm = b.double().norm()
    return ((a.double() - b.double()).norm() / (norm if norm > 0 else 1)).item()


def assert_close(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the order of sums."""
    errors = {what: relative_error(value, expected[what]) for what, value in values.items()}
    wrong = {what: error for what, error in errors.items() if not error <= TOLERANCES[torch.float32][0]}
    assert not wrong, f"relative errors {wrong}"


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor], why: str) -> None:
    different = [what for what in first if not torch.equal(first[what], second[what])]
    assert not different, f"{why}: other bits in {', '.join(different)}"


# ---- Right: against the reference -------------------------------------------------------------------------


@for_each_implementation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(name, shape):
    assert_agrees(name, random_inputs(shape))


@for_each_implementation
def test_one_of_everything(name):
    """(1, 1, 1, 1), positive and with one result used: no sum of two that could cancel."""
    inputs = {key: tensor.abs() for key, tensor in random_inputs((1, 1, 1, 1)).items()}
    assert_agrees(name, inputs, use=(True, False))


OTHER_DTYPES = [(name, dtype) for name in IMPLEMENTATIONS for dtype in (torch.float16, torch.bfloat16)]
OTHER_DTYPES += [(choose_implementation(torch.empty(1, device=DEVICE, dtype=torch.float64)), torch.float64)]


@pytest.mark.parametrize(("name", "dtype"), OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 37, 5), (2, 37, 3, 16), (1, 19, 300, 5)], ids=str)
def test_other_dtypes(name, dtype, shape):
    assert_agrees(name, random_inputs(shape, dtype))


@for_each_implementation
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "no softplus"])
@pytest.mark.parametrize("without", [missing for count in range(4)
                                     for missing in itertools.combinations(OPTIONAL, count)], ids=str)
def test_optional_arguments(name, without, softplus):
    assert_agrees(name, random_inputs(SMALL, without=without), softplus)


@for_each_implementation
@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["output", "last state"])
@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["all arguments", "none optional"])
def test_gradient_through_one_result(name, use, without):
    assert_agrees(name, random_inputs(SMALL, without=without), use=use)


@for_each_implementation
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes_of_a_mixed_precision_mamba(name, low):
    """Activations low, weights float32: what autocast makes."""
    weights = dict.fromkeys(("A", "D", "delta_bias"), torch.float32)
    assert_agrees(name, random_inputs((2, 37, 37, 16), low, **weights))


@for_each_implementation
def test_any_two_dtypes_may_differ(name):
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for turn in range(4):
        names = ("delta", "A", "B", "C", "D", "z", "delta_bias")
        mixed = {key: dtypes[(index + turn) % 4] for index, key in enumerate(names)}
        assert_agrees(name, random_inputs(SMALL, torch.float32, **mixed), tolerance=torch.bfloat16)


@for_each_implementation
def test_last_state_is_left_out_unless_asked_for(name):
    inputs = random_inputs(SMALL)
    out = run_implementation(name, **inputs)
    both = run_implementation(name, **inputs, return_last_state=True)
    assert isinstance(out, Tensor)
    assert torch.equal(out, both[0])
    assert both[1].shape == (2, 37, 5)


@for_each_implementation
def test_large_steps_and_gates(name):
    """Softplus and sigmoid far out on both sides; decays that vanish, and decays of one."""
    inputs = random_inputs(SMALL)
    inputs["delta"] = 60 * torch.randn_like(inputs["delta"])
    inputs["z"] = 60 * torch.randn_like(inputs["z"])
    inputs["A"] = 20 * inputs["A"]
    assert_agrees(name, inputs)


@for_each_implementation
def test_the_ends_of_float32(name):
    """A gate of −1e38 lets nothing through, and a step of 1e20 nothing of the state before."""
    inputs = {key: torch.ones(1, 3, 1) for key in ("u", "delta", "z", "B", "C")} | {"A": -torch.ones(1, 1)}
    shut = {**inputs, "z": torch.tensor([1.0, -1e38, 1.0]).view(1, 3, 1)}
    assert run_implementation(name, **shut)[0, 1, 0] == 0
    inputs["delta"] = torch.tensor([1.0, 1e20, 1.0]).view(1, 3, 1)
    leaf = inputs["A"].requires_grad_()
    gradient, = torch.autograd.grad(run_implementation(name, **inputs)[0, 1].sum(), leaf)
    assert gradient.item() == 0


@for_each_implementation
def test_small_steps_keep_their_digits(name):
    """Softplus of −12 is 6·10⁻⁶: 1 + eˣ rounded to float32 would lose half of its digits."""
    inputs = random_inputs(SMALL)
    inputs["delta"] = -12 - 4 * torch.rand_like(inputs["delta"])
    assert_agrees(name, inputs)


@for_each_implementation
def test_not_a_number_is_passed_on_and_stays_in_its_channel(name):
    inputs = random_inputs(SMALL)
    for key in ("u", "delta"):
        broken = {**inputs, key: inputs[key].clone()}
        broken[key][1, 4, 20] = float("nan")
        isnan = run_implementation(name, **broken, delta_softplus=True).isnan()
        expected = torch.zeros_like(isnan)
        expected[1, 4:, 20] = True
        assert torch.equal(isnan, expected), key


@for_each_implementation
def test_only_some_inputs_need_gradients(name):
    inputs = random_inputs(SMALL)
    values, cotangents = run(name, inputs)
    for key in inputs:
        leaf = inputs[key].clone().requires_grad_()
        results = run_implementation(name, **{**inputs, key: leaf}, delta_softplus=True,
                                     return_last_state=True)
        gradient, = torch.autograd.grad(results, leaf, cotangents)
        assert torch.equal(gradient, values[f"gradient of {key}"]), key


def test_gradcheck(device):
    """The analytic gradients against finite differences, on which the reference has no say."""
    inputs = [tensor.double().requires_grad_() for tensor in random_inputs((2, 10, 3, 2)).values()]
    assert torch.autograd.gradcheck(lambda *args: run_implementation("portable", *args, True, True), inputs)


def test_reference_by_hand(device):
    """One channel, one state: h = ½ h + u, out = 3 h + 10 u."""
    u = torch.tensor([1.0, 2.0, -1.0], device=device).view(1, 3, 1)
    ones = torch.ones(1, 3, 1, device=device)
    A = torch.tensor([[0.5]], device=device).log()
    out, last_state = run_implementation("reference", u, ones, A, ones, 3 * ones, 10 * ones[0, 0],
                                         return_last_state=True)
    assert out.flatten().tolist() == pytest.approx([3 * 1 + 10, 3 * 2.5 + 20, 3 * 0.25 - 10])
    assert last_state.item() == pytest.approx(0.25)


# ---- Memory layouts ---------------------------------------------------------------------------------------


def slices_of_projections(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """u and z as halves of one linear layer's output; delta, B and C as parts of another's."""
    u, z = torch.cat([inputs["u"], inputs["z"]], -1).chunk(2, -1)
    parts = [inputs[key] for key in ("delta", "B", "C")]
    delta, B, C = torch.cat(parts, -1).split([part.shape[-1] for part in parts], -1)
    return {**inputs, "u": u, "z": z, "delta": delta, "B": B, "C": C}


def channel_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """(b, e, l) in memory, and A as (n, e)."""
    return {key: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor
            for key, tensor in inputs.items()}


def time_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() == 3 else tensor
            for key, tensor in inputs.items()}


def every_other(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every second channel, and every second weight, of a tensor that begins elsewhere."""
    return {key: torch.stack([tensor, tensor + 1], -1).flatten(-2)[..., ::2]
            for key, tensor in inputs.items()}


def expanded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One item for the whole batch, one step for the whole length, one number for all channels: stride 0."""
    first = {"u": 0, "delta": 1, "B": 0, "C": 1, "z": 2, "A": 0, "D": 0, "delta_bias": 0}
    return {key: tensor.narrow(first[key], 0, 1).expand_as(tensor) for key, tensor in inputs.items()}


def inner_part(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor inside a larger one with NaN around it: nothing outside may be read."""
    parts = {}
    for key, tensor in inputs.items():
        frame = torch.full([size + 2 for size in tensor.shape], float("nan"), device=tensor.device)
        parts[key] = frame[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    return parts


LAYOUTS = [slices_of_projections, channel_first, time_first, every_other, expanded, inner_part]


@for_each_implementation
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", [SMALL, (3, 1, 37, 5), (1, 19, 300, 1)], ids=str)
def test_layouts(name, layout: Callable, shape):
    """A layout changes no value: it agrees with the reference, and with a contiguous copy of itself."""
    inputs = layout(random_inputs(shape))
    assert any(not tensor.is_contiguous() for tensor in inputs.values()) or 1 in shape
    assert_agrees(name, inputs)
    copies = {key: tensor.contiguous() for key, tensor in inputs.items()}
    values, cotangents = run(name, inputs)
    assert_close(values, run(name, copies, cotangents=cotangents)[0])


@for_each_implementation
def test_layouts_of_the_gradients_that_come_in(name):
    """`out.sum()` gives a gradient of stride 0; a transposed use gives a transposed one."""
    inputs = random_inputs(SMALL)
    _, (dout, dlast_state) = run(name, inputs)
    transposed = [dout.mT.contiguous().mT, dlast_state.mT.contiguous().mT]
    assert_close(run(name, inputs, cotangents=transposed)[0],
                 run(name, inputs, cotangents=[dout, dlast_state])[0])
    of_sum = [dout[:1, :1, :1].expand_as(dout), dlast_state[:1, :1, :1].expand_as(dlast_state)]
    copies = [cotangent.contiguous() for cotangent in of_sum]
    assert_close(run(name, inputs, cotangents=of_sum)[0], run(name, inputs, cotangents=copies)[0])


@for_each_implementation
def test_arguments_are_not_changed(name):
    inputs = slices_of_projections(random_inputs(SMALL))
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    _, cotangents = run(name, inputs)
    cotangents_before = [cotangent.clone() for cotangent in cotangents]
    run(name, inputs, cotangents=cotangents)
    assert_identical(inputs, before, "arguments changed")
    assert all(map(torch.equal, cotangents, cotangents_before))


# ---- The same bits whatever happens around ----------------------------------------------------------------


@for_each_implementation
def test_two_runs_give_the_same_bits(name):
    inputs = random_inputs(MANY_TASKS)
    first, cotangents = run(name, inputs)
    for _ in range(3):
        assert_identical(run(name, inputs, cotangents=cotangents)[0], first, "a second run")


@for_each_kernel
def test_the_number_of_threads_changes_no_bit(name, threads):
    """portable makes no such promise: the libraries under PyTorch's einsum split sums by threads."""
    inputs = random_inputs(MANY_TASKS)
    threads(1)
    expected, cotangents = run(name, inputs)
    for count in (2, 3, 8):
        threads(count)
        assert_identical(run(name, inputs, cotangents=cotangents)[0], expected, f"{count} threads")


@for_each_implementation
def test_pytorchs_default_dtype_and_autocast_change_no_bit(name):
    """A model may be built, and its mixer called, within either."""
    inputs = random_inputs((2, 19, 6, 4))
    expected, cotangents = run(name, inputs)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            got, _ = run(name, inputs, cotangents=cotangents)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_identical(got, expected, f"{dtype} by default")
    if name != "reference":
        with torch.autocast(DEVICE, torch.bfloat16):
            got, _ = run(name, inputs, cotangents=cotangents)
        assert_identical(got, expected, "autocast")


@for_each_implementation
def test_no_grad_and_inference_mode(name):
    inputs = random_inputs(SMALL)
    expected = run_implementation(name, **{key: tensor.requires_grad_() for key, tensor in inputs.items()})
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = run_implementation(name, **inputs)
        assert not out.requires_grad
        assert torch.equal(out, expected)


@not_interpreted
@for_each_implementation
def test_two_python_threads_at_once(name):
    cases = [random_inputs(SMALL), random_inputs(MANY_TASKS)]
    alone = [run(name, inputs) for inputs in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            together = [pool.submit(run, name, inputs, True, cotangents)
                        for inputs, (_, cotangents) in zip(cases, alone, strict=True)]
            for future, (expected, _) in zip(together, alone, strict=True):
                assert_identical(future.result(timeout=60)[0], expected, "beside another thread")


def run_in_child(name: str, inputs: dict[str, Tensor], cotangents: list[Tensor], expected: dict) -> None:
    """Ends the child with status 1 if its bits differ."""
    assert_identical(run(name, inputs, cotangents=cotangents)[0], expected, "in a child process")


@pytest.mark.skipif(not sys.platform.startswith("linux") or DEVICE != "cpu", reason="CUDA does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@not_interpreted
@for_each_kernel
def test_forked_child(name, threads):
    """A data loader's worker is a fork: it inherits the parent's thread pool without its threads.

    Not of portable: PyTorch's own operators hang in a child whose parent has used OpenMP's threads.
    """
    threads(2)
    inputs = random_inputs((4, 19, 37, 5))
    expected, cotangents = run(name, inputs)
    child = multiprocessing.get_context("fork").Process(target=run_in_child,
                                                        args=(name, inputs, cotangents, expected))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
    assert_identical(run(name, inputs, cotangents=cotangents)[0], expected, "in the parent afterwards")


# ---- What PyTorch asks of an operator ---------------------------------------------------------------------


@for_each_implementation
@pytest.mark.parametrize("without", [(), OPTIONAL], ids=["all arguments", "none optional"])
def test_opcheck(name, without):
    inputs = random_inputs(SMALL, without=without)
    arguments = [inputs[key].requires_grad_() if key in inputs else None
                 for key in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    torch.library.opcheck(torch.ops.vision_mamba2.selective_scan, (*arguments, True, True, name))


@for_each_implementation
def test_compiled_equals_eager(name):
    """fullgraph: one graph without a break; aot_eager: traced with gradients, and no compiler needed."""
    torch._dynamo.reset()
    inputs = random_inputs(SMALL)

    def loss(*args: Tensor) -> Tensor:
        out, last_state = run_implementation(name, *args, delta_softplus=True, return_last_state=True)
        return (out**2).sum() + last_state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        value = function(*leaves)
        gradients.append([value, *torch.autograd.grad(value, leaves)])
    eager, traced = (dict(zip(["loss", *inputs], values, strict=True)) for values in gradients)
    assert_close(traced, eager)


@for_each_implementation
def test_states_are_not_kept_for_every_step(name):
    """What autograd keeps is far less than the states (b, l, e, n), of which the reference keeps several."""
    shape = b, l, e, n = (2, 64, 32, 16)

    def bytes_kept(implementation: str) -> int:
        kept = []
        inputs = {key: tensor.requires_grad_() for key, tensor in random_inputs(shape).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            run_implementation(implementation, **inputs)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    states = b * l * e * n * 4
    assert bytes_kept(name) < 0.4 * states
    assert bytes_kept("reference") > 2 * states


@for_each_implementation
def test_a_second_derivative_is_refused(name):
    """Differentiable once: the second time must raise, since a silent zero would be taken for a result."""
    inputs = random_inputs(SMALL)
    u = inputs.pop("u").requires_grad_()
    gradient, = torch.autograd.grad(run_implementation(name, u, **inputs).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad((gradient**2).sum(), u)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch.func itself
def test_forward_mode_derivatives_are_the_references():
    inputs = random_inputs(SMALL)
    u, tangent = inputs.pop("u"), torch.randn_like(inputs["z"])
    got, expected = (torch.func.jvp(lambda u, f=function: f(u, **inputs), (u,), (tangent,))[1]
                     for function in (selective_scan, functools.partial(run_implementation, "reference")))
    assert torch.equal(got, expected) and expected.abs().max() > 0.1


def test_torch_func_takes_the_reference():
    inputs = random_inputs((3, 5, 4, 2))
    u, rest = inputs.pop("u"), {name: tensor.detach() for name, tensor in inputs.items()}

    def loss(u: Tensor, z: Tensor) -> Tensor:
        return selective_scan(u[None], **{name: rest[name][:1] if rest[name].dim() == 3 else rest[name]
                                          for name in rest if name != "z"}, z=z[None]).square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(u.detach(), rest["z"])
    for i in range(3):
        alone = u.detach()[i].requires_grad_()
        loss(alone, rest["z"][i]).backward()
        assert torch.allclose(got[i], alone.grad, rtol=1e-4, atol=1e-6) and alone.grad.abs().max() > 0.1


def test_autocast_does_not_round_the_reference():
    inputs = random_inputs(SMALL)
    expected = run_implementation("reference", **inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(run_implementation("reference", **inputs), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_graph_exported_without_gradients_has_them(name):
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return run_implementation(name, u, delta, A, B, C, delta_softplus=True)

    inputs = tuple(random_inputs((2, 100, 5, 3))[key] for key in ("u", "delta", "A", "B", "C"))
    with torch.no_grad():
        exported = torch.export.export(Scan(), inputs).module()
    results = []
    for module in (Scan(), exported):
        given = [tensor.detach().requires_grad_() for tensor in inputs]
        results.append(torch.autograd.grad(module(*given).square().sum(), given))
    assert all(map(torch.equal, *results))


@pytest.mark.skipif(not dispatch.HAS_NUMBA, reason="Numba is not installed")
def test_a_thread_that_outlives_the_main_one():
    code = """
import threading, time, torch
from selective_scan import run_implementation

torch.set_num_threads(2)
u, A, B = torch.randn(64, 9, 4), -torch.rand(4, 3), torch.randn(64, 9, 3)
def scan(): return run_implementation("numba", u, u, A, B, B, delta_softplus=True).sum().item()
expected = scan()
def late():
    threading.main_thread().join()
    time.sleep(0.2)
    print(scan() == expected)
threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n" and done.returncode == 0, done.stderr


# ---- Choice and errors ------------------------------------------------------------------------------------


def test_choice():
    cpu = torch.empty(1, 1, 1)
    assert choose_implementation(cpu.double()) == "portable"
    fastest = "numba" if dispatch.HAS_NUMBA else "portable"
    assert choose_implementation(cpu) == choose_implementation(cpu.bfloat16()) == fastest
    for device in {"cpu", DEVICE}:
        names = available_implementations(device)
        assert {"portable", "reference"} <= set(names)
        for dtype in TOLERANCES:
            assert choose_implementation(torch.empty(1, 1, 1, device=device, dtype=dtype)) in names


def test_selective_scan_runs_the_implementation_chosen():
    inputs = random_inputs(SMALL)
    chosen = run_implementation(choose_implementation(inputs["u"]), **inputs, delta_softplus=True,
                                return_last_state=True)
    results = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    assert all(map(torch.equal, results, chosen))


@pytest.mark.skipif(not dispatch.HAS_NUMBA, reason="Numba is not installed")
def test_without_numba(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    assert choose_implementation(torch.empty(1, 1, 1)) == "portable"
    assert "numba" not in available_implementations("cpu")


WRONG = [  # argument, what it becomes, exception, what its message says; (b, l, e, n) = (2, 19, 37, 5)
    ("u", lambda u: u[0], ValueError, "u must be (batch, length, channels)"),
    ("u", lambda u: u[:0], ValueError, "u must be (batch, length, channels), none of them 0"),
    ("u", lambda u: u[:, :0], ValueError, "but is (2, 0, 37) torch.float32"),
    ("u", lambda u: u[..., :0], ValueError, "but is (2, 19, 0) torch.float32"),
    ("u", lambda u: u.numpy(force=True), TypeError, "u must be a real floating-point tensor"),
    ("u", lambda u: u.int(), TypeError, "u must be a real floating-point tensor"),
    ("delta", lambda delta: delta[:, 1:], ValueError, "delta must have shape (2, 19, 37), but is (2, 18,"),
    ("delta", lambda delta: delta[..., :1], ValueError, "delta must have shape (2, 19, 37), but is (2, 19,"),
    ("delta", lambda delta: None, TypeError, "delta must be a real floating-point tensor"),
    ("A", lambda A: A[1:], ValueError, "A must be (channels, d_state) = (37, ≥ 1), but is (36, 5)"),
    ("A", lambda A: A[:, :0], ValueError, "A must be (channels, d_state) = (37, ≥ 1), but is (37, 0)"),
    ("A", lambda A: A[:, 0], ValueError, "A must be (channels, d_state) = (37, ≥ 1), but is (37,)"),
    ("A", lambda A: A.to(torch.complex64), TypeError, "A must be a real floating-point tensor"),
    ("A", lambda A: 1.0, TypeError, "A must be a real floating-point tensor"),
    ("B", lambda B: B[..., None], ValueError, "B must have shape (2, 19, 5), but is (2, 19, 5, 1)"),
    ("B", lambda B: B.long(), TypeError, "B must be a real floating-point tensor, but is (2, 19"),
    ("C", lambda C: C.mT, ValueError, "C must have shape (2, 19, 5), but is (2, 5, 19)"),
    ("C", lambda C: C[:1], ValueError, "C must have shape (2, 19, 5), but is (1, 19, 5)"),
    ("D", lambda D: D[1:], ValueError, "D must have shape (37,), but is (36,)"),
    ("D", lambda D: D > 0, TypeError, "D must be a real floating-point tensor, but is (37,) torch.bool"),
    ("z", lambda z: z[:, :1], ValueError, "z must have shape (2, 19, 37), but is (2, 1, 37)"),
    ("z", lambda z: z.to("meta"), ValueError, "z is on meta, but u is on"),
    ("delta_bias", lambda bias: bias[None], ValueError, "delta_bias must have shape (37,), but is (1, 37)"),
    ("delta_bias", lambda bias: 0.5, TypeError, "delta_bias must be a real floating-point tensor"),
]


@pytest.mark.parametrize(("key", "spoil", "error", "message"), WRONG,
                         ids=[f"{key}: {message}" for key, _, _, message in WRONG])
def test_wrong_arguments(key, spoil, error, message):
    inputs = random_inputs(SMALL)
    inputs[key] = spoil(inputs[key])
    with pytest.raises(error) as raised:
        selective_scan(**inputs)
    assert raised.type is error
    assert message in str(raised.value)
