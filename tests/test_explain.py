"""explain.py and scan_figures.py: what is recorded is what the scan computed, and nothing is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import explain
import figures
import mamba_ssm_simple
import scan_figures
from baselines import VisionLSTM
from errors import UserError
from mamba_ssm_simple import SCANS, VisionMamba2, pixel_order, to_map
from selective_scan import selective_scan

KINDS = [(scan, both) for scan in SCANS for both in (False, True)]


def model(**changes) -> VisionMamba2:
    return VisionMamba2(**{"d_model": 8, "num_blocks": 3, "d_state": 3, "patch_size": 2, **changes}).eval()


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The arguments of every selective scan that the model runs."""
    seen: list[tuple] = []

    def spy(*arguments, **options):
        seen.append(arguments)
        return selective_scan(*arguments, **options)

    monkeypatch.setattr(mamba_ssm_simple, "selective_scan", spy)
    return seen


@pytest.mark.parametrize(("scan", "bidirectional"), KINDS)
def test_the_contributions_sum_to_the_last_state_that_the_scan_reached(scan, bidirectional, calls, seed):
    images = torch.randn(2, 1, 12, 10)
    scans = explain.record(model(scan=scan, bidirectional=bidirectional), images)
    assert len(scans) == len(calls) == 3 * (1 + bidirectional)
    for found, (u, delta, A, B, C, D, z, bias) in zip(scans, calls, strict=True):
        with torch.no_grad():
            _, last = selective_scan(u, delta, A, B, C, D, z, bias, True, return_last_state=True)
        last = last.unflatten(0, (2, -1))  # (images, sequences, e, n)
        for image in range(2):
            torch.testing.assert_close(found.contributions(image).sum(dim=1), last[image])
            ends = found.states(image)[found.length - 1::found.length]
            torch.testing.assert_close(ends, last[image])
        shares = found.shares().unflatten(1, (-1, found.length))
        assert (shares >= 0).all()
        torch.testing.assert_close(shares.sum(dim=2), torch.ones(shares.shape[:2]))


