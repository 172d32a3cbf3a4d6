"""What test_distributed.py does in processes of its own; apart, as each of them imports this file anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distributed


def alone(rank: int, size: int, port: int, images: torch.Tensor, weights: torch.Tensor) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    with distributed.processes():
        check_batch_norm(images, weights)
        check_pieces()


def check_batch_norm(images: torch.Tensor, weights: torch.Tensor) -> None:
    """A part in each process: outputs, gradients and running statistics are those of the whole batch."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, momentum=0.3)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    shared = distributed.SharedBatchNorm.of(nn.BatchNorm2d(3, momentum=0.3))
    shared.load_state_dict(plain.state_dict())
    part = distributed.part(len(images)).images
    whole, own = images.clone().requires_grad_(), images[part].clone().requires_grad_()
    expected, got = plain(whole), shared(own)
    (expected * weights).sum().backward()
    (got * weights[part]).sum().backward()
    torch.testing.assert_close(got, expected[part], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad, whole.grad[part], rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        gradient = distributed.total(getattr(shared, name).grad)
        torch.testing.assert_close(gradient, getattr(plain, name).grad, rtol=1e-4, atol=1e-4)
    for (name, a), (_, b) in zip(shared.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(shared.eval()(images), plain.eval()(images))


def check_pieces() -> None:
    size, rank = distributed.size(), distributed.rank()
    for batch in (size, 7, 50):
        parts = [None] * size
        dist.all_gather_object(parts, distributed.part(batch))
        covered = [image for part in parts for image in range(batch)[part.images]]
        assert covered == list(range(batch)), "each image once, in order"
        assert sum(part.weight for part in parts) == pytest.approx(size)
    few = distributed.part(1)
    assert (few.weight, few.copies) == (1.0, size)
    assert few.total(torch.tensor([3.0])) == 3.0
    for images in (1, 2, 5, 7):
        inputs, labels = torch.arange(images), torch.arange(images) * 10
        rows = distributed.compute_in_parts(lambda a, b: torch.stack([a, b], 1).float(), inputs, labels)
        assert torch.equal(rows, torch.stack([inputs, labels], 1).float())
    shared = {"path": Path("a/b"), "numbers": [rank, 1.5, None], "tensor": torch.full((3,), rank)}
    got = distributed.of_the_first(lambda: shared)
    assert got["path"] == Path("a/b") and got["numbers"] == [0, 1.5, None] and got["tensor"].sum() == 0
    assert distributed.agreed(rank == size - 1) and not distributed.agreed(False)
    assert distributed.is_writer() == (rank == 0)
    distributed.draw_apart(3, 5)
    drawn = [None] * size
    dist.all_gather_object(drawn, torch.rand(1).item())
    assert len(set(drawn)) == size
