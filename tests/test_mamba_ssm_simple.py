"""mamba_ssm_simple: the official mixer's weights and results, orders of pixels, who sees whom, any size."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import mamba_ssm_simple
import self_check
from baselines import ARCHITECTURES, VisionTransformer
from mamba_ssm_simple import (
    SCANS,
    MambaBlock,
    SelectiveScan,
    VisionMamba2,
    drop_tokens,
    to_map,
    to_sequence,
)
from selective_scan import available_implementations, run_implementation
from tests.commands import patched

pytestmark = pytest.mark.usefixtures("seed")


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def sees(block, height: int, width: int, at: tuple[int, int]) -> Tensor:
    """Which pixels of a map (height, width) the output at pixel `at` depends on, by its gradient."""
    x = torch.randn(1, height, width, 8, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad((block(x)[0, at[0], at[1]] * torch.randn(8)).sum(), x)
    return gradient[0].abs().sum(-1) > 0


def visit_order(height: int, width: int, direction: str) -> list[tuple[int, int]]:
    """Pixels in the order of `direction`, written without tensors."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return {"right": rows, "left": rows[::-1], "down": columns, "up": columns[::-1]}[direction]


# ---- SelectiveScan: the official mixer ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7}, {"conv_bias": False, "bias": True}], ids=str)
def test_parameters_are_the_official_ones(options):
    """Names and shapes of `Mamba` in state-spaces/mamba, mamba_simple.py."""
    d = 40
    e, n = options.get("expand", 2) * d, options.get("d_state", 16)
    r, w = options.get("dt_rank", 3), options.get("d_conv", 4)
    official = {"A_log": (e, n), "D": (e,), "in_proj.weight": (2 * e, d), "conv1d.weight": (e, 1, w),
                "x_proj.weight": (r + 2 * n, e), "dt_proj.weight": (e, r), "dt_proj.bias": (e,),
                "out_proj.weight": (d, e)}
    if options.get("conv_bias", True):
        official["conv1d.bias"] = (e,)
    if options.get("bias", False):
        official |= {"in_proj.bias": (2 * e,), "out_proj.bias": (d,)}
    mixer = SelectiveScan(d, **options)
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == official
    assert {name for name, _ in mixer.named_parameters()} == set(official)


@pytest.mark.parametrize("options", [{}, {"d_state": 5, "d_conv": 3, "bias": True}], ids=str)
def test_state_dicts_go_to_mambapy_and_back(options):
    mambapy = pytest.importorskip("mambapy.mamba", reason="pip install mambapy")
    theirs = mambapy.MambaBlock(mambapy.MambaConfig(d_model=24, n_layers=1, **options))
    ours = SelectiveScan(24, **options)
    x = torch.randn(3, 21, 24)
    before = ours(x)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    assert relative_error(ours(x), before) > 1e-2  # the weights did change

    ours = SelectiveScan(24, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    for module in (ours, theirs):
        module(x).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, theirs.get_parameter(name).grad) < 1e-4, name


def test_initialisation():
    mixer = SelectiveScan(512, d_state=7, bidirectional=True)
    for direction in (mixer, mixer.backward_direction):
        dt = F.softplus(direction.dt_proj.bias.double())
        assert dt.min() >= 0.001 * 0.999
        assert dt.max() <= 0.1 * 1.001
        assert 0.007 < dt.median() < 0.014  # log-uniform: the middle is √(0.001 · 0.1)
        assert direction.dt_proj.weight.abs().max() <= direction.dt_proj.in_features**-0.5
        assert torch.allclose(direction.A_log.exp(), torch.arange(1.0, 8.0).expand(1024, 7))
        assert torch.equal(direction.D, torch.ones(1024))
    assert not torch.equal(mixer.dt_proj.bias, mixer.backward_direction.dt_proj.bias)


def test_step_sizes_stay_above_the_floor():
    mixer = SelectiveScan(64, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-4)
    assert torch.allclose(F.softplus(mixer.dt_proj.bias.double()), torch.tensor(1e-4).double(), rtol=1e-2)


