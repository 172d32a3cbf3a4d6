"""memory.py: the batch size that would have fitted."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import torch

import data
import memory
import train_mamba
from errors import UserError, run_script
from mamba_ssm_simple import VisionMamba2
from training import Training

OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError(),
                 RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]


def test_the_advice_fits_into_what_was_free():
    assert memory.advice(4096, 200.0, 22.5, 70 * 2**10) == (
        "out of memory: --batch-size 4096 needs about 90.2 GiB, 70.0 GiB were free; try --batch-size 2048")
    assert memory.advice(64, 10.0, 2.0, 100.0).endswith("100 MiB were free; try --batch-size 32")
    assert memory.advice(3, 0.0, 0.0, 1e6).endswith("try --batch-size 1"), "it did not fit"
    too_large = memory.advice(1, 50.0, 500.0, 100.0)
    assert "--batch-size 1 needs" in too_large and too_large.endswith(
        "lower --d-model or --num-blocks, or raise --patch-size")


def test_a_step_needs_more_for_more_images_and_a_wider_model(monkeypatch, seed):
    each = []
    for width in (16, 64):
        monkeypatch.setattr(sys, "argv", shlex.split("train_mamba.py --dataset digits --device cpu"))
        training = Training(VisionMamba2(d_model=width, num_blocks=2, patch_size=1),
                            data.load("digits", "unused"), train_mamba.parse_arguments(), torch.device("cpu"))
        fixed, an_image = memory.need_mib(training)
        images, labels = (part[:40] for part in training.dataset.train)
        measured = memory.evaluate.peak_mib(lambda: training.update(images, labels), training.device)  # noqa: B023
        assert fixed + 40 * an_image == pytest.approx(measured, rel=0.25)
        each.append(an_image)
    assert each[1] > 2 * each[0] > 0


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_full_memory_is_one_line_with_a_smaller_batch(error, monkeypatch, tmp_path, capfd):
    def fail(*_) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "train_step", fail)
    monkeypatch.setattr(memory, "free_mib", lambda _: 30.0)
    monkeypatch.setattr(sys, "argv", shlex.split("train_mamba.py --dataset digits --device cpu "
                                                 "--batch-size 1000 --d-model 32 --num-blocks 2"))
    with pytest.raises(SystemExit) as ended:
        run_script(train_mamba.main)
    assert ended.value.code == 2
    line = capfd.readouterr().err
    assert re.fullmatch(r"error: out of memory: --batch-size 1000 needs about \S+ [MG]iB, 30 MiB were free; "
                        r"try --batch-size (\d+)\n", line), line


def test_other_errors_pass(monkeypatch):
    with pytest.raises(RuntimeError, match="shapes"), memory.told_when_full(None):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(UserError, match="wrong"), memory.told_when_full(None):
        raise UserError("wrong")
