"""examples/spoken_digits.py: sound as frames, both kinds of token in one sequence, and the whole command."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import run_script
from examples import spoken_digits

DATA_DIR = Path(__file__).parent.parent / "data"


def test_a_tone_is_loudest_in_its_band():
    time = torch.arange(spoken_digits.SAMPLES) / spoken_digits.RATE
    tones = torch.tensor([300.0, 1000.0, 2500.0])
    frames = spoken_digits.log_mel(torch.sin(2 * math.pi * tones[:, None] * time))
    mel = 2595 * torch.log10(1 + tones / 700)
    band = mel / (2595 * math.log10(1 + spoken_digits.RATE / 2 / 700)) * (spoken_digits.MELS + 1) - 1
    assert (frames.mean(1).argmax(1) - band).abs().max() < 1
    torch.testing.assert_close(frames.mean((1, 2)), torch.zeros(3), atol=1e-4, rtol=0)


def test_a_clip_is_placed_whole_and_of_power_one():
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(3000) / 5)
    placed = spoken_digits.place(np.concatenate([np.zeros(500), 7 * speech, np.zeros(900)]), rng)
    loud = np.flatnonzero(placed)
    assert placed.shape == (spoken_digits.SAMPLES,) and 2990 <= np.ptp(loud) + 1 <= 3000
    assert np.mean(placed[loud[0]:loud[-1] + 1] ** 2) == pytest.approx(1, abs=1e-3)


def test_images_go_with_their_labels(seed):
    labels = torch.randint(0, 10, (50,))
    split = spoken_digits.data.Split(labels.to(torch.uint8).reshape(50, 1, 1, 1), labels)
    wanted = labels[torch.randperm(50)[:20]]
    images = spoken_digits.matching(wanted, split, torch.Generator())
    assert torch.equal(images.flatten().long(), wanted)


def test_both_kinds_of_token_reach_the_logits(seed):
    model = spoken_digits.PictureAndSound(d_model=16, num_blocks=1, d_state=2)
    image, sound = torch.rand(2, 1, 28, 28, requires_grad=True), torch.rand(2, 5, 32, requires_grad=True)
    both = model(image, sound)
    both.square().sum().backward()
    assert both.shape == (2, 10)
    assert (image.grad.flatten(1).abs().sum(1) > 0).all() and (sound.grad.abs().sum(2) > 0).all()
    model.eval()
    assert not torch.allclose(model(image, None), model(image, sound))
    assert not torch.allclose(model(None, sound), model(image, sound))


def test_no_voice_is_in_two_parts():
    parts = [set(voices) for voices in spoken_digits.VOICES.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 34


def test_the_pair_beats_either_alone_in_the_results():
    found = json.loads((DATA_DIR.parent / "results" / "spoken-digits.json").read_text())
    runs = {(run["seed"], run["inputs"]): run["test_accuracy"] for run in found["runs"]}
    assert {seed for seed, _ in runs} == {0, 1, 2}
    for seed in range(3):
        assert runs[seed, "both"] > max(runs[seed, "image"], runs[seed, "sound"]) + 0.02


def test_without_espeak_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["spoken_digits.py", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        run_script(spoken_digits.main)
    assert "apt install espeak-ng" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng")
@pytest.mark.skipif(not (DATA_DIR / "MNIST" / "raw").is_dir(), reason="MNIST is not in data/")
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spoken_digits, "ACCENTS", ("en-us",))
    monkeypatch.setattr(spoken_digits, "VOICES", {"train": ("m1",), "val": ("m2",), "test": ("f2",)})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "MNIST").symlink_to(DATA_DIR / "MNIST")
    monkeypatch.setattr(sys, "argv", ["spoken_digits.py", "--seeds", "1", "--steps", "10", "--takes", "1",
                                      "--data-dir", str(tmp_path / "data"),
                                      "--output", str(tmp_path / "spoken-digits.json")])
    run_script(spoken_digits.main)
    found = json.loads((tmp_path / "spoken-digits.json").read_text())
    assert [run["inputs"] for run in found["runs"]] == ["image", "sound", "both"]
    assert found["clips"] == {"train": 10, "val": 10, "test": 10}
    for part in ("val", "test"):
        means = {run["inputs"]: run[f"{part}_accuracy"] for run in found["runs"]}
        assert {inputs: each["mean"] for inputs, each in found[f"{part}_accuracy"].items()} == means
    # The clips are cached, and speech: no two alike, each between silences.
    (cache,) = (tmp_path / "data").glob("*.npz")
    monkeypatch.setattr(spoken_digits, "speak", lambda *_: pytest.fail("spoken again"))
    clips, labels = spoken_digits.spoken_digits(tmp_path / "data", 1)["train"]
    assert cache.is_file() and labels.tolist() == list(range(10)) and len(clips.unique(dim=0)) == 10
    assert ((clips != 0).float().mean(1) > 0.1).all() and ((clips == 0).float().mean(1) > 0.1).all()
