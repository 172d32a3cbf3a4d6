"""errors.py: what a person can mend is one line and a status; what only a programmer can mend stays loud."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from errors import UserError, run_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # set back after each test


def raising(error: BaseException):
    def main() -> None:
        raise error
    return main


@pytest.mark.parametrize(("error", "status", "line"), [
    (UserError("cause;\n  mend"), 2, "error: cause; mend"),
    (UserError("there is no \x1b[31ma.png"), 2, "error: there is no ?[31ma.png"),
    (OSError(errno.ENOSPC, "No space left"), 2, "error: the disk is full"),
    (MemoryError(), 2, "error: the memory is full"),
    (RuntimeError("CUDA out of memory. Tried\nto allocate"), 2, "error: the memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: the memory is full"),
    (RuntimeError("Failed to find C compiler. Please specify"), 2, "error: Triton finds no C compiler"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_what_a_person_can_mend_is_one_line(error, status, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(raising(error))
    written = capsys.readouterr()
    assert ended.value.code == status and written.out == ""
    assert written.err.startswith(line) and written.err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a"), RuntimeError("shapes"), OSError(errno.ENOENT, "b")])
def test_a_programmers_mistake_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_script(raising(error))


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("main", ["lambda: print('x' * 10**6)", "lambda: print('x')",
                                  "lambda: (print('x'), sys.exit(0))"])
def test_a_reader_that_has_gone_ends_it_quietly(main):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", f"import sys; from errors import *; run_script({main})"],
                          cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_ctrl_c_during_imports_is_one_line():
    done = subprocess.run([sys.executable, "-c", "import errors; raise KeyboardInterrupt"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == "interrupted\n" and done.returncode != 0
