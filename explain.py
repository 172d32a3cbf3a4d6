"""What the scan selects and how far its state remembers, recorded from outside.

    scans = record(model, images)          hooks are set, the model runs once, the hooks are removed again
    scans[0].delta_map()                   (b, height, width): how much each token writes into the state
    scans[0].shares()                      (b, tokens): what each token still holds of the last state

The last state is a sum with one term for each token, h_L = Σ_t exp(A Σ_{s>t} Δ_s) Δ_t B_t u_t, which
follows from the recurrence (arXiv 2312.00752, eq. 2) by unrolling it. u is the token after the causal
convolution, so that it holds something of the w−1 tokens before it, too (and with `position_conv` of its
neighbours).

Shapes: b images, l tokens of one sequence, e channels, n states a channel. With scan="row" an image is
as many sequences as it has rows; else it is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import evaluate
import scan_figures
from errors import UserError
from mamba_ssm_simple import MambaBlock, StateSpace, pixel_order, to_sequence

ARROWS = {"right": "→", "down": "↓", "left": "←", "up": "↑"}
OPPOSITE = {"right": "left", "left": "right", "down": "up", "up": "down"}


@dataclass(frozen=True)
class Scan:
    """One direction of one block, as it read a batch of images. All tensors are float32 on the CPU."""

    block: int              # from 1
    direction: str          # the way it goes from token to token: right, down, left or up
    grid: tuple[int, int]   # height and width of the feature map, in tokens
    length: int             # tokens l of one sequence
    order: Tensor           # (tokens,) int64: the place, row · width + column, of each token in reading order
    u: Tensor               # (b, tokens, e): what enters the state, in reading order like the next two
    delta: Tensor           # (b, tokens, e): step sizes Δ after softplus
    B: Tensor               # (b, tokens, n)
    A: Tensor               # (e, n), negative

    @property
    def name(self) -> str:
        return f"block {self.block} {ARROWS[self.direction]}"

    def to_map(self, values: Tensor) -> Tensor:
        """One number a token in reading order, (b, tokens), laid out as it stands in the image (b, h, w)."""
        flat = torch.empty_like(values)
        flat[:, self.order] = values
        return flat.unflatten(1, self.grid)

    def delta_map(self) -> Tensor:
        """The mean of Δ over the channels, (b, height, width)."""
        return self.to_map(self.delta.mean(dim=2))

    def contributions(self, image: int) -> Tensor:
        """The terms of the last state of every sequence of one image: (sequences, l, e, n); their sum over l
        is what `selective_scan` returns as last state."""
        u, delta, B = (tensor[image].unflatten(0, (-1, self.length))
                       for tensor in (self.u, self.delta, self.B))
        from_here = delta.flip(1).cumsum(dim=1).flip(1)
        after = F.pad(from_here[:, 1:], (0, 0, 0, 1))                   # Σ_{s>t} Δ_s, (sequences, l, e)
        return torch.exp(after[..., None] * self.A) * (delta * u)[..., None] * B[:, :, None]

    def shares(self) -> Tensor:
        """The Euclidean norm of each token's term, in fractions that sum to 1 over its sequence; (b, tokens)
        in reading order. One image after the other, because the terms of 64 large ones fill a memory."""
        norms = torch.stack([self.contributions(image).flatten(2).norm(dim=2)
                             for image in range(len(self.u))])
        return (norms / norms.sum(dim=2, keepdim=True).clamp(min=1e-30)).flatten(1)

    def states(self, image: int) -> Tensor:
        """h after each token of one image, (tokens, e, n); with scan="row" each row begins at 0."""
        states, h = [], torch.zeros_like(self.A)
        for token in range(len(self.order)):
            if token % self.length == 0:
                h = torch.zeros_like(self.A)
            u, delta, B = (tensor[image, token] for tensor in (self.u, self.delta, self.B))
            h = torch.exp(delta[:, None] * self.A) * h + (delta * u)[:, None] * B
            states.append(h)
        return torch.stack(states)


@torch.inference_mode()
def record(model: nn.Module, images: Tensor) -> list[Scan]:
    """Run `model` once on normalised images (b, C, H, W) on its device; one `Scan` for each direction of
    each block, in the order of computation.

    The model's code, weights and mode stay as they were, and its hooks are removed even after an error.
    Raises UserError for a model without Mamba blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, MambaBlock)]
    if not blocks:
        raise UserError(f"there is no scan in a {type(model).__name__} to explain; choose a checkpoint of a "
                        "mamba model")
    scans, handles = [], []
    try:
        for number, block in enumerate(blocks, start=1):
            handles += _listen(number, block, scans)
        with evaluate.evaluation_mode(model):  # or batch normalisation would learn from these images
            model(images)
        if getattr(model, "permute_seed", None) is not None and scans[0].grid == tuple(images.shape[2:]):
            # A token is a pixel of an image in another order: go back to where it came from.
            pixels = pixel_order(model.permute_seed, images[0, 0].numel(), torch.device("cpu"))
            scans = [replace(scan, order=pixels[scan.order]) for scan in scans]
    finally:
        for handle in handles:
            handle.remove()
    return scans


