"""A training step as one CUDA graph: the device is given hundreds of small kernels in one launch.

    step = CapturedStep(training.update, [training.augmentation])
    loss, norm = step(images, labels)

At MNIST's sizes Python launches kernels more slowly than an H100 runs them; a graph is launched once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # calls before the first capture: kernels are compiled, the optimiser makes its state


class Captured(NamedTuple):
    """A graph, where it reads its batch, and what it returns."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]

    def replay(self, *batch: Tensor) -> tuple[Tensor, ...]:
        for target, source in zip(self.inputs, batch, strict=True):
            target.copy_(source)
        self.graph.replay()
        return self.results


class CapturedStep:
    """`function(images, labels)` on a CUDA device, replayed from a graph; one for each size of batch.

    The function must do the same work at every call: no number of Python's that changes, no look at the
    device. Every call counts, also those before a capture, which run as usual; results are the same bits
    either way. What it returns is overwritten by the next call. `generators` are those that it draws random
    numbers from, besides the device's own.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
                 generators: list[torch.Generator]):
        self.function, self.generators = function, generators
        self.warm_up = WARM_UP  # calls to come before the first capture
        self.seen: set[torch.Size] = set()              # shapes of images that have run
        self.captured: dict[torch.Size, Captured] = {}  # by that shape

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        if images.shape in self.captured:
            return self.captured[images.shape].replay(images, labels)
        if self.warm_up > 0 or images.shape not in self.seen:  # torch.compile may not compile in a capture
            self.warm_up -= 1
            self.seen.add(images.shape)
            return self._on_a_side_stream(images, labels)
        captured = self.captured[images.shape] = self._capture(images.clone(), labels.clone())
        return captured.replay(images, labels)

    def _capture(self, *inputs: Tensor) -> Captured:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # They never run at the same time, so that one's memory serves them all.
        pool = next((other.graph.pool() for other in self.captured.values()), None)
        # Other threads may do what a capture forbids, such as pinning the memory of pictures to come.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = self.function(*inputs)
        return Captured(graph, inputs, results)

    def _on_a_side_stream(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As a capture will run it: work of the default stream must not find its way into the graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return results
