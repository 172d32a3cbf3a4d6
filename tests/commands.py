"""Scripts called as commands: what they leave, and a script that does something before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


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