@pytest.mark.parametrize(("scan", "bidirectional"), KINDS)
def test_maps_stand_where_the_tokens_stand(scan, bidirectional, calls, seed):
    net = model(scan=scan, bidirectional=bidirectional)
    scans = explain.record(net, torch.randn(2, 1, 12, 10))
    for number, (found, (_, delta, *_, bias)) in enumerate(zip(scans, calls, strict=True)):
        block = net.blocks[number // (1 + bidirectional)]
        backward = bidirectional and number % 2 == 1
        delta = torch.nn.functional.softplus(delta + bias).mean(dim=2, keepdim=True)
        delta = delta.flip(1) if backward else delta
        expected = to_map(delta, block.direction, torch.Size((2, 6, 5, 1)))[..., 0]
        torch.testing.assert_close(found.delta_map(), expected.detach())
        assert found.direction == (explain.OPPOSITE[block.direction] if backward else block.direction)
        assert sorted(found.order.tolist()) == list(range(30))
        assert found.length == (5 if scan == "row" else 30)


def test_pixels_in_a_random_order_are_put_back(calls, seed):
    net = model(patch_size=1, scan="raster", permute_seed=3, num_blocks=1)
    found = explain.record(net, torch.randn(1, 1, 4, 5))[0]
    assert torch.equal(found.order, pixel_order(3, 20, torch.device("cpu")))


def test_a_remembered_token_has_a_larger_share():
    """One channel, one state, by hand: h = exp(ΔA) h + ΔBu with A = −1, B = u = 1 and Δ = ln 2."""
    delta = torch.full((1, 3, 1), 2.0).log()
    found = explain.Scan(1, "right", (1, 3), 3, torch.arange(3), torch.ones(1, 3, 1), delta,
                         torch.ones(1, 3, 1), -torch.ones(1, 1))
    torch.testing.assert_close(found.contributions(0).flatten(), torch.tensor([0.25, 0.5, 1]) * np.log(2))
    torch.testing.assert_close(found.shares()[0], torch.tensor([1, 2, 4]) / 7)


def hooks(net: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def test_hooks_are_removed_even_after_an_error(seed):
    net = model().train()
    explain.record(net, torch.randn(1, 1, 8, 8))
    assert hooks(net) == 0 and net.training
    net.stem.eval()  # frozen, and to stay so
    with pytest.raises(RuntimeError):
        explain.record(net, torch.randn(1, 7, 8, 8))
    assert hooks(net) == 0 and net.training and net.head.training and not net.stem.training


def test_a_model_without_a_scan_is_refused_in_one_line():
    net = VisionLSTM(d_model=8, num_blocks=1)
    assert not explain.has_scan(net) and explain.has_scan(model())
    with pytest.raises(UserError, match="no scan in a VisionLSTM"):
        explain.record(net, torch.zeros(1, 1, 28, 28))


def test_one_of_each_class():
    labels = torch.tensor([4, 4, 0, 2, 0, 2])
    assert explain.one_of_each_class(labels).tolist() == [2, 3, 0]
    assert explain.one_of_each_class(torch.arange(50)).tolist() == list(range(10))


@pytest.mark.parametrize(("scan", "bidirectional", "channels"), [("row", True, 1), ("cross", False, 3)])
def test_pictures_and_animation_can_be_written(scan, bidirectional, channels, tmp_path, seed):
    images = torch.randint(0, 256, (4, channels, 8, 8), dtype=torch.uint8)
    net = model(scan=scan, bidirectional=bidirectional, in_channels=channels)
    scans = explain.record(net, images / 255)
    drawn = explain.draw(images, scans)
    assert set(drawn) == {"delta.png", "memory.png", "memory_reach.png"}
    for name, figure in drawn.items():
        assert isinstance(figure.canvas, FigureCanvasAgg)
        figures.save(figure, tmp_path / name)
    words = [axes.get_title() for axes in drawn["delta.png"].axes]
    assert [scan.name for scan in scans] == [word for word in words if word]
    frames = explain.animate(images, scans, 1)
    scan_figures.save_animation(frames, tmp_path / "new" / "state.gif")
    with Image.open(tmp_path / "new" / "state.gif") as film:
        assert film.n_frames == 16 and film.size == frames[0].size


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 32), (24, 16), (48, 8)])
def test_pictures_and_maps_keep_the_shape_of_the_images(height, width, seed):
    images = torch.zeros(2, 1, height, width, dtype=torch.uint8)
    figure = explain.draw(images, explain.record(model(), images.float()))["delta.png"]
    tiles = [picture.get_window_extent() for axes in figure.axes for picture in axes.images]
    assert len(tiles) == 2 * 4
    assert all(tile.width / tile.height == pytest.approx(width / height) for tile in tiles)
    assert not any(a.overlaps(b) for number, a in enumerate(tiles) for b in tiles[:number])


def test_the_line_of_each_row_begins_with_its_first_token():
    x, y = scan_figures._broken(np.array([5, 6, 7, 8, 9]), 2)
    np.testing.assert_array_equal(x, [1, 2, np.nan, 3, 4, np.nan, 5])
    np.testing.assert_array_equal(y, [5, 6, np.nan, 7, 8, np.nan, 9])
    assert scan_figures._broken(np.array([5, 6]), 2)[1].tolist() == [5, 6]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 49])
def test_tokens_are_counted_in_whole_numbers(tokens):
    axes = scan_figures.memory_reach([np.full((2, tokens), 1 / tokens)], ["block 1 →"]).axes[0]
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_many_blocks_and_long_sequences_are_thinned_out(seed):
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    scans = explain.record(model(num_blocks=13, patch_size=2), images.float())
    figure = explain.draw(images, scans)["delta.png"]
    assert sum(bool(axes.get_title()) for axes in figure.axes) == scan_figures.MOST_SCANS
    assert "12 of 13 scans" in "".join(text.get_text() for text in figure.texts)
    assert len(explain.animate(images, scans[:1], 0)) == 48


def test_the_heat_grows_lighter_in_grey_print():
    grey = scan_figures.HEAT(np.linspace(0, 1, 64))[:, :3] @ (0.299, 0.587, 0.114)
    assert (np.diff(grey) > 0).all()
