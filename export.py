"""The trained classifier as an ONNX file, checked against PyTorch before it is kept.

How the selective scan is written in ONNX is in `onnx_scan.py`. The file also holds the normalisation:
its input is `images`, float32 (batch, C, H, W) in [0, 1], a batch of 1 or more; its output is `logits`,
float32 (batch, classes).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import evaluate
from augment import normalize
from errors import UserError
from trained import TrainedModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4        # of the logits
BATCHES = (1, 2, 7)     # sizes that are compared


class Classifier(nn.Module):
    """Normalisation and model in one: (b, C, H, W) float32 in [0, 1] → logits (b, classes)."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.model(normalize(images, self.mean, self.std))


def export(trained: TrainedModel, path: Path) -> list[str]:
    """Write `path` and compare it with PyTorch on test images; returns lines that tell size and speed.

    The file is there whole and checked, or not at all. Raises UserError for a missing package, a name that
    does not end in .onnx or is taken, a model that ONNX cannot hold, and logits that differ by more than
    `TOLERANCE`.
    """
    check(path)
    classifier = Classifier(copy.deepcopy(trained.model).cpu().eval(), trained.mean, trained.std)
    images = trained.dataset.test.images[:max(BATCHES)].float() / 255
    print("exporting", flush=True)
    program = _convert(classifier, images[:2])
    program.model.metadata_props.update(classes=json.dumps(trained.classes), run_name=trained.run_name)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export.") as folder:
            whole = Path(folder) / path.name
            program.save(whole)
            run = _onnx_runtime(whole)
            with torch.inference_mode():
                difference = max(float((run(images[:batch]) - classifier(images[:batch])).abs().max())
                                 for batch in BATCHES)
                if not difference <= TOLERANCE:
                    raise UserError(f"the exported logits differ from PyTorch's by {difference:.1e}, more "
                                    f"than {TOLERANCE:.0e}; nothing was written, please report this")
                times = [1000 * evaluate.median_seconds(function, images[:1])
                         for function in (run, classifier)]
            size = whole.stat().st_size
            os.replace(whole, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    shape = ", ".join(map(str, images.shape[1:]))
    return [f"{path}: {size / 2**20:.2f} MiB, images (batch, {shape}) float32 in 0 to 1 → logits "
            f"(batch, {len(trained.classes)})",
            f"largest difference from PyTorch {difference:.1e} (batches of {', '.join(map(str, BATCHES))}; "
            f"allowed {TOLERANCE:.0e})",
            f"one image on this CPU: ONNX Runtime {times[0]:.1f} ms, PyTorch {times[1]:.1f} ms"]


def check(path: Path) -> None:
    """Raise UserError where `export` could not even begin."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export needs {', '.join(missing)}; run: pip install -r requirements-demo.txt")
    if path.suffix != ".onnx":
        raise UserError(f"{path} does not end in .onnx; give it such a name")
    if path.exists():
        raise UserError(f"{path} exists; choose another name or delete it")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; make it first")


def _convert(classifier: nn.Module, images: Tensor):
    """The ONNX program of `classifier` for any batch size of 1 or more."""
    from onnx_scan import TRANSLATIONS  # here, because onnxscript is optional
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                classifier, (images,), dynamo=True, verbose=False, input_names=["images"],
                output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=TRANSLATIONS)
    except Exception as error:  # the exporter has dozens of ways to say that it cannot
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"PyTorch {torch.__version__} cannot export this model ({type(error).__name__}: "
                        f"{reason}); another version of torch or onnxscript may") from error


def _onnx_runtime(path: Path) -> Callable[[Tensor], Tensor]:
    """Images → logits, by ONNX Runtime on the CPU, with as many threads as PyTorch uses."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
