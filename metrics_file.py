"""metrics.jsonl, what a run tells programs of its epochs: one JSON object a line.

Of each: epoch (from 1), train_loss, train_accuracy, val_loss, val_accuracy, test_accuracy (fractions; null
where --train-on-all leaves them out), learning_rate (of the last step), of its training images_per_second and
seconds, and evaluation_seconds, which are not in those.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from errors import UserError

NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict]:
    """The metrics of the epochs that the run in `folder` has finished.

    A line cut short by a kill, or still being written, is left out. Raises UserError where the file cannot be
    read.
    """
    path = folder / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path} ({error}); delete that run, or choose another name") from error
    return [json.loads(line) for line in lines if line.endswith("\n") and epoch_of(line) < math.inf]


def epoch_of(line: str) -> float:
    """Whose epoch's metrics a line holds; infinity for what is no such line."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf
