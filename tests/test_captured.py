"""captured.py: which calls are captured, told without a GPU; test_train_mamba.py trains with it on one."""

from __future__ import annotations

import torch

from captured import WARM_UP, CapturedStep


class Told(CapturedStep):
    """Tells what a call would do, and does nothing."""

    def __init__(self):
        super().__init__(lambda images, labels: (), [])
        self.calls: list[tuple[str, int]] = []

    def _on_a_side_stream(self, images, labels):
        self.calls.append(("run", len(images)))
        return ()

    def _capture(self, images, labels):
        self.calls.append(("capture", len(images)))
        return self

    def replay(self, images, labels):
        self.calls.append(("replay", len(images)))
        return ()


def told(*sizes: int) -> list[tuple[str, int]]:
    step = Told()
    for size in sizes:
        step(torch.zeros(size, 1, 2, 2), torch.zeros(size))
    return step.calls


def test_a_size_runs_before_it_is_captured_and_is_replayed_from_then_on():
    epoch = [32] * 5 + [7]
    assert told(*epoch * 2) == [*[("run", 32)] * WARM_UP, ("capture", 32), ("replay", 32), ("replay", 32),
                                ("run", 7), *[("replay", 32)] * 5, ("capture", 7), ("replay", 7)]


def test_a_size_that_comes_first_after_the_warm_up_is_not_captured_unseen():
    assert told(*[32] * WARM_UP, 7, 32, 7) == [*[("run", 32)] * WARM_UP, ("run", 7), ("capture", 32),
                                               ("replay", 32), ("capture", 7), ("replay", 7)]