def test_a_token_changes_nothing_before_it():
    mixer = SelectiveScan(24)
    x = torch.randn(2, 30, 24)
    changed = x.clone()
    changed[:, 11] += 1
    before, after = mixer(x), mixer(changed)
    assert torch.allclose(before[:, :11], after[:, :11], atol=1e-6)
    assert (before[:, 11:] - after[:, 11:]).abs().amax(dim=(0, 2)).min() > 0


def test_a_part_of_a_sequence_gives_a_part_of_the_result():
    mixer = SelectiveScan(24)
    x = torch.randn(2, 30, 24)
    for length in (1, 2, 7, 29):
        assert torch.allclose(mixer(x[:, :length]), mixer(x)[:, :length], atol=1e-6)


def test_bidirectional_is_the_average_of_both_directions():
    mixer = SelectiveScan(24, bidirectional=True)
    x = torch.randn(2, 13, 24)
    forwards, backwards = SelectiveScan(24), SelectiveScan(24)
    shared = {name: tensor for name, tensor in mixer.state_dict().items() if "_direction" not in name}
    reverse = {name.removeprefix("backward_direction."): tensor for name, tensor in mixer.state_dict().items()
               if "_direction" in name}
    forwards.load_state_dict(shared)
    backwards.load_state_dict(shared | reverse)
    average = (forwards(x) + backwards(x.flip(1)).flip(1)) / 2
    assert torch.allclose(mixer(x), average, atol=1e-6)


# ---- Maps and sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
@pytest.mark.parametrize("direction", SCANS["cross"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 4), (7, 7)], ids=str)
def test_to_map_is_the_inverse_of_to_sequence(size, direction, rows):
    x = torch.randn(2, *size, 3)
    sequence = to_sequence(x, direction, rows)
    columns = direction in ("down", "up")
    along, across = size if columns else size[::-1]
    assert sequence.shape == ((2 * across, along, 3) if rows else (2, along * across, 3))
    assert torch.equal(to_map(sequence, direction, x.shape), x)


@pytest.mark.parametrize(("direction", "order"), [
    ("right", [0, 1, 2, 3, 4, 5]), ("down", [0, 3, 1, 4, 2, 5]),
    ("left", [5, 4, 3, 2, 1, 0]), ("up", [5, 2, 4, 1, 3, 0])])
def test_the_order_of_pixels(direction, order):
    """Of the map 0 1 2
                  3 4 5"""
    pixels = torch.arange(6).view(1, 2, 3, 1)
    assert to_sequence(pixels, direction).flatten().tolist() == order


@pytest.mark.parametrize(("direction", "order"), [
    ("right", [[0, 1, 2], [3, 4, 5]]), ("down", [[0, 3], [1, 4], [2, 5]]),
    ("left", [[2, 1, 0], [5, 4, 3]]), ("up", [[3, 0], [4, 1], [5, 2]])])
def test_the_order_of_pixels_by_rows(direction, order):
    pixels = torch.arange(6).view(1, 2, 3, 1)
    assert to_sequence(pixels, direction, rows=True).squeeze(-1).tolist() == order


# ---- MambaBlock: who sees whom -----------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(6))
def test_a_cross_block_sees_what_comes_before_in_its_direction(index):
    block = MambaBlock(8, "cross", index).double()
    order = visit_order(3, 4, SCANS["cross"][index % 4])
    for place, pixel in enumerate(order):
        expected = torch.zeros(3, 4, dtype=torch.bool)
        for before in order[:place + 1]:
            expected[before] = True
        assert torch.equal(sees(block, 3, 4, pixel), expected), pixel


def test_a_row_is_its_own_sequence():
    block = MambaBlock(8, "row", index=1).double()
    seen = sees(block, 3, 4, (1, 2))
    assert seen.nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]


def test_raster_sees_every_pixel_before():
    for index in range(4):
        seen = sees(MambaBlock(8, "raster", index).double(), 3, 4, (1, 2))
        assert seen.flatten().tolist() == 7 * [True] + 5 * [False]


