"""The selective scan in ONNX: its Scan operator walks over time and carries the state, as reference.py does.

Needs onnxscript, which is optional; import this module where it is used.
"""

import onnxscript
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


def translate(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save, implementation):
    """The three outputs of the operator vision_mamba2::selective_scan, for torch.onnx.export.

    The model always has D, gate, bias and softplus. The third output, checkpoints for a backward, is empty.
    """
    out, last = selective_scan(u, delta, A, B, C, D, z, delta_bias)
    last = op.Transpose(last, perm=[0, 2, 1])
    return out, last, op.Slice(op.Unsqueeze(last, [1]), [0], [0], [1])
