"""run_log.py: which epochs get pictures."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
from mamba_ssm_simple import VisionMamba2
from run_log import Ration, RunLog


@pytest.fixture
def clock():
    """A clock that stands still until someone adds to `clock.now`."""
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    return Clock()


def drawn_epochs(clock, epochs: int, training: float, drawing: float) -> list[int]:
    """The epochs drawn of a run whose epochs and drawings take so many seconds."""
    ration, drawn = Ration(0.1, clock), []
    for epoch in range(1, epochs + 1):
        clock.now += training
        if ration.due(last=epoch == epochs):
            with ration.spending():
                clock.now += drawing
            drawn.append(epoch)
    return drawn


def test_slow_pictures_come_first_and_last_and_in_a_tenth_of_the_time(clock):
    assert drawn_epochs(clock, epochs=20, training=2.5, drawing=2.5) == [1, 19, 20]
    middle = drawn_epochs(clock, epochs=200, training=1.0, drawing=4.0)[1:-1]
    assert middle and all(4.0 * (index + 2) <= 0.1 * (epoch + 4.0 * (index + 1))
                          for index, epoch in enumerate(middle))
    assert drawn_epochs(clock, epochs=4, training=0.5, drawing=2.5) == [1, 4]
    assert drawn_epochs(clock, epochs=1, training=0.5, drawing=2.5) == [1]


def test_fast_pictures_come_every_epoch(clock):
    assert drawn_epochs(clock, epochs=6, training=100.0, drawing=3.0) == [1, 2, 3, 4, 5, 6]


def test_recording_counts_in_the_time_of_drawing(tmp_path, clock, seed):
    digits = data.load("digits", "unused")
    model = VisionMamba2(d_model=8, num_blocks=1, d_state=2, patch_size=2)
    model.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 3))
    with RunLog(tmp_path, first_epoch=0, first_step=0, run_id="a") as log:
        log.drawing = Ration(0.1, clock)
        log.scans(1, model, digits.val.images[:2], digits)
        assert log.drawing.spent == 3


def test_scalars_come_every_epoch_and_pictures_when_they_are_drawn(tmp_path, clock, seed):
    split = data.Split(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 3, (20,)))
    with RunLog(tmp_path, first_epoch=0, first_step=0, run_id="a") as log:
        log.drawing = Ration(0.1, clock)
        for epoch in (1, 2, 3):
            draw = log.draws(last=epoch == 3)
            log.drawing.spent = 1.0  # of no time at all: the clock stands still
            log.test(epoch, split, torch.rand(20, 3).softmax(1), ("a", "b", "c"), draw)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in events.Scalars("class_accuracy/a")] == [1, 2, 3]
    for tag in ("test/confusion", "test/mistakes"):
        assert [event.step for event in events.Images(tag)] == [1, 3]
