"""Mistakes that a person can mend, told in one line.

A module raises `UserError("cause; mend")`. A script runs its main function through
`run_script`, which prints that line on stderr and ends with exit status 2, so that a wrong
command never shows a traceback and never looks like success to a shell.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

# What a file's name, or whose it is, can make a system say.
UNUSABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
            errno.EROFS)

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """The cause and the mend of a mistake, in one line, for the person who made it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line as a `UserError`, and defaults in --help."""

    def __init__(self, description: str, epilog: str | None = None) -> None:
        super().__init__(description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python {self.prog} --help")


def as_flag(name: str) -> str:
    """How the argument `name` is typed: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def printable(name: object) -> str:
    """A name for people: what would break the line, move a terminal's cursor or be no text becomes a ?."""
    return UNPRINTABLE.sub("?", str(name))


def one_line(message: object) -> str:
    """What is told to people, in a line of its own."""
    return printable(" ".join(str(message).split()))


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of "64" or "64x96"."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 1 <= int(side) <= 8192 for side in sides):
        raise argparse.ArgumentTypeError(f"must be pixels such as 64 or 64x96 (height, width), "
                                         f"but is {text!r}")
    return int(sides[0]), int(sides[-1])


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; what a person can mend becomes one line on stderr.

    Exit status 2: a `UserError`, a file that cannot be used, a full disk or memory, no C compiler for Triton.
    130: Ctrl-C. 141, without a word: the reader of the output has gone, as in `python train_mamba.py | head`.
    """
    threading.excepthook = _thread_failed
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # one without × or ✗ is no reason to stop
                stream.reconfigure(errors="replace")
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush into it again
        sys.exit(141)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"the disk is full ({error}); free space and go on with --resume, or write to another disk")
        if error.filename is None or error.errno not in UNUSABLE:
            raise
        names = " or ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        _fail(f"cannot read or write {names}: {error.strerror}; check its name and permissions")
    except (MemoryError, RuntimeError) as error:  # PyTorch has a RuntimeError for each device
        if "Failed to find C compiler" in str(error):
            _fail("Triton finds no C compiler, needed once on a GPU; install gcc and Python's headers, "
                  "name one by CC, or use --device cpu")
        if not is_out_of_memory(error):
            raise
        _fail(f"the memory is full ({str(error)[:160]}); close other programs, or make batch, images or "
              "model smaller")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a device was too small."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")))


def _fail(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") != "0":
        # Where all processes fail alike the first one tells, and torchrun ends the others; on a busy machine
        # it may come seconds after them.
        time.sleep(10)
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer thread hands a full disk on to the main thread, where it becomes one line."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _interrupted(kind: type[BaseException], error: BaseException, trace) -> None:
    """Ctrl-C while a script still imports its modules: one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupted
