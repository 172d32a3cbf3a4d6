"""Numbers stay finite: no NaN and no infinity in any output or gradient, on every implementation of the scan.

Hypothesis chooses shapes and sizes of values, far up and far down, but so that the exact result fits float32.
--full tries many more. test_cuda.py runs what concerns Triton once more in its interpreter.
"""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import augment
import data
from baselines import ARCHITECTURES
from mamba_ssm_simple import SCANS, VisionMamba2
from selective_scan import available_implementations, dispatch, run_implementation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = available_implementations(DEVICE)
LONG = [name for name in IMPLEMENTATIONS if name != "reference" and not dispatch.INTERPRETED]
FULL = "--full" in sys.argv
EXAMPLES = 3 if dispatch.INTERPRETED else 400 if FULL else 40
for_each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def assert_finite(name: str, shape: tuple[int, int, int, int], seed: int, step: float, spread: float,
                  decay: float, size: float, dtype: torch.dtype = torch.float32,
                  softplus: bool = True) -> None:
    """Output, last state and every gradient of inputs of these sizes.

    step, spread: Δ before softplus is about step ± spread; without softplus its absolute value is Δ.
    decay: A is about −decay. size: of u, B, C and z.
    """
    torch.manual_seed(seed)
    b, l, e, n = shape
    delta = step + spread * torch.randn(b, l, e)
    inputs = {"u": size * torch.randn(b, l, e), "delta": delta if softplus else delta.abs(),
              "A": -decay * (0.1 + torch.rand(e, n)), "B": size * torch.randn(b, l, n),
              "C": size * torch.randn(b, l, n), "D": torch.randn(e), "z": size * torch.randn(b, l, e),
              "delta_bias": torch.randn(e) if softplus else torch.zeros(e)}
    leaves = {key: tensor.to(DEVICE, torch.float32 if key in ("A", "D", "delta_bias") else dtype)
              for key, tensor in inputs.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, state = run_implementation(name, **leaves, delta_softplus=softplus, return_last_state=True)
    gradients = torch.autograd.grad((out, state), list(leaves.values()),
                                    (torch.randn_like(out), torch.randn_like(state)))
    results = {"output": out, "last state": state,
               **{f"gradient of {key}": value for key, value in zip(leaves, gradients, strict=True)}}
    wrong = [what for what, value in results.items() if not value.isfinite().all()]
    assert not wrong, f"{name}: not finite: {', '.join(wrong)}"


lengths = st.integers(1, 5 if dispatch.INTERPRETED else 70)
shapes = st.tuples(st.integers(1, 3), lengths, st.integers(1, 6), st.sampled_from([1, 2, 5, 16, 64]))
signs = st.sampled_from([-1.0, 1.0])


@for_each_implementation
@settings(max_examples=EXAMPLES)
@given(shape=shapes, seed=st.integers(0, 2**32 - 1), sign=signs, step=st.floats(-3, 4),
       spread=st.floats(-3, 3), decay=st.floats(-6, 4), size=st.floats(-12, 3), softplus=st.booleans())
@example((1, 1, 1, 1), 0, 1.0, 4.0, 3.0, 4.0, 3.0, True)
@example((1, 1, 1, 64), 0, -1.0, 4.0, -3.0, -6.0, -12.0, True)
def test_any_shape_and_size(name, shape, seed, sign, step, spread, decay, size, softplus):
    """The sizes as powers of ten."""
    assert_finite(name, shape, seed, sign * 10**step, 10**spread, 10**decay, 10**size, softplus=softplus)


@for_each_implementation
@settings(max_examples=EXAMPLES // 2 + 1)
@given(shape=shapes, seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.bfloat16, torch.float16]),
       step=st.floats(-100, 8), decay=st.floats(-6, 4))
def test_half_precision(name, shape, seed, dtype, step, decay):
    """Values of about 1, as a normalised network has them, and Δ far down and up to what float16 can hold."""
    assert_finite(name, shape, seed, step, 1.0, 10**decay, 0.5, dtype)


@for_each_implementation
@pytest.mark.parametrize("value", [-1e4, -104.0, -88.0, 0.0, 20.0, 40.0, 88.8, 1e4])
def test_steps_where_exponentials_end(name, value):
    """Where e^x leaves float32's range, and where softplus is cut over to x elsewhere."""
    assert_finite(name, (1, 3, 2, 2), 0, value, 0.0, 1.0, 1.0)


FORGETS = {"nothing": -12.0, "all": 3.0}


@pytest.mark.parametrize(("name", "forgets", "n"), [
    # portable takes a second for 15,000 steps
    pytest.param(name, forgets, n, marks=() if name != "portable" or (forgets, n) == ("nothing", 64)
                 else pytest.mark.full)
    for name in LONG for forgets in FORGETS for n in (1, 64)])
def test_a_sequence_of_100_000(name, forgets, n):
    assert_finite(name, (1, 100_000, 1, n), 0, FORGETS[forgets], 1.0, 1.0, 1.0)


@pytest.mark.full
def test_the_reference_on_a_sequence_of_100_000():
    assert_finite("reference", (1, 100_000, 1, 1), 0, -4.0, 1.0, 1.0, 1.0)


# ---- The model


def assert_model_is_finite(model: torch.nn.Module, images: Tensor) -> None:
    """Logits, loss and gradients in training, and logits in evaluation afterwards."""
    logits = model.train()(images)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(images)) % 10).backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.eval()(images).isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value", [0, 1, 255])
def test_constant_images(architecture, value, seed):
    mnist = data.DATASETS["mnist"]
    images = torch.full((4, 1, 28, 28), value, dtype=torch.uint8)
    images = augment.random_affine(images, torch.Generator().manual_seed(seed))
    model = ARCHITECTURES[architecture](d_model=16, num_blocks=2)
    assert_model_is_finite(model, augment.normalize(images, mnist.mean, mnist.std))
    assert_model_is_finite(model, augment.normalize(images * 0 + value / 255, mnist.mean, mnist.std))


@settings(max_examples=60 if FULL else 12)
@given(batch=st.integers(1, 3), channels=st.integers(1, 4), height=st.integers(5, 12),
       width=st.integers(5, 12), d_model=st.sampled_from([4, 8, 24]), d_state=st.sampled_from([1, 2, 64]),
       size=st.floats(-9, 6), scan=st.sampled_from(sorted(SCANS)), both=st.booleans(),
       low=st.booleans())
def test_images_of_any_shape(batch, channels, height, width, d_model, d_state, size, scan, both, low):
    torch.manual_seed(0)
    model = VisionMamba2(d_model=d_model, num_blocks=2, in_channels=channels, patch_size=2, scan=scan,
                         d_state=d_state, bidirectional=both)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert_model_is_finite(model, 10**size * torch.randn(batch, channels, height, width))
