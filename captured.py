"""A training step as one CUDA graph: the device is given hundreds of small kernels in one launch.

    step = CapturedStep(training.update, [training.augmentation])
    loss, norm = step(images, labels)

At MNIST's sizes Python launches kernels more slowly than an H100 runs them; a graph is launched once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: kernels are compiled, the optimiser makes its state


class CapturedStep:
    """`function(images, labels)` on a CUDA device, replayed from a graph for batches like the first one.

    The function must do the same work at every call: no number of Python's that changes, no look at the
    device. Every call counts, also those before the capture and those on smaller batches, which run as
    usual; results are the same bits either way. What it returns is overwritten by the next call.
    `generators` are those that it draws random numbers from, besides the device's own.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
                 generators: list[torch.Generator]):
        self.function, self.generators = function, generators
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        if self.inputs is None:
            self.inputs = images.clone(), labels.clone()
        if images.shape != self.inputs[0].shape:
            return self.function(images, labels)
        for target, source in zip(self.inputs, (images, labels), strict=True):
            target.copy_(source)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._on_a_side_stream()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.results = self.function(*self.inputs)
        self.graph.replay()
        return self.results

    def _on_a_side_stream(self) -> tuple[Tensor, ...]:
        """As a capture will run it: work of the default stream must not find its way into the graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return results