def test_alternate_blocks_see_what_comes_before_and_what_comes_after():
    before, after = (sees(MambaBlock(8, "alternate", index).double(), 3, 4, (1, 2)).flatten().tolist()
                     for index in (2, 3))
    assert before == 7 * [True] + 5 * [False]
    assert after == 6 * [False] + 6 * [True]


def test_bidirectional_sees_the_future():
    assert sees(MambaBlock(8, "raster", bidirectional=True).double(), 3, 4, (1, 2)).all()
    seen = sees(MambaBlock(8, "row", bidirectional=True).double(), 3, 4, (1, 2))
    assert seen.nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]


def test_four_cross_blocks_see_the_whole_image():
    blocks = torch.nn.Sequential(*(MambaBlock(8, "cross", index) for index in range(4))).double()
    for pixel in visit_order(3, 5, "right"):
        assert sees(blocks, 3, 5, pixel).all(), pixel


def test_rows_together_are_the_rows_alone():
    block = MambaBlock(8, "row")
    x = torch.randn(2, 3, 5, 8)
    alone = torch.cat([block(x[:, i:i + 1]) for i in range(3)], dim=1)
    assert torch.allclose(block(x), alone, atol=1e-6)


# ---- VisionMamba2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (28, 28), (33, 64)], ids=str)
def test_any_image_size(size, patch_size, scan):
    model = VisionMamba2(num_classes=7, d_model=8, num_blocks=2, in_channels=3, patch_size=patch_size,
                         scan=scan).eval()
    images = torch.randn(2, 3, *size)
    height, width = (math.ceil(side / patch_size) for side in size)
    assert model.stem(images).shape == (2, 8, height, width)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert torch.allclose(logits[:1], model(images[:1]), atol=1e-5)  # an image does not see its neighbour


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_deeper_stem_makes_the_same_grid_of_tokens(patch_size, architecture):
    sizes = {"d_model": 8, "num_blocks": 1, "patch_size": patch_size}
    models = [ARCHITECTURES[architecture](**sizes, stem_depth=depth).eval() for depth in (1, 3)]
    images = torch.rand(2, 1, 13, 20)
    grid = math.ceil(13 / patch_size), math.ceil(20 / patch_size)
    assert all(model.stem(images).shape == (2, 8, *grid) for model in models)
    assert models[1](images).shape == (2, 10)
    convolutions = [[layer.stride for layer in model.stem if isinstance(layer, nn.Conv2d)]
                    for model in models]
    halvings = patch_size.bit_length() - 1
    if halvings:
        assert convolutions == [[(2, 2)] * halvings, [(1, 1), (1, 1), (2, 2)] * halvings]


def test_positions_tell_a_token_where_it_stands(seed):
    """Without them, and row by row, the mean token cannot tell in which row a pixel is."""
    shares = {}
    for added in (False, True):
        torch.manual_seed(seed)
        model = VisionMamba2(d_model=16, num_blocks=2, patch_size=1, scan="row",
                             position_embedding=added).eval()
        one, other = torch.zeros(2, 1, 1, 5, 6).unbind()
        one[..., 1, 3], other[..., 4, 3] = 5, 5  # the same pixel of another row
        shares[added] = (model(one) - model(other)).abs().max().item()
    assert shares[False] < 1e-5 < 1e-4 < shares[True]


