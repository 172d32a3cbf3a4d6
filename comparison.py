"""Trained models side by side: accuracy, time, memory and confusion matrices; and what others would cost.

    written = compare([TrainedModel(...), TrainedModel(...)], Path("runs") / "comparison")
    rates = rates_of_others(config, shape, device)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import evaluate
import figures
from baselines import ARCHITECTURES, matched_config
from errors import UserError, printable
from trained import TrainedModel

BATCH = 64  # of the pass whose memory is compared


@torch.inference_mode()
def compare(models: list[TrainedModel], folder: Path) -> list[Path]:
    """Test and measure each model; prints a table, writes comparison.png and comparison.json into `folder`.

    Raises UserError where the models are not of the same classes.
    """
    first = models[0]
    for model in models[1:]:
        if model.classes != first.classes or model.dataset_name != first.dataset_name:
            raise UserError(f"{model.path} was trained on {model.dataset_name} and {first.path} on "
                            f"{first.dataset_name}; compare runs of one dataset")
    names = {model.path: model.run_name for model in models}
    if len(set(names.values())) < len(names):  # files of one name in several folders
        names = {path: printable(path) for path in names}
    rows, predictions = [], []
    for model in models:
        labels = model.dataset.test.labels
        predicted = evaluate.predict(model.model, model.dataset.test, model.dataset, model.device).argmax(1)
        costs = evaluate.measure(model.model, model.shape, model.device)
        images = torch.zeros(BATCH, *model.shape, device=model.device)
        rows.append({"run": names[model.path], "checkpoint": str(model.path),
                     "architecture": model.architecture, "epoch": model.epoch,
                     "accuracy": (predicted == labels).double().mean().item(),
                     **{key: costs[key] for key in ("parameters", "multiply_adds", "latency_ms",
                                                    "images_per_second")},
                     "memory_mib": evaluate.peak_mib(lambda: model.model(images), model.device)})  # noqa: B023
        predictions.append(predicted)
    table = [("", [row["run"] for row in rows]),
             ("architecture", [row["architecture"] for row in rows]),
             ("test accuracy", [f"{row['accuracy']:.2%}" for row in rows]),
             ("parameters", [f"{row['parameters']:,}" for row in rows]),
             ("multiply-adds per image", [f"{row['multiply_adds'] / 1e6:,.2f} million" for row in rows]),
             ("latency, batch 1", [f"{row['latency_ms']:,.2f} ms" for row in rows]),
             *((f"images/s, batch {batch:,}", [f"{row['images_per_second'][batch]:,.0f}" for row in rows])
               for batch in rows[0]["images_per_second"]),
             (f"memory, batch {BATCH}", [f"{row['memory_mib']:,.1f} MiB" for row in rows])]
    width = max(len(cell) for _, cells in table for cell in cells) + 3
    for name, cells in table:
        print(f"{name:<26}" + "".join(f"{cell:>{width}}" for cell in cells))
    subtitle = (f"{first.dataset_name}, {len(labels):,} test images; {evaluate.device_name(first.device)}, "
                "float32")
    figures.save(figures.comparison(table, labels, predictions, first.classes, subtitle),
                 folder / "comparison.png")
    try:
        (folder / "comparison.json").write_text(json.dumps(
            {"device": evaluate.device_name(first.device), "torch": torch.__version__, "dataset":
             first.dataset_name, "models": rows}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another --runs-dir") from error
    return [folder / "comparison.png", folder / "comparison.json"]


def rates_of_others(architecture: str, config: dict, shape: tuple[int, int, int],
                    device: torch.device) -> dict[str, dict[int, float]]:
    """Images/s by batch size of untrained models of the other architectures, as large as a mamba of `config`.

    Weights change no times. Nothing is returned for another architecture than mamba, whose config says less.
    """
    if architecture != "mamba":
        return {}
    return {other: evaluate.images_per_second(ARCHITECTURES[other](**matched_config(other, config))
                                              .to(device).eval(), shape, device)
            for other in ARCHITECTURES if other != "mamba"}
