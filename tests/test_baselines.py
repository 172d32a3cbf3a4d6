"""baselines.py: the same size and interface as VisionMamba2, at any resolution, and able to learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import evaluate
from baselines import ARCHITECTURES, count_on_meta, matched_config, positions, usual_heads
from mamba_ssm_simple import VisionMamba2
from training import parameter_groups

BASELINES = ("lstm", "transformer")


def build(architecture: str, **config) -> torch.nn.Module:
    return ARCHITECTURES[architecture](**matched_config(architecture, config))


@pytest.mark.parametrize("architecture", BASELINES)
@pytest.mark.parametrize("config", [{}, {"d_model": 48}, {"num_blocks": 8, "patch_size": 2}, {"d_state": 64},
                                    {"bidirectional": True}, {"in_channels": 3, "d_model": 192},
                                    {"position_conv": True}], ids=str)
def test_as_many_parameters_as_mamba_within_five_percent(architecture, config):
    ours = count_on_meta(lambda: VisionMamba2(**config))
    assert abs(count_on_meta(lambda: build(architecture, **config)) - ours) <= 0.05 * ours


@pytest.mark.parametrize("architecture", BASELINES)
def test_any_resolution_and_a_gradient_for_every_parameter(architecture, seed):
    model = build(architecture, num_classes=7, d_model=20, num_blocks=2, in_channels=3, patch_size=2,
                  drop_path=0.5)
    for shape in ((2, 3, 12, 8), (2, 3, 5, 30)):
        logits = model(torch.randn(shape))
        assert logits.shape == (2, 7)
    model.eval()
    images = torch.randn(3, 3, 9, 9, requires_grad=True)
    model(images).logsumexp(1).sum().backward()
    assert (images.grad.abs().amax((0, 1)) > 0).all(), "every pixel counts"
    assert all((parameter.grad != 0).any() for parameter in model.parameters())
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_positions_tell_every_token_apart_and_agree_between_resolutions():
    small, large = (positions(*size, 30, torch.device("cpu")) for size in ((5, 7), (9, 11)))
    assert small.shape == (5, 7, 30)
    assert torch.equal(large[:5, :7], small)
    distances = torch.cdist(large.flatten(0, 1), large.flatten(0, 1))
    assert (distances + torch.eye(99) > 0.1).all()


def test_a_transformer_without_positions_would_not_see_order(seed):
    model = build("transformer", d_model=16, num_blocks=1, patch_size=1).eval()
    images = torch.rand(1, 1, 4, 4)
    assert not torch.allclose(model(images), model(images.flip(3)), atol=1e-4)


@pytest.mark.parametrize("architecture", ["mamba", "lstm"])
def test_positions_are_added_where_they_are_asked_for(architecture, seed):
    config = {"d_model": 16, "num_blocks": 1, "patch_size": 1, "position_embedding": True}
    model = build(architecture, **config).eval()
    without = ARCHITECTURES[architecture](**matched_config(architecture, config)
                                          | {"position_embedding": False}).eval()
    without.load_state_dict(model.state_dict())
    images = torch.rand(1, 1, 3, 4)
    assert not torch.allclose(model(images), without(images), atol=1e-4)
    assert "position_embedding" not in matched_config("transformer", config)


def test_heads_divide_the_width():
    assert [usual_heads(width) for width in (16, 64, 128, 130, 192, 131)] == [1, 1, 2, 2, 3, 1]
    with pytest.raises(ValueError, match="3 heads do not divide 16"):
        ARCHITECTURES["transformer"](d_model=16, num_heads=3)


@pytest.mark.parametrize("architecture", BASELINES)
def test_a_checkpoint_gives_the_model_back(architecture, tmp_path, seed):
    config = matched_config(architecture, {"d_model": 16, "num_blocks": 2, "patch_size": 4})
    model = ARCHITECTURES[architecture](**config).eval()
    checkpoint.save(tmp_path / "a.pt", {
        "architecture": architecture, "config": config, "model": model.state_dict(), "dataset": {},
        "epoch": 1, "metrics": {}, "settings": {}})
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(evaluate.rebuild(checkpoint.load(tmp_path / "a.pt"), "cpu")(images),
                               model(images))


@pytest.mark.parametrize("architecture", BASELINES)
def test_learns_which_half_is_bright(architecture, seed):
    model = build(architecture, num_classes=2, d_model=16, num_blocks=2, patch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.randint(2, (64,))
    images = 0.1 * torch.rand(64, 1, 8, 8)
    images[labels == 1, :, :4] += 1
    images[labels == 0, :, 4:] += 1
    for _ in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_may_be_of_any_dtype(architecture, dtype, seed):
    model, images = build(architecture, d_model=16, num_blocks=2).eval(), torch.randn(3, 1, 8, 8)
    expected = model(images)
    logits = model.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    assert torch.allclose(logits.float(), expected, atol=1e-5 if dtype is torch.float64 else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_lstm_computes_in_the_precision_that_was_asked_for(dtype, device, seed):
    """PyTorch alone would take float16 for either on CUDA; there float32 takes bfloat16's place."""
    model, seen = build("lstm", d_model=16, num_blocks=2).to(device), []
    model.lstm.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0].dtype,
                                                                             outputs[0].dtype)))
    with torch.autocast(device.type, dtype):
        model(torch.randn(4, 1, 8, 8, device=device)).float().logsumexp(1).sum().backward()
    expected = torch.float32 if device.type == "cuda" and dtype is torch.bfloat16 else dtype
    assert seen == [(expected, expected)]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
