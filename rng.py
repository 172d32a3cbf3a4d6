"""The state of every random number generator, as plain values and tensors that a checkpoint may hold."""

from __future__ import annotations

import random

import numpy as np
import torch


def state(device: torch.device) -> dict:
    """The generators of Python, NumPy, PyTorch and, where it is used, the CUDA device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {"python": random.getstate(), "torch": torch.get_rng_state(),
              "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss)}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict, device: torch.device) -> None:
    """Set the generators to a `state`."""
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
