"""report.py: one file that needs nothing else."""

from __future__ import annotations

import re

import pytest
from PIL import Image

import report
from errors import UserError


def test_everything_is_inside_the_file(tmp_path):
    Image.new("L", (9, 9), 99).save(tmp_path / "a.png")
    path = tmp_path / "new" / "report.html"
    report.write(path, "<run> & co", "about", [("accuracy", "99%")],
                 [("Maps", "a < b", [tmp_path / "a.png"]), ("Empty", "nothing", [])])
    page = path.read_text(encoding="utf-8")
    assert "&lt;run&gt; &amp; co" in page and "a &lt; b" in page and "99%" in page
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_picture_is_one_line_and_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UserError, match="cannot write"):
        report.write(path, "t", "a", [], [("Maps", "", [tmp_path / "absent.png"])])
    assert path.read_text() == "old"
