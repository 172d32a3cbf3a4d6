"""benchmarks/timing.py: where a benchmark may write."""

from __future__ import annotations

import argparse
import os

import pytest

from benchmarks import timing


def test_an_output_file_is_one_that_may_be_replaced(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert timing.output_file(str(tmp_path / "link.json")).name == "real.json"
    assert timing.output_file(str(tmp_path / "new" / "a.json")).name == "a.json"
    for wrong in (os.devnull, str(tmp_path)):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
            timing.output_file(wrong)
