"""What VisionMamba2 is compared with: an LSTM and a Transformer of the same size, with its stem and its head.

    config = matched_config("lstm", mamba_config)          the same width and depth, the same parameters
    model = VisionLSTM(**config)

The rest of the size follows from the parameters that VisionMamba2 has with the same arguments: the hidden
size of the LSTM, and the width of the Transformer's MLPs, which comes out at about 1.5 · d_model where 4 is
usual, because a Mamba block has no MLP and is smaller than a usual Transformer's.

Letters as in mamba_ssm_simple.py; m is the width of an MLP.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_ssm_simple import (
    NormMean,
    VisionMamba2,
    drop_path,
    drop_tokens,
    permute_pixels,
    positions,
    stem,
)


class VisionLSTM(nn.Module):
    """Stem, `nn.LSTM` over the tokens row by row, a head on the mean token.

    Under autocast to bfloat16 on CUDA the LSTM stays in float32: PyTorch would give cuDNN float16 there,
    whatever was asked for (aten/src/ATen/cudnn/AutocastRNN.cpp), and no scaler keeps its gradients alive.

    Args:
        num_classes, d_model, in_channels, patch_size, permute_seed, stem_depth, position_embedding,
            drop_tokens: see `VisionMamba2`.
        num_blocks: layers.
        hidden_size: states of a layer.
        bidirectional: each layer reads both ways.
        drop_path: dropout between the layers; an LSTM has no residual branches that could be left out.
    """

    def __init__(self, num_classes: int = 10, d_model: int = 128, num_blocks: int = 4, in_channels: int = 1,
                 patch_size: int = 4, hidden_size: int = 120, bidirectional: bool = False,
                 permute_seed: int | None = None, drop_path: float = 0.0, stem_depth: int = 1,
                 position_embedding: bool = False, drop_tokens: float = 0.0):
        super().__init__()
        self.permute_seed, self.position_embedding = permute_seed, position_embedding
        self.drop_tokens = drop_tokens
        self.stem = stem(in_channels, d_model, patch_size, stem_depth)
        self.lstm = nn.LSTM(d_model, hidden_size, num_blocks, batch_first=True, bidirectional=bidirectional,
                            dropout=drop_path if num_blocks > 1 else 0.0)
        # A gate that starts open remembers (Jozefowicz, Zaremba and Sutskever, ICML 2015); i, f, g, o.
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("bias_ih"):
                    parameter[hidden_size:2 * hidden_size] = 1
        width = hidden_size * (2 if bidirectional else 1)
        self.norm = NormMean(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(b, in_channels, height, width) → logits (b, K), any height and width."""
        x = self.stem(permute_pixels(images, self.permute_seed)).permute(0, 2, 3, 1)  # (b, height, width, d)
        if self.position_embedding:
            x = x + positions(*x.shape[1:], x.device).to(x.dtype)
        x = x.flatten(1, 2)                                                           # (b, l, d)
        x = drop_tokens(x, self.drop_tokens, self.training)
        if in_bfloat16_on_cuda(x):
            with torch.autocast("cuda", enabled=False):
                x, _ = self.lstm(x.float())
        else:
            x, _ = self.lstm(x)                                                         # (b, l, hidden_size)
        return self.head(self.norm(x))


def in_bfloat16_on_cuda(x: Tensor) -> bool:
    """Whether autocast to bfloat16 is at work where `x` is, and that is a CUDA device."""
    return (x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
            and torch.get_autocast_dtype("cuda") is torch.bfloat16)