def test_a_position_conv_shows_a_token_its_neighbours():
    """Row by row a token sees what is left of it in its row; with the convolution one step around those."""
    seen = {added: sees(MambaBlock(8, "row", position_conv=added).double(), 5, 6, (2, 3))
            for added in (False, True)}
    assert not seen[False][[0, 1, 3, 4]].any() and not seen[False][2, 4:].any()
    assert seen[True][1:4, :5].all()
    assert not seen[True][[0, 4]].any() and not seen[True][:, 5].any()

    model = VisionMamba2(d_model=8, num_blocks=2, patch_size=1, position_conv=True)
    plain = VisionMamba2(d_model=8, num_blocks=2, patch_size=1)
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.rand(2, 1, 3, 4)
    assert not torch.allclose(model(images), plain(images))
    with torch.no_grad():
        for block in model.blocks:
            block.position_conv.weight.zero_()
            block.position_conv.bias.zero_()
    torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropped_tokens_are_zero_in_training_alone(architecture, seed):
    x = torch.rand(20, 5, 7, 8) + 1
    dropped = drop_tokens(x.bfloat16(), 0.25, training=True)
    assert dropped.dtype == torch.bfloat16
    kept = (dropped != 0).float().mean(dim=3)
    assert set(kept.unique().tolist()) == {0, 1}
    torch.testing.assert_close(dropped.float(), kept[..., None] * x / 0.75, rtol=0.02, atol=0)
    assert abs(kept.mean() - 0.75) < 0.1
    assert len(kept.flatten(1).unique(dim=0)) == 20, "each image's own tokens"
    assert torch.equal(drop_tokens(x, 0.25, training=False), x)

    config = {"num_classes": 3, "d_model": 8, "num_blocks": 1, "patch_size": 1}
    model = ARCHITECTURES[architecture](**config, drop_tokens=0.5)
    images = torch.rand(2, 1, 5, 6)
    assert not torch.equal(model(images), model(images))
    model.eval()
    without = ARCHITECTURES[architecture](**config).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(images), without(images))


LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


@pytest.mark.parametrize("name", LAYERS)
def test_what_hangs_on_a_layer_counts(name, monkeypatch):
    block, x = MambaBlock(16), torch.randn(2, 3, 4, 16)
    monkeypatch.setattr(mamba_ssm_simple, "saves_memory", lambda x: True)  # as in training on CUDA
    assert block.fuses(x) and block.mixer.fuses(x)
    layer = getattr(block.mixer, name)
    handle = layer.register_forward_hook(lambda _, __, out: out * 0)
    assert not block.fuses(x) and not block.mixer.fuses(x)
    handle.remove()
    assert block.fuses(x)
    monkeypatch.undo()

    whole = block(x)
    prune.random_unstructured(layer, "weight", 0.5)
    pruned, kept = block(x), layer.weight.detach().clone()
    for _ in range(2):  # the mask is applied anew before each forward
        block(x).sum().backward()
    assert layer.weight_orig.grad.abs().sum() > 0
    prune.remove(layer, "weight")
    assert torch.equal(layer.weight, kept) and not torch.allclose(pruned, whole)
    assert torch.allclose(block(x), pruned, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "layer"), [
    ("norm", nn.LayerNorm(16, elementwise_affine=False)), ("norm", nn.LayerNorm(16, bias=False)),
    ("norm", nn.RMSNorm(16)), ("mixer", nn.Identity()), ("mixer.out_proj", nn.Linear(32, 16)),
    ("mixer.x_proj", nn.Linear(32, 17))], ids=str)
def test_a_layer_put_in_the_place_of_another_is_called(name, layer, monkeypatch):
    block, x = MambaBlock(16), torch.randn(2, 3, 4, 16)
    monkeypatch.setattr(mamba_ssm_simple, "saves_memory", lambda x: True)
    block.set_submodule(name, layer)
    assert not block.fuses(x)


def test_float64_parameters_are_computed_in_float64():
    module = SelectiveScan(4, d_state=3).double()
    nn.init.ones_(module.dt_proj.bias)
    names, values = zip(*module.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)),
        (torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True),
         *(value.detach().clone().requires_grad_() for value in values)))


def test_expand_need_not_be_whole():
    module = SelectiveScan(10, expand=1.25)
    assert module.D.shape == (12,) and module(torch.randn(1, 3, 10)).shape == (1, 3, 10)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("scan", SCANS)
def test_every_parameter_gets_a_gradient(scan, bidirectional, device):
    model = VisionMamba2(d_model=16, num_blocks=4, scan=scan, bidirectional=bidirectional).to(device)
    images, labels = torch.randn(4, 1, 28, 28, device=device), torch.arange(4, device=device)
    F.cross_entropy(model(images), labels).backward()
    idle = [name for name, parameter in model.named_parameters()
            if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.norm() == 0]
    assert not idle


