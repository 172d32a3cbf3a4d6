"""``python mamba_ssm_simple.py``: does the model run on this machine, is the scan right, how fast is it?"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from benchmarks import timing
from errors import ArgumentParser
from mamba_ssm_simple import VisionMamba2
from selective_scan import available_implementations, choose_implementation, run_implementation

CHECK_SHAPE = (2, 37, 48, 16)   # (b, l, e, n)
TIME_SHAPE = (16, 49, 256, 16)  # a quarter of a training batch of MNIST
TOLERANCE = 1e-5                # ‖a − b‖ / ‖b‖ in float32, of the output and of every gradient
REPEATS = 5


def script() -> None:
    """`main` as a command: no flags, and its verdict as exit status."""
    ArgumentParser("Check the model and every selective scan on this machine, and time them.").parse_args()
    sys.exit(main())


def main() -> int:
    """Print model, errors and times; 0 if every implementation agrees with the reference, else 1."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        chosen = choose_implementation(torch.empty(1, 1, 1, device=device))
        print(f"{device.type}: VisionMamba2 runs on the {chosen!r} scan; {timing.machine_line(device)}")
    show_model(devices[-1])
    verdicts = [check(device) for device in devices]
    right = all(verdicts)
    print("\nAll implementations agree with the reference." if right else
          "\nFAIL: an implementation disagrees with the reference; please report this table.")
    return 0 if right else 1


def show_model(device: torch.device) -> None:
    """Shapes after each stage of the default model, by hooks, and its parameters."""
    model = VisionMamba2().to(device).eval()
    images = torch.randn(64, 1, 28, 28, device=device)
    print(f"\n{'VisionMamba2()':<32}{'output':>20}{'parameters':>14}")
    print(f"{'images':<32}{shape(images):>20}")

    def show(name: str, stage: nn.Module) -> None:
        what = f"{name} ({stage.direction})" if hasattr(stage, "direction") else name
        line = f"{what:<32}{{:>20}}{count(stage):>14,}"
        stage.register_forward_hook(lambda _, __, out: print(line.format(shape(out))))

    show("stem", model.stem)
    for index, block in enumerate(model.blocks):
        show(f"blocks.{index}", block)
    show("norm, mean of the tokens", model.norm)
    show("head", model.head)
    with torch.inference_mode():
        model(images)
    print(f"{'all':<32}{'':>20}{count(model):>14,}")


def check(device: torch.device) -> bool:
    """A table of every implementation on `device`: errors against float64, times against "portable"."""
    names = [name for name in available_implementations(device) if name != "reference"]
    exact = run("reference", *random_inputs(CHECK_SHAPE, device, torch.float64))
    errors = {name: [relative_error(a, b) for a, b in zip(
        run(name, *random_inputs(CHECK_SHAPE, device, torch.float32)), exact, strict=True)] for name in names}
    inputs, dout = random_inputs(TIME_SHAPE, device, torch.float32)
    forward = timing.interleave({name: lambda name=name: run_forward(name, inputs) for name in names},
                                REPEATS, device)
    both = timing.interleave({name: lambda name=name: run(name, inputs, dout) for name in names},
                             REPEATS, device)

    print(f"\nselective scan on {device.type}, float32: relative errors against the float64 reference at "
          f"(b, l, e, n) = {CHECK_SHAPE},\nmedian milliseconds at {TIME_SHAPE}")
    print(f"{'':<12}{'output':>10}{'worst gradient':>16}{'':>7}{'forward':>10}{'+ backward':>12}"
          f"{'against portable':>18}")
    for name in names:
        output, *gradients = errors[name]
        verdict = "ok" if is_right(errors[name]) else "FAIL"
        print(f"{name:<12}{output:>10.1e}{max(gradients):>16.1e}{verdict:>7}"
              f"{1000 * timing.median(forward[name]):>10.2f}{1000 * timing.median(both[name]):>12.2f}"
              f"{timing.ratio(both['portable'], both[name]):>17.1f}×")
    return all(is_right(errors[name]) for name in names)


def random_inputs(shape: tuple[int, int, int, int], device: torch.device,
                  dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """u, delta, A, B, C, D, z, delta_bias and the output's gradient: the same values in every dtype."""
    b, l, e, n = shape
    random = torch.Generator().manual_seed(0)
    shapes = ((b, l, e), (b, l, e), (e, n), (b, l, n), (b, l, n), (e,), (b, l, e), (e,), (b, l, e))
    tensors = [torch.randn(size, generator=random) for size in shapes]
    tensors[2] = -tensors[2].exp()
    *inputs, dout = (tensor.to(device, dtype) for tensor in tensors)
    return [tensor.requires_grad_() for tensor in inputs], dout


def run(name: str, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    out = run_implementation(name, *inputs, delta_softplus=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@torch.inference_mode()
def run_forward(name: str, inputs: list[Tensor]) -> Tensor:
    return run_implementation(name, *inputs, delta_softplus=True)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def is_right(errors: list[float]) -> bool:
    """Written so that NaN is wrong."""
    return all(error <= TOLERANCE for error in errors)


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
