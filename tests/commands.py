"""Scripts called as commands: what they leave, and a script that does something before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

# For `patched`: no pictures for TensorBoard, which take longer than runs as short as the tests', nor the
# import of what draws.
LIGHT = """
import types

for name in ("figures", "scan_figures"):
    sys.modules[name] = types.ModuleType(name)
from run_log import RunLog

RunLog.draws = lambda *_, **__: False
"""


class Ended(NamedTuple):
    """What a command leaves."""

    status: int
    out: str
    err: str


def patched(place: Path, code: str, script: str = "train_mamba.py") -> Path:
    """A file in `place` that does `code`, and then what `script` does.

    So a command can be stopped at a moment that the test chooses, however busy the machine is.
    """
    path = place / "patched.py"
    path.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cpu_settings\n{code}\n"
                    f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n", encoding="utf-8")
    return path