class VisionTransformer(nn.Module):
    """Stem, positions, pre-norm Transformer blocks, a head on the mean token (arXiv 2205.01580).

    Args:
        num_classes, d_model, num_blocks, in_channels, patch_size, permute_seed, drop_path, stem_depth,
            drop_tokens: see `VisionMamba2`.
        mlp_width: width m of the MLPs.
        num_heads: heads of the attention; 0 takes one for each 64 channels, as is usual.

    Raises:
        ValueError: a num_heads that does not divide d_model.
    """

    gradient_checkpointing = False  # as in `VisionMamba2`

    def __init__(self, num_classes: int = 10, d_model: int = 128, num_blocks: int = 4, in_channels: int = 1,
                 patch_size: int = 4, mlp_width: int = 200, num_heads: int = 0,
                 permute_seed: int | None = None, drop_path: float = 0.0, stem_depth: int = 1,
                 drop_tokens: float = 0.0):
        super().__init__()
        self.permute_seed, self.drop_tokens = permute_seed, drop_tokens
        self.stem = stem(in_channels, d_model, patch_size, stem_depth)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, mlp_width, num_heads, drop_path * (index + 1) / num_blocks)
            for index in range(num_blocks))
        self.norm = NormMean(d_model)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(b, in_channels, height, width) → logits (b, K), any height and width."""
        x = self.stem(permute_pixels(images, self.permute_seed)).permute(0, 2, 3, 1)  # (b, height, width, d)
        x = (x + positions(*x.shape[1:], x.device).to(x.dtype)).flatten(1, 2)         # (b, l, d)
        x = drop_tokens(x, self.drop_tokens, self.training)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return self.head(self.norm(x))


class TransformerBlock(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): (b, l, d) → (b, l, d)."""

    def __init__(self, d_model: int, mlp_width: int, num_heads: int = 0, drop_path: float = 0.0):
        super().__init__()
        self.num_heads = num_heads or usual_heads(d_model)
        if d_model % self.num_heads:
            raise ValueError(f"{num_heads} heads do not divide {d_model} channels")
        self.drop_path = drop_path
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, mlp_width), nn.GELU(), nn.Linear(mlp_width, d_model))

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attend(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)

    def attend(self, x: Tensor) -> Tensor:
        """Every token looks at every other: (b, l, d) → (b, l, d)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                      # 3 × (b, heads, l, d/heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


def usual_heads(d_model: int) -> int:
    """One head for each 64 channels, or as many below as divide them."""
    return next(heads for heads in range(max(1, d_model // 64), 0, -1) if d_model % heads == 0)


# ---- The same size ----------------------------------------------------------------------------------------

ARCHITECTURES = {"mamba": VisionMamba2, "lstm": VisionLSTM, "transformer": VisionTransformer}


def matched_config(architecture: str, config: dict) -> dict:
    """The arguments of `architecture` that give it about as many parameters as VisionMamba2(**config) has.

    What an architecture does not know is left out: the order of the scan, d_state, d_conv, position_conv, and
    for a Transformer whether positions are added, which it cannot do without. Raises KeyError for an
    architecture that is not in ARCHITECTURES, and whatever VisionMamba2 raises for its config.
    """
    if architecture == "mamba":
        return config
    unknown = {"scan", "d_state", "d_conv", "expand", "position_conv"}
    if architecture == "transformer":
        unknown |= {"bidirectional", "position_embedding"}
    shared = {name: value for name, value in config.items() if name not in unknown}
    size = {"lstm": "hidden_size", "transformer": "mlp_width"}[architecture]

    def build(value: int) -> nn.Module:
        return ARCHITECTURES[architecture](**shared, **{size: value})

    return {**shared, size: matched_size(build, count_on_meta(lambda: VisionMamba2(**config)))}


def matched_size(build: Callable[[int], nn.Module], parameters: int) -> int:
    """The size at which `build(size)` has nearly as many parameters: a multiple of 8 within 2%, else any.

    Tensor cores like multiples of 8, and no baseline is to be slow for want of one.
    """
    def count(size: int) -> int:
        return count_on_meta(lambda: build(size))

    for step in (8, 1):
        sizes = range(step, parameters, step)
        index = bisect.bisect_left(sizes, parameters, key=count)
        size = min(sizes[max(0, index - 1):index + 1], key=lambda size: abs(count(size) - parameters))
        if abs(count(size) - parameters) <= 0.02 * parameters:
            break
    return size


def count_on_meta(build: Callable[[], nn.Module]) -> int:
    """Parameters of the module that `build` makes, without memory or random numbers for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
