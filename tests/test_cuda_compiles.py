"""The CUDA kernels of the scan and the convolution compile for every generation of GPUs, with no GPU there.

Triton's interpreter (test_cuda.py) knows nothing of layouts, shared memory or what a processor cannot do; the
compiler does, and some of what it finds ends the process. So this file runs itself once for each generation.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selective_scan.dispatch import HAS_TRITON

GENERATIONS = {75: "Turing", 80: "Ampere", 90: "Hopper"}
KERNELS = {"cuda": {"forward_kernel", "segment_kernel", "carry_kernel", "backward_kernel",
                    "sum_weights_kernel", "sum_projected_kernel"},
           "causal_conv_cuda": {"forward_kernel", "backward_kernel", "wide_backward_kernel"}}


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_for_every_generation():
    def compiled(capability: int) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "tests.test_cuda_compiles", str(capability)],
                              cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)

    with ThreadPoolExecutor(2) as pool:
        for capability, done in zip(GENERATIONS, pool.map(compiled, GENERATIONS), strict=True):
            assert done.returncode == 0, f"{GENERATIONS[capability]}: {done.stdout}{done.stderr[-2000:]}"
            assert set(done.stdout.split()) == {f"{module}.{name}" for module in KERNELS
                                                for name in KERNELS[module]}


def compile_all(capability: int) -> None:
    """Compile what a forward and a backward in segments would launch, and print the kernels' names."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    from selective_scan import causal_conv_cuda, cuda

    class Recorded:
        """Stands for a kernel: compiles it where it would be launched."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *arguments, num_warps, maxnreg=None, **constants):
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
            signature, constexprs, attributes = {}, {}, {}
            for index, parameter in enumerate(self.kernel.params):
                value = values[parameter.name]
                if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                    signature[parameter.name], constexprs[index,] = "constexpr", value
                    continue
                aligned = value.data_ptr() if isinstance(value, torch.Tensor) else value
                signature[parameter.name] = triton.runtime.jit.mangle_type(value)
                if aligned % 16 == 0:
                    attributes[index,] = [["tt.divisibility", 16]]
            kind = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
            source = kind(self.kernel, signature, constexprs, attributes)
            options = {"num_warps": num_warps} | ({"maxnreg": maxnreg} if maxnreg else {})
            triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            print(f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}")

    for module in (cuda, causal_conv_cuda):
        for name in KERNELS[module.__name__.rpartition(".")[2]]:
            setattr(module, name, Recorded(getattr(module, name)))
    causal_conv_cuda.sum_rows = lambda sums, split: (sums[0, :split], sums[0, split:])
    if capability < 80:
        cuda._async = lambda *_: False
    b, l, e = 2, 256, 64
    u, delta, z, dout = torch.empty(4, b, l, e, dtype=torch.bfloat16)
    for n in (16, 130):
        B, C = torch.empty(2, b, l, n, dtype=torch.bfloat16)
        A, D, bias = torch.empty(e, n), torch.empty(e), torch.empty(e)
        _, _, checkpoints = cuda.forward(u, delta, A, B, C, D, z, bias, True, True)
        cuda.backward(dout, None, u, delta, A, B, C, D, z, bias, True, checkpoints)
    for taps in (4, 32, 35):  # in registers, and in a loop without and with a rest
        weight = torch.empty(e, 1, taps)
        causal_conv_cuda.forward(u, weight, bias)
        causal_conv_cuda.backward(dout, u, weight, bias, torch.empty_like(u))


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
