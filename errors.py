"""Mistakes that a person can mend, told in one line.

A module raises `UserError("cause; mend")`. A script runs its main function through
`run_script`, which prints that line on stderr and ends with exit status 2, so that a wrong
command never shows a traceback and never looks like success to a shell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """The cause and the mend of a mistake, in one line, for the person who made it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line as a `UserError`, and defaults in --help."""

    def __init__(self, description: str, epilog: str | None = None) -> None:
        super().__init__(description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python {self.prog} --help")


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