def _listen(number: int, block: MambaBlock, scans: list[Scan]) -> list[RemovableHandle]:
    """Hooks on one block that append its scans to `scans` when it runs."""
    grid: list[int] = []

    def see_grid(_, inputs) -> None:
        grid[:] = inputs[0].shape[1:3]

    def see_scan(space: StateSpace, backward: bool) -> RemovableHandle:
        return space.x_proj.register_forward_hook(lambda _, inputs, projected: scans.append(
            _scan(number, block, space, backward, tuple(grid), inputs[0], projected)))

    handles = [block.register_forward_pre_hook(see_grid), see_scan(block.mixer, False)]
    if block.mixer.backward_direction is not None:
        handles.append(see_scan(block.mixer.backward_direction, True))
    return handles


def _scan(number: int, block: MambaBlock, space: StateSpace, backward: bool, grid: tuple[int, int],
          u: Tensor, projected: Tensor) -> Scan:
    """What one direction saw: u (sequences, l, e), and of it `projected`: what becomes Δ, then B and C."""
    rank, n = space.dt_rank, space.A_log.shape[1]
    delta = F.softplus(F.linear(projected[..., :rank], space.dt_proj.weight, space.dt_proj.bias).float())
    places = torch.arange(grid[0] * grid[1]).reshape(1, *grid, 1)
    order = to_sequence(places, block.direction, block.rows)
    order = (order.flip(1) if backward else order).flatten()

    def by_image(tensor: Tensor) -> Tensor:
        return tensor.float().cpu().reshape(-1, len(order), tensor.shape[-1])

    return Scan(number, OPPOSITE[block.direction] if backward else block.direction, grid, u.shape[1], order,
                by_image(u), by_image(delta), by_image(projected[..., rank:rank + n]),
                space.A.float().cpu())


def one_of_each_class(labels: Tensor, classes: int = 10) -> Tensor:
    """The index of the first image of each class, (≤ classes,): the same digits every time."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:classes]]).cpu()


def has_scan(model: nn.Module) -> bool:
    """Whether `record` finds anything in `model`."""
    return any(isinstance(module, MambaBlock) for module in model.modules())


def draw(images: Tensor, scans: list[Scan]) -> dict[str, Figure]:
    """The pictures of `scans`, recorded on `images` (b, C, H, W) uint8, by the names of their files."""
    shares = [scan.shares() for scan in scans]
    about = {"orders": [scan.order for scan in scans], "lengths": [scan.length for scan in scans],
             "names": [scan.name for scan in scans]}
    return {
        "delta.png": scan_figures.delta_maps(images, [scan.delta_map() for scan in scans], **about),
        "memory.png": scan_figures.memory_maps(
            images, [scan.to_map(share) for scan, share in zip(scans, shares, strict=True)], **about),
        "memory_reach.png": scan_figures.memory_reach(
            [share.unflatten(1, (-1, scan.length)).flatten(0, 1)
             for scan, share in zip(scans, shares, strict=True)], about["names"]),
    }


def animate(images: Tensor, scans: list[Scan], image: int) -> list[Image.Image]:
    """The states of one of `images` filling up, as frames."""
    return scan_figures.state_frames(images[image], scans[0].grid, [scan.states(image) for scan in scans],
                                     [scan.order for scan in scans], [scan.length for scan in scans],
                                     [scan.name for scan in scans])
