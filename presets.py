"""Named sets of defaults for train_mamba.py's flags: ``--preset gpu``. What is typed wins over them.

A preset is a line of reason and what differs from the flags' own defaults, by the names that the settings of
a run have. A new one is an entry in PRESETS.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    reason: str  # what it is for; shown by --help and in README.md
    settings: dict[str, object]


PIXELS = {"dataset": "mnist", "patch_size": 1, "scan": "alternate", "augment": "none", "batch_size": 128,
          "lr": 3e-3, "weight_decay": 0.1, "d_state": 16, "position_embedding": True}  # a token each

PRESETS = {
    "default": Preset("a laptop's CPU: 7×7 tokens, a quarter of the work of 14×14", {}),
    "gpu": Preset(
        "a CUDA device: four times the default's tokens at half its width, so a quarter of the parameters; "
        "bfloat16",
        {"patch_size": 2, "d_model": 64, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.2, "amp": "bf16"}),
    "tiny": Preset(
        "at most 0.1 million parameters: narrow, because four blocks are what sees all four directions",
        {"patch_size": 2, "d_model": 48, "num_blocks": 4, "d_state": 16, "batch_size": 128, "lr": 3e-3,
         "weight_decay": 0.2, "epochs": 40, "augment": "elastic", "augment_strength": 0.7, "ema": 0.999}),
    "original": Preset(
        "the settings that this project began with, as they were, to compare with",
        {"scan": "row", "patch_size": 4, "batch_size": 64, "lr": 1e-3, "epochs": 20, "d_model": 128,
         "num_blocks": 4, "d_state": 16, "augment": "none"}),
    "smnist": Preset(
        "sequential MNIST as in the state-space papers: 784 pixels one at a time, no convolution over the "
        "image, no augmentation; positions, because decaying states tell places apart badly; 32 taps along "
        "the sequence, which reach the pixel of the row before; its averaged weights teach it, too, for it "
        "overfits",
        {**PIXELS, "d_model": 88, "num_blocks": 8, "d_conv": 32, "drop_path": 0.2, "drop_tokens": 0.2,
         "ema": 0.999, "mean_teacher": 0.5, "epochs": 30}),
    "psmnist": Preset(
        "permuted sequential MNIST: the same pixels in one fixed random order, where those before a pixel "
        "are no neighbours of it; learnt by heart sooner, so more tokens are dropped; depth does not help",
        # The seed for the order that much work on recurrent networks has; S4's code reverses bits instead.
        {**PIXELS, "permute_seed": 92916, "d_model": 128, "num_blocks": 4, "drop_path": 0.1,
         "drop_tokens": 0.25, "epochs": 50}),
    "speedrun": Preset(
        "seconds of training on a GPU: few large steps at a high rate",
        {"patch_size": 4, "d_state": 16, "batch_size": 256, "lr": 5e-3, "epochs": 4, "warm_up": 50,
         "ema": 0.98, "amp": "bf16"}),
    "best": Preset(
        "the highest accuracy on MNIST: 14×14 tokens, many narrow blocks that each see a token's neighbours, "
        "elastic augmentation, dropped tokens and paths, averaged weights; for a GPU",
        {"patch_size": 2, "d_model": 80, "num_blocks": 12, "d_state": 16, "position_conv": True,
         "batch_size": 128, "lr": 3e-3, "weight_decay": 0.3, "drop_path": 0.2, "drop_tokens": 0.25,
         "epochs": 70, "augment": "elastic", "augment_strength": 0.7, "ema": 0.999}),
    "cifar": Preset(
        "32×32 pixels in colour: 16×16 tokens, a plain trunk three times as deep",
        {"dataset": "cifar10", "patch_size": 2, "d_model": 192, "num_blocks": 12, "d_state": 16,
         "batch_size": 128, "epochs": 200, "flip": True}),
    "imagenet": Preset(
        "ImageNet's folders and their like: 224×224 pixels, 14×14 tokens, as large as Vim-tiny; for a GPU",
        {"dataset": "folder", "image_size": (224, 224), "patch_size": 16, "d_model": 192, "num_blocks": 24,
         "d_state": 16, "batch_size": 128, "epochs": 300, "flip": True, "amp": "bf16"}),
}
