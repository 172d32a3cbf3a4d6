"""What the Numba kernels are made of: how they are compiled, and exponential, sigmoid and softplus.

`np.exp` is a scalar call in PyPI's Numba, so these are written out as polynomials, which LLVM turns into SIMD
instructions. exp2 is right to one unit in the last place of float32, from 2^−126 up; sigmoid and softplus of
x lose up to |x| / 2 units more, because x is scaled for it and rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from llvmlite import binding
from numba import config, njit

LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)
ROUND = np.float32(1.5 * 2**23 + 127)  # added to x, leaves round(x) + 127 in the last bits

# NaN and infinity keep their meaning; only the order of sums and fused multiply-adds are left to LLVM.
FAST = {"contract", "reassoc", "nsz", "arcp"}
inlined = njit(fastmath=FAST, error_model="numpy", inline="always")


def kernel(function: Callable) -> Callable:
    """A function to be compiled, and kept on disk for the next process.

    Without Numba's runtime (`_nrt`) nobody counts the references to arrays that slices are, which took a
    sixth of the scan's backward. Kernels can then make no arrays: what they need is given to them.
    """
    compiled = njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True, boundscheck=False,
                    _nrt=False)(function)
    forget_if_older(compiled, function.__name__, Path(__file__))
    return compiled


def forget_if_older(compiled: Callable, name: str, source: Path) -> None:
    """Drop what is on disk of a kernel from before `source` changed, of which Numba does not know.

    It looks at the kernel's own file alone, and would go on with an exponential of an older version.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be written was not written, either
        for index in Path(compiled.stats.cache_path).glob(f"*.{name}-*.nbi"):
            if index.stat().st_mtime < source.stat().st_mtime:
                index.unlink()


def use_whole_vectors() -> None:
    """Let LLVM use AVX-512's whole vectors, of which it takes half on every processor of Intel's.

    That is wise before Ice Lake (the first with vbmi2), which lowers its clock for them, and costs a quarter
    of the forward's speed from then on. What the user has set in Numba's variables stays.
    """
    if config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX:
        try:
            features = binding.get_host_cpu_features()
        except RuntimeError:  # LLVM does not know this system's processors
            return
        if features.get("avx512vbmi2"):
            config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


use_whole_vectors()  # before anything is decorated: Numba looks at its settings then


@njit(fastmath=FAST - {"reassoc"}, error_model="numpy")
def exp2(x):
    """2^x for float32 by a minimax polynomial on [−½, ½]; 0 below 2^−126.5, infinite above 2^127.5.

    Without reassoc, by which LLVM would make x + ROUND − ROUND x.
    """
    # The exponent's bits of 2^−127 are those of 0, and those of 2^128 infinity's.
    x = max(min(x, np.float32(128.0)), np.float32(-127.0))
    rounded = np.float32(x + ROUND)
    f = x - (rounded - ROUND)
    p = np.float32(1.5353362e-4)
    p = p * f + np.float32(1.3398874e-3)
    p = p * f + np.float32(9.6184373e-3)
    p = p * f + np.float32(5.5503324e-2)
    p = p * f + np.float32(2.4022647e-1)
    p = p * f + np.float32(6.9314720e-1)
    p = p * f + np.float32(1.0)
    # As an int32, which Numba would make an int64, and AVX2 has no such vectors to shift.
    return p * np.int32(rounded.view(np.int32) << np.int32(23)).view(np.float32)


@inlined
def sigmoid(x):
    return np.float32(1.0) / (np.float32(1.0) + exp2(-x * LOG2_E))


@inlined
def log1p(y):
    """log(1 + y) for y in [0, 1], by a minimax polynomial of log(1 + y) / y; the logarithm loses digits."""
    p = np.float32(0.00512610214)
    p = p * y + np.float32(-0.0290740647)
    p = p * y + np.float32(0.0775160868)
    p = p * y + np.float32(-0.136022476)
    p = p * y + np.float32(0.190768807)
    p = p * y + np.float32(-0.24835399)
    p = p * y + np.float32(0.333181217)
    p = p * y + np.float32(-0.49999445)
    p = p * y + np.float32(0.999999966)
    return y * p


@kernel
def softplus(x, bias, y, slope):
    """y = log(1 + eʷ) = max(w, 0) + log1p(e^−|w|) of w = x + bias, and its slope where one is asked for."""
    for i in range(y.size):
        w = x[i] + bias[i]
        y[i] = max(w, np.float32(0.0)) + log1p(exp2(-abs(w) * LOG2_E))
    for i in range(slope.size):
        slope[i] = sigmoid(x[i] + bias[i])
