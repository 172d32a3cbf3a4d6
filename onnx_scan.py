"""Our operators in ONNX: its Scan operator walks over time and carries the state, as reference.py does.

Needs onnxscript, which is optional; import this module where it is used.
"""

import onnxscript
import torch
from onnxscript import FLOAT
from onnxscript import opset18 as op


@onnxscript.script()
def selective_scan(u: FLOAT, delta: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, D: FLOAT, z: FLOAT,
                   delta_bias: FLOAT) -> tuple[FLOAT, FLOAT]:
    """u, delta, z (b, l, e), A (e, n), B, C (b, l, n), D, delta_bias (e) → out (b, l, e), last state."""
    delta = op.Softplus(delta + delta_bias)
    scaled = delta * u
    start = op.ConstantOfShape(op.Concat(op.Shape(u, start=0, end=1), op.Shape(A), axis=0))

    @onnxscript.graph()
    def step(h, delta_t, scaled_t, B_t, C_t):
        decay = op.Exp(op.Unsqueeze(delta_t, [2]) * A)                              # (b, e, n)
        h_t = decay * h + op.Unsqueeze(scaled_t, [2]) * op.Unsqueeze(B_t, [1])
        y_t = op.Squeeze(op.MatMul(h_t, op.Unsqueeze(C_t, [2])), [2])               # (b, e)
        state = op.Identity(h_t)  # an output of its own: ONNX wants each named once
        return state, y_t

    last, y = op.Scan(start, delta, scaled, B, C, body=step, num_scan_inputs=4,
                      scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1])
    out = (y + D * u) * (z * op.Sigmoid(z))
    return out, last


def convolution(x, weight, bias, implementation):
    """The operator vision_mamba2::causal_conv_silu: x (b, l, e), weight (e, 1, w) → (b, l, e)."""
    image = op.Conv(op.Transpose(x, perm=[0, 2, 1]), weight, bias, group=weight.shape[0],
                    pads=[weight.shape[2] - 1, 0])
    return op.Transpose(image * op.Sigmoid(image), perm=[0, 2, 1])


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save, implementation):
    """The operator vision_mamba2::selective_scan, its three outputs. The model always has D, gate, bias and
    softplus; the checkpoints for a backward are empty."""
    out, last = selective_scan(u, delta, A, B, C, D, z, delta_bias)
    last = op.Transpose(last, perm=[0, 2, 1])
    return out, last, op.Slice(op.Unsqueeze(last, [1]), [0], [0], [1])


# For torch.onnx.export: how to write the operators that ONNX does not know (the model's import made them).
TRANSLATIONS = {torch.ops.vision_mamba2.causal_conv_silu.default: convolution,
                torch.ops.vision_mamba2.selective_scan.default: scan}
