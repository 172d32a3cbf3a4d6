"""export.py: the ONNX file computes what the model computes, for any batch."""

from __future__ import annotations

import json

import pytest
import torch

import checkpoint
import data
import export
from baselines import VisionTransformer
from errors import UserError
from mamba_ssm_simple import VisionMamba2, _pixel_order
from trained import TrainedModel

CONFIG = {"d_model": 16, "num_blocks": 2, "patch_size": 2, "d_state": 4}


def trained(tmp_path, architecture: str = "mamba", **changes) -> TrainedModel:
    config = CONFIG | changes
    kinds = {"mamba": VisionMamba2, "transformer": VisionTransformer}
    entry = data.DATASETS["digits"]
    path = tmp_path / "tiny.pt"
    checkpoint.save(path, {
        "architecture": architecture, "config": config, "model": kinds[architecture](**config).state_dict(),
        "dataset": {"name": "digits", "classes": list(entry.classes), "mean": list(entry.mean),
                    "std": list(entry.std)},
        "epoch": 0, "metrics": {}, "settings": {"run_name": "tiny"}})
    return TrainedModel(path, torch.device("cpu"), tmp_path, tmp_path)


@pytest.mark.parametrize("changes", [{"scan": "row", "bidirectional": True}, {"scan": "cross"}])
def test_the_onnx_model_equals_pytorch_for_any_batch(changes, tmp_path, seed):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = trained(tmp_path, **changes), tmp_path / "model.onnx"
    lines = export.export(model, path)
    assert "MiB" in lines[0] and "largest difference" in lines[1] and "ONNX Runtime" in lines[2]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5, 64):
        images = torch.randint(0, 256, (batch, 1, 8, 8), dtype=torch.uint8)
        logits, = session.run(None, {"images": (images / 255).numpy()})
        assert abs(torch.from_numpy(logits) - model.logits(images)).max() < export.TOLERANCE
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "tiny.pt"]


def test_a_random_order_first_asked_for_by_the_export_is_real(tmp_path, seed):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(tmp_path, patch_size=1, scan="raster", permute_seed=5)
    expected = model.logits(images := torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8))
    _pixel_order.cache_clear()
    export.export(model, tmp_path / "model.onnx")
    assert torch.equal(model.logits(images), expected)


def test_a_model_that_differs_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differ from PyTorch's"):
        export.export(trained(tmp_path), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_wrong_commands(tmp_path, monkeypatch):
    (tmp_path / "taken.onnx").write_text("precious")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name, says in (("model.pt", "does not end in .onnx"), ("taken.onnx", "exists"),
                       ("absent/model.onnx", "there is no folder")):
        with pytest.raises(UserError, match=says):
            export.check(tmp_path / name)
    assert (tmp_path / "taken.onnx").read_text() == "precious"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime; run: pip install"):
        export.check(tmp_path / "model.onnx")
