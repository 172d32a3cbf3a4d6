"""The selective scan of Mamba: one function, several implementations, one oracle.

    reference   the recurrence by its definition, autograd: the oracle (reference.py)
    portable    plain PyTorch with its own backward, any device, float64 (portable.py)
    numba       CPU kernels (cpu.py)
    triton      CUDA kernels (cuda.py)

`selective_scan` chooses by device and dtype in `choose_implementation` (dispatch.py), and nowhere else.
`selective_scan_fn` is the same behind mamba_ssm's signature and layouts (interface.py).
"""

from selective_scan.causal_conv import causal_conv_silu, causal_conv_silu_plain
from selective_scan.dispatch import (
    available_implementations,
    choose_implementation,
    run_implementation,
    selective_scan,
)
from selective_scan.interface import selective_scan_fn
from selective_scan.mixer import Weights, mamba_block, mixer, saves_memory
from selective_scan.norm_mean import norm_mean, norm_mean_plain
from selective_scan.reference import selective_scan_reference

__all__ = ["Weights", "available_implementations", "causal_conv_silu", "causal_conv_silu_plain",
           "choose_implementation", "mamba_block", "mixer", "norm_mean", "norm_mean_plain",
           "run_implementation", "saves_memory", "selective_scan", "selective_scan_fn",
           "selective_scan_reference"]
