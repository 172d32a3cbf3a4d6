"""Vision Mamba 2: SelectiveScan → MambaBlock → VisionMamba2, readable beside the paper.

Run it to check this machine: ``python mamba_ssm_simple.py`` builds the model, compares every scan
implementation available here with the reference, and times them.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, Gu and Dao, arXiv 2312.00752.
Vision Mamba, Zhu et al., arXiv 2401.09417 (both directions in one block).

Letters, here and everywhere:
    b  batch        sequences in a batch (for scan="row": images × rows)
    l  length       tokens in a sequence
    d  d_model      width of the residual stream
    e  d_inner      channels inside the mixer, expand · d_model
    n  d_state      states per channel
    r  dt_rank      rank of the projection to Δ
    w  d_conv       taps of the causal depthwise convolution
    Δ  delta        step size, after softplus (dt in the official parameter names)
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from selective_scan import (
    Weights,
    causal_conv_silu,
    mamba_block,
    mixer,
    norm_mean,
    saves_memory,
    selective_scan,
)

SCANS = {  # the directions of successive blocks, again and again
    "row": ("right",), "raster": ("right",), "alternate": ("right", "left"),
    "cross": ("right", "down", "left", "up")}


class StateSpace(nn.Module):
    """One direction of the mixer: causal convolution, then the selective scan with its gate.

    Everything between in_proj and out_proj in Figure 3 of the paper. Δ, B and C depend on the input:
    that is the selection (Algorithm 2).
    """

    def __init__(self, d_inner: int, d_state: int, d_conv: int, dt_rank: int, dt_min: float, dt_max: float,
                 dt_init_floor: float, conv_bias: bool):
        super().__init__()
        self.dt_rank = dt_rank
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        # The bias makes softplus(bias) log-uniform in [dt_min, dt_max], as in the official code; section 3.6
        # says uniform.
        dt = torch.exp(torch.rand(d_inner) * math.log(dt_max / dt_min) + math.log(dt_min))
        dt = dt.clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # S4D-real: A = −1, −2, …, −n in every channel; stored as a logarithm, so that A stays negative.
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    @property
    def A(self) -> Tensor:
        """−exp(A_log), (e, n), float32 or, of a float64 module, float64."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def mix(self, x: Tensor, z: Tensor) -> Tensor:
        """x and gate z (b, l, e) → (b, l, e)."""
        if untouched(self.conv1d, nn.Conv1d):
            x = causal_conv_silu(x, self.conv1d.weight, self.conv1d.bias)
        else:
            x = F.silu(self.conv1d(x.mT)[..., :x.shape[1]].mT)
        n = self.A_log.shape[1]
        delta, B, C = self.x_proj(x).split([self.dt_rank, n, n], dim=-1)              # (b, l, r), 2 (b, l, n)
        bias = None
        if untouched(self.dt_proj, nn.Linear):  # the scan adds its bias
            delta, bias = F.linear(delta, self.dt_proj.weight), self.dt_proj.bias     # (b, l, e)
        else:
            delta = self.dt_proj(delta)
        return selective_scan(x, delta, self.A, B, C, self.D, z, bias, delta_softplus=True)


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `layer` does what `kind` does with its weights: no hook of its own, no adapter."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer).forward is kind.forward and "forward" not in vars(layer) and not any(hooks)


