"""The selective scan on one GPU, shape by shape, beside what the memory and the exponentials allow.

`python benchmarks/bench_scan.py` prints this table where there is a GPU. Times are medians of captured CUDA
graphs, so that Python's launches do not count. The floor is the larger of two times: the fewest bytes that
must move, over the copy bandwidth measured in the same run; and one exponential a state, over 3.6 T/s.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

EXPONENTIALS_PER_SECOND = 3.6e12  # of an H100: 132 processors × 16 a cycle × 1.7 GHz
REPEATS = 9
SHAPES = {  # name: ((b, l, e, n), dtype, target µs forward / backward on one H100)
    "rows 28": ((1792, 28, 256, 16), torch.float32, (130, 400)),
    "rows 14": ((896, 14, 256, 16), torch.float32, (40, 110)),
    "7×7 tokens": ((64, 49, 256, 16), torch.float32, (25, 60)),
    "14×14 tokens": ((64, 196, 256, 16), torch.float32, (45, 120)),
    "Vim-tiny": ((128, 197, 384, 16), torch.float32, (130, 400)),
    "high resolution": ((4, 6084, 384, 16), torch.float32, (190, 500)),
    "language": ((8, 2048, 2048, 16), torch.float32, (400, 1300)),
    "language, bfloat16": ((8, 2048, 2048, 16), torch.bfloat16, (380, 1200)),
    "long": ((1, 16384, 1024, 16), torch.float32, (250, 700)),
}


def measure() -> dict:
    """Copy bandwidth and a row a shape: microseconds, floors and ratios."""
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s\n\n{'':<20}{'(b, l, e, n)':<24}{'floor':>11}"
          f"{'time, µs':>14}{'time/floor':>12}{'target':>13}")
    rows = []
    for name, (shape, dtype, target) in SHAPES.items():
        floors = [1e6 * seconds for seconds in floor(shape, dtype, bandwidth)]
        times = [1e6 * seconds for seconds in time_scan(shape, dtype)]
        rows.append({"name": name, "shape": shape, "dtype": str(dtype), "floor_us": floors,
                     "median_us": times, "target_us": target})
        print(f"{name:<20}{shape!s:<24}{pair(floors):>11}{pair(times):>14}"
              f"{' / '.join(f'{a / b:.1f}' for a, b in zip(times, floors, strict=True)):>12}"
              f"{pair(target):>13}", flush=True)
    official = time_official()
    return {"copy_bytes_per_second": bandwidth, "rows": rows, "mamba_ssm_us": official}


def pair(values: tuple[float, float] | list[float]) -> str:
    return f"{values[0]:.0f} / {values[1]:.0f}"


def floor(shape: tuple[int, int, int, int], dtype: torch.dtype, bandwidth: float) -> tuple[float, float]:
    """Seconds that forward and backward cannot go below; without checkpoints, which are this method's own."""
    b, l, e, n = shape
    wide, narrow = b * l * e * dtype.itemsize, b * l * n * dtype.itemsize
    exponentials = b * l * e * n / EXPONENTIALS_PER_SECOND
    forward = (4 * wide + 2 * narrow) / bandwidth      # u, Δ, z in, out; B, C
    backward = (7 * wide + 4 * narrow) / bandwidth     # and ∂out in, ∂u, ∂Δ, ∂z out; B, C, ∂B, ∂C
    return max(forward, exponentials), max(backward, exponentials)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / captured_seconds(lambda: target.copy_(source))


def time_scan(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    """Median seconds of the forward that keeps checkpoints, and of the backward with all eight gradients."""
    from selective_scan import cuda  # needs Triton

    b, l, e, n = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device="cuda").to(dtype)

    A = -16 * torch.rand(e, n, device="cuda")
    D, bias = torch.randn(2, e, device="cuda").unbind()
    inputs = randn(b, l, e), randn(b, l, e), A, randn(b, l, n), randn(b, l, n), D, randn(b, l, e), bias - 4
    _, _, checkpoints = cuda.forward(*inputs, True, True)
    dout = randn(b, l, e)
    return (captured_seconds(lambda: cuda.forward(*inputs, True, True)),
            captured_seconds(lambda: cuda.backward(dout, None, *inputs, True, checkpoints)))


def time_official() -> dict | None:
    """mamba_ssm's CUDA extension on the same shapes, if installed: {name: [forward, backward] in µs}."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as official
    except ImportError:
        print("mamba_ssm is not installed, so its times are left out")
        return None
    times = {}
    for name, ((b, l, e, n), dtype, _) in SHAPES.items():
        u, delta, z, dout = (torch.randn(b, e, l, device="cuda").to(dtype) for _ in range(4))
        B, C = (torch.randn(b, n, l, device="cuda").to(dtype) for _ in range(2))
        A = -16 * torch.rand(e, n, device="cuda")
        D, bias = torch.randn(2, e, device="cuda").unbind()
        leaves = [tensor.requires_grad_() for tensor in (u, delta, A, B, C, D, z, bias)]
        forward = captured_seconds(lambda leaves=leaves: official(*leaves, delta_softplus=True))
        # A backward runs on its forward's stream, so that a capture must have both.
        both = captured_seconds(lambda leaves=leaves, dout=dout: torch.autograd.grad(
            official(*leaves, delta_softplus=True), leaves, dout))
        times[name] = [1e6 * forward, 1e6 * (both - forward)]
        print(f"mamba_ssm, {name:<20}{pair(times[name])}", flush=True)
    return times


def captured_seconds(function: Callable[[], object]) -> float:
    """Median seconds of a call, replayed from a CUDA graph of two."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
        function()
    samples = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 2000)
    return statistics.median(samples[2:])