def test_half_precision_activations(device):
    """Under autocast the scan's inputs are bfloat16, its states float32."""
    model = VisionMamba2(d_model=16, num_blocks=2).to(device).eval()
    images = torch.randn(4, 1, 28, 28, device=device)
    exact = model(images)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(images)
        F.cross_entropy(logits, torch.arange(4, device=device)).backward()
    assert relative_error(logits.float(), exact) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_step_of_training_lowers_the_loss(device):
    model = VisionMamba2(d_model=16, num_blocks=2).to(device)
    images, labels = torch.randn(8, 1, 12, 12, device=device), torch.arange(8, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("model", [VisionMamba2, VisionTransformer])
def test_gradient_checkpointing_changes_nothing_but_memory(model, seed):
    model, images = model(d_model=8, num_blocks=3), torch.rand(2, 1, 12, 20)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_state_dict_round_trip(tmp_path):
    options = {"num_classes": 5, "d_model": 16, "num_blocks": 3, "in_channels": 3, "bidirectional": True}
    model = VisionMamba2(**options)
    images = torch.randn(2, 3, 9, 11)
    model(images)  # moves the running means of BatchNorm
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = VisionMamba2(**options)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_the_default_model():
    model = VisionMamba2()
    assert [block.direction for block in model.blocks] == ["right", "down", "left", "up"]
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("patch_size", [0, -4, 3, 6, 12])
def test_a_patch_size_that_is_no_power_of_two(patch_size):
    with pytest.raises(ValueError, match=f"patch_size must be a power of two, but is {patch_size}"):
        VisionMamba2(patch_size=patch_size)


@pytest.mark.parametrize("scan", ["diagonal", "", "Row", None])
def test_an_unknown_scan(scan):
    with pytest.raises(ValueError, match="scan must be one of row, raster, alternate, cross, but is"):
        MambaBlock(8, scan)
    with pytest.raises(ValueError, match="scan must be one of row, raster, alternate, cross, but is"):
        VisionMamba2(scan=scan)


# ---- python mamba_ssm_simple.py ----------------------------------------------------------------------------


def test_self_check_names_every_implementation(tmp_path):
    script = patched(tmp_path, "import self_check; self_check.REPEATS = 1", "mamba_ssm_simple.py")
    result = subprocess.run([sys.executable, script], cwd=tmp_path, timeout=300,
                            capture_output=True, text=True, encoding="utf-8",
                            env={**os.environ, "PYTHONIOENCODING": "utf-8"}, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    for name in available_implementations("cpu"):
        assert name in result.stdout
    *stages, whole = [int(line.split()[-1].replace(",", "")) for line in result.stdout.splitlines()
                      if line.startswith(("stem", "blocks.", "norm", "head", "all "))]
    assert sum(stages) == whole == sum(parameter.numel() for parameter in VisionMamba2().parameters())


def test_self_check_fails_where_an_implementation_is_wrong(monkeypatch, capsys):
    def wrong(name: str, *args, **kwargs) -> Tensor:
        return run_implementation(name, *args, **kwargs) * (1.001 if name == "portable" else 1)

    monkeypatch.setattr(self_check, "run_implementation", wrong)
    monkeypatch.setattr(self_check, "REPEATS", 1)
    assert self_check.main() == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_equals_the_parallel_pass_token_by_token(dtype):
    mixer = SelectiveScan(24).to(dtype)
    x = torch.randn(3, 37, 24, dtype=dtype)
    state, tokens = None, []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        tokens.append(y)
    torch.testing.assert_close(torch.stack(tokens, dim=1), mixer(x), rtol=1e-5, atol=1e-6)
    assert state[0].shape == (3, 3, 48) and state[1].shape == (3, 48, 16)


def test_step_of_a_bidirectional_mixer_is_an_error():
    with pytest.raises(ValueError, match="one direction"):
        SelectiveScan(8, bidirectional=True).step(torch.randn(1, 8))