class SelectiveScan(StateSpace):
    """The Mamba (S6) mixer of arXiv 2312.00752, section 3: (b, l, d) → (b, l, d).

    Parameter names, shapes and initialisation are the official `Mamba` module's, so that a state_dict goes
    either way with ``strict=True`` (for ``bidirectional=False``).

    Args:
        d_model: width d of input and output.
        d_state: states n per channel.
        d_conv: taps w of the causal depthwise convolution.
        expand: d_inner = expand · d_model, rounded down.
        dt_rank: rank r of the projection to Δ; "auto" is ⌈d_model / 16⌉.
        dt_min, dt_max, dt_init_floor: the range of Δ at initialisation, in steps.
        conv_bias, bias: whether the convolution, and the two projections, have a bias.
        bidirectional: a second `StateSpace` reads the sequence backwards between the same two projections
            (arXiv 2401.09417, Algorithm 1). The two are averaged, as in the `div2` models of Vim's code;
            the paper sums them.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2,
                 dt_rank: int | str = "auto", dt_min: float = 0.001, dt_max: float = 0.1,
                 dt_init_floor: float = 1e-4, conv_bias: bool = True, bias: bool = False,
                 bidirectional: bool = False):
        d_inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        direction = (d_inner, d_state, d_conv, rank, dt_min, dt_max, dt_init_floor, conv_bias)
        super().__init__(*direction)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        self.backward_direction = StateSpace(*direction) if bidirectional else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) → (b, l, d), any length ≥ 1."""
        if self.fuses(x):  # training on CUDA: the lines below as one operator
            return mixer(x, self.weights())
        x, z = self.in_proj(x).chunk(2, dim=-1)                                       # 2 × (b, l, e)
        y = self.mix(x, z)
        if self.backward_direction is not None:
            y = (y + self.backward_direction.mix(x.flip(1), z.flip(1)).flip(1)) / 2
        return self.out_proj(y)

    def fuses(self, x: Tensor) -> bool:
        """Whether one operator can do all of it: in training on CUDA, for one direction.

        It takes weights, and of the projections no bias, so the layers have to be as they were made.
        """
        if self.backward_direction is not None or not saves_memory(x):
            return False
        projections = (self.in_proj, self.x_proj, self.out_proj)
        return (type(self).mix is StateSpace.mix and untouched(self.conv1d, nn.Conv1d)
                and all(untouched(layer, nn.Linear) for layer in (*projections, self.dt_proj))
                and all(layer.bias is None for layer in projections))

    def weights(self) -> Weights:
        """What the operator of all lines in one takes."""
        return Weights(self.in_proj.weight, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight,
                       self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D, self.out_proj.weight)

    def step(self, x: Tensor,
             state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token x (b, d) → (b, d), equal to `forward` token by token, in memory that does not grow.

        `state` is what the step before returned, or None before the first token: the last w−1 inputs of the
        convolution (b, w−1, e) and the states h (b, e, n), of A's dtype. The convolution's weights are taken
        as they are, whatever hangs on it.

        Raises:
            ValueError: a bidirectional mixer, which needs the tokens to come.
        """
        if self.backward_direction is not None:
            raise ValueError("step needs a mixer of one direction; the other would need the tokens to come")
        x, z = self.in_proj(x).chunk(2, dim=-1)                                       # 2 × (b, e)
        A, taps = self.A, self.conv1d.kernel_size[0]
        e, n = A.shape
        if state is None:
            state = x.new_zeros(len(x), taps - 1, e), x.new_zeros(len(x), e, n, dtype=A.dtype)
        window = torch.cat([state[0], x[:, None]], dim=1)                             # (b, w, e)
        x = torch.einsum("bwe,ew->be", window, self.conv1d.weight.squeeze(1))
        if self.conv1d.bias is not None:
            x = x + self.conv1d.bias
        x = F.silu(x)
        delta, B, C = self.x_proj(x).split([self.dt_rank, n, n], dim=-1)
        delta = F.softplus(self.dt_proj(delta)).to(A.dtype)[..., None]                # (b, e, 1)
        h = torch.exp(delta * A) * state[1] + delta * B[:, None].to(A.dtype) * x[..., None].to(A.dtype)
        y = torch.einsum("ben,bn->be", h, C.to(A.dtype)) + self.D * x
        return self.out_proj((y * F.silu(z)).to(x.dtype)), (window[:, 1:], h)


class MambaBlock(nn.Module):
    """x + SelectiveScan(LayerNorm(x)) on a feature map (b, height, width, d); 2-D to 1-D and back.

    With `position_conv`, x is first x + conv(x).

    Args:
        d_model: channels of the feature map.
        scan: "row", each row its own sequence, left to right; "raster", one sequence of height · width
            tokens, row by row; "alternate" and "cross", one sequence in the direction that `index` gives.
        index: the block's place in the network. With "alternate", successive blocks read the raster forwards
            and backwards, with "cross" they go right, down, left, up (as in arXiv 2402.05892), so that after
            two blocks, or four, every token has seen the whole image, at the price of one direction a block.
        d_state: states n per channel, half of Mamba's: on images as many learn as well, in less time.
        d_conv, expand, bidirectional: see `SelectiveScan`.
        drop_path: how often an image goes past the mixer in training (arXiv 1603.09382).
        position_conv: whether a depthwise 3×3 convolution of the map is added to it first: a token sees all
            its neighbours, and by the zeros around the map how near its edges are (arXiv 2102.10882).

    Raises:
        ValueError: an unknown scan.
    """

    def __init__(self, d_model: int, scan: str = "row", index: int = 0, d_state: int = 8, d_conv: int = 4,
                 expand: float = 2, bidirectional: bool = False, drop_path: float = 0.0,
                 position_conv: bool = False):
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"scan must be one of {', '.join(SCANS)}, but is {scan!r}")
        self.rows = scan == "row"
        self.direction = SCANS[scan][index % len(SCANS[scan])]
        self.drop_path = drop_path
        self.position_conv = None
        if position_conv:
            self.position_conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)
        self.norm = nn.LayerNorm(d_model)
        self.mixer = SelectiveScan(d_model, d_state, d_conv, expand, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        """(b, height, width, d) → the same shape."""
        if self.position_conv is not None:
            x = x + self.position_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.fuses(x):  # training on CUDA: the lines below as one operator
            return self.fused(x)
        sequence = to_sequence(self.norm(x), self.direction, self.rows)
        branch = to_map(self.mixer(sequence), self.direction, x.shape)
        return x + drop_path(branch, self.drop_path, self.training)

    def fuses(self, x: Tensor) -> bool:
        """Whether one operator can do all of it, see `SelectiveScan.fuses`."""
        return (untouched(self.mixer, SelectiveScan) and self.mixer.fuses(x)
                and untouched(self.norm, nn.LayerNorm) and self.norm.bias is not None)

    def fused(self, x: Tensor) -> Tensor:
        """`forward` as one operator, where that `fuses`."""
        scale = None
        if self.drop_path and self.training:
            scale = drop_path(x.new_ones(len(x), dtype=torch.float32), self.drop_path, self.training)
        shape = x.shape
        if self.rows:  # each row an image of its own
            x = x.reshape(-1, 1, *shape[2:])
            scale = scale if scale is None else scale.repeat_interleave(shape[1])
        norm, weights = self.norm, self.mixer.weights()
        return mamba_block(x, norm.weight, norm.bias, norm.eps, self.direction, scale, weights).view(shape)


class VisionMamba2(nn.Module):
    """An image classifier: convolutions down to a token grid, Mamba blocks, a head on the mean token.

    No size of image is fixed in the weights: any height and width work, at training and afterwards.
    `model.gradient_checkpointing = True` keeps only what enters each block for the backward, which computes
    the rest again (arXiv 1604.06174): a fraction of the memory for a third more time.

    Args:
        num_classes: classes K.
        d_model: width d of the tokens.
        num_blocks: number of `MambaBlock`s.
        in_channels: channels of the image.
        patch_size: pixels along a token's side, a power of two: each factor of two is a 3×3 convolution of
            stride 2; with 1 every pixel is a token and no convolution mixes pixels.
        stem_depth: convolutions for each factor of two, at least 1; all but the last have stride 1.
        scan, d_state, d_conv, expand, bidirectional: see `MambaBlock`.
        permute_seed: the pixels are first put into one fixed random order, a function of this number and of
            the image's size (permuted sequential MNIST); None leaves them where they are.
        drop_path: that of the last block; it rises linearly from the first to it.
        position_embedding: whether `positions` are added to the tokens, so that what a token does to the
            state can depend on where it stands.
        drop_tokens: how often a token is zero in training.
        position_conv: see `MambaBlock`.

    Raises:
        ValueError: a patch_size that is not a power of two.
    """

    gradient_checkpointing = False

    def __init__(self, num_classes: int = 10, d_model: int = 128, num_blocks: int = 4, in_channels: int = 1,
                 patch_size: int = 4, scan: str = "cross", d_state: int = 8, d_conv: int = 4,
                 expand: float = 2, bidirectional: bool = False, permute_seed: int | None = None,
                 drop_path: float = 0.0, stem_depth: int = 1, position_embedding: bool = False,
                 drop_tokens: float = 0.0, position_conv: bool = False):
        super().__init__()
        self.permute_seed, self.position_embedding = permute_seed, position_embedding
        self.drop_tokens = drop_tokens
        self.stem = stem(in_channels, d_model, patch_size, stem_depth)
        self.blocks = nn.ModuleList(
            MambaBlock(d_model, scan, index, d_state, d_conv, expand, bidirectional,
                       drop_path * (index + 1) / num_blocks, position_conv)
            for index in range(num_blocks))
        self.norm = NormMean(d_model)
        self.head = nn.Linear(d_model, num_classes)
        # Residual branches start small, so that depth does not change the scale of the sum (GPT-2, §2.3).
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.out_proj.weight /= math.sqrt(num_blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(b, in_channels, height, width) → logits (b, K)."""
        images = permute_pixels(images, self.permute_seed)
        x = self.stem(images).permute(0, 2, 3, 1)                                     # (b, height, width, d)
        if self.position_embedding:
            x = x + positions(*x.shape[1:], x.device).to(x.dtype)
        x = drop_tokens(x, self.drop_tokens, self.training)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return self.head(self.norm(x))


class NormMean(nn.LayerNorm):
    """LayerNorm of every token, then their mean (global average pooling): (b, …, d) → (b, d)."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_mean(x, self.weight, self.bias, self.eps)


def stem(in_channels: int, d_model: int, patch_size: int, depth: int = 1) -> nn.Sequential:
    """Image (b, in_channels, height, width) → tokens (b, d, ⌈height/patch⌉, ⌈width/patch⌉).

    Each halving doubles the channels, up to d. Of the `depth` convolutions of one, the last has stride 2 and
    these channels, the others half of them at the resolution before.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size < 1 or patch_size != 2**halvings:
        raise ValueError(f"patch_size must be a power of two, but is {patch_size}")
    if halvings == 0:
        return nn.Sequential(nn.Conv2d(in_channels, d_model, 1))
    widths = [in_channels, *(max(1, d_model >> (halvings - i)) for i in range(1, halvings + 1))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        steps = [(max(1, after // 2), 1)] * (depth - 1) + [(after, 2)]
        for channels, stride in steps:
            layers += [nn.Conv2d(before, channels, 3, stride, padding=1, bias=False),
                       nn.BatchNorm2d(channels), nn.SiLU()]
            before = channels
    return nn.Sequential(*layers)


def positions(height: int, width: int, d_model: int, device: torch.device) -> Tensor:
    """Sines and cosines of row and column, (height, width, d), at any resolution (arXiv 2205.01580, §2)."""
    quarter = math.ceil(d_model / 4)
    frequency = torch.exp(torch.arange(quarter, device=device) * (-math.log(10_000) / max(1, quarter - 1)))
    rows = torch.arange(height, device=device)[:, None] * frequency                    # (height, d/4)
    columns = torch.arange(width, device=device)[:, None] * frequency                  # (width, d/4)
    rows, columns = rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1)[..., :d_model]


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """A residual branch (b, …), zero for a fraction `rate` of the images, scaled up for the others."""
    return _drop(branch, 1, rate, training)


def drop_tokens(x: Tensor, rate: float, training: bool) -> Tensor:
    """Tokens (b, …, d), each zero with probability `rate`, so that none is relied on alone; others scaled up.

    As in arXiv 2208.07220, where they are taken out of the sequence; here its length stays.
    """
    return _drop(x, x.dim() - 1, rate, training)


def _drop(x: Tensor, dims: int, rate: float, training: bool) -> Tensor:
    """In training, all that lies at an index of x's first `dims` dimensions zero, or scaled up, together."""
    if rate == 0 or not training:
        return x
    return x * F.dropout(x.new_ones(*x.shape[:dims], *[1] * (x.dim() - dims)), rate)


def permute_pixels(images: Tensor, seed: int | None) -> Tensor:
    """Images (b, c, height, width), their pixels in the order that `seed` gives; as they are without one."""
    if seed is None:
        return images
    return images.flatten(2)[..., pixel_order(seed, images[0, 0].numel(), images.device)].view_as(images)


@torch.compiler.assume_constant_result
def pixel_order(seed: int, pixels: int, device: torch.device) -> Tensor:
    """A permutation of the pixels (pixels,) int64 on `device`; NumPy promises that this one never changes."""
    return _pixel_order(seed, pixels, device)


@functools.lru_cache(maxsize=16)  # a copy to the device at every step would make it wait
def _pixel_order(seed: int, pixels: int, device: torch.device) -> Tensor:
    # Or the backward could not use what an evaluation made, and nobody what torch.export did: no real tensor.
    with torch.inference_mode(False), _disable_current_modes():
        return torch.from_numpy(np.random.RandomState(seed).permutation(pixels)).to(device)


def to_sequence(x: Tensor, direction: str, rows: bool = False) -> Tensor:
    """Feature map (b, height, width, d) → (b, height · width, d), or (b · height, width, d) by rows."""
    if direction in ("down", "up"):
        x = x.transpose(1, 2)
    x = x.flatten(0, 1) if rows else x.flatten(1, 2)
    return x.flip(1) if direction in ("left", "up") else x


def to_map(x: Tensor, direction: str, shape: torch.Size) -> Tensor:
    """The inverse of `to_sequence` for a feature map of `shape` (b, height, width, d)."""
    b, height, width, d = shape
    if direction in ("left", "up"):
        x = x.flip(1)
    if direction in ("down", "up"):
        return x.reshape(b, width, height, d).transpose(1, 2)
    return x.reshape(b, height, width, d)


if __name__ == "__main__":
    import self_check
    from errors import run_script

    run_script(self_check.script)
