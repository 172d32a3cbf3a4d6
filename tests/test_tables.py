"""No figure in a README differs from the file that a command wrote; English and Vietnamese are in step."""

from __future__ import annotations

import re

import pytest

from benchmarks import tables

ENGLISH, VIETNAMESE = (tables.ROOT / name for name in ("README.md", "README.vi.md"))
PROGRAMS = ("python", "pip", "tensorboard", "torchrun", "source", ".venv", "from")


def test_the_tables_are_what_the_result_files_say():
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(page, text) == text, f"{page.name}: run python benchmarks/tables.py"
        assert "<!-- table" in text


def commands(text: str) -> list[str]:
    """Every command and every word of code, in order; what stands behind # in a command is a comment."""
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.S | re.M)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```\n.*?^```", "", text, flags=re.S | re.M))
    return [line for line in lines if line.startswith(PROGRAMS)] + spans


def numbers(text: str) -> list[str]:
    """Every number, in order: measured ones, defaults, years, sizes."""
    return re.findall(r"\d[\d,.]*\d|\d", text)


@pytest.mark.parametrize("found", [
    commands, numbers,
    lambda text: re.findall(r"\]\((?!README|#)([^)]+)\)", text),   # pictures and links
    lambda text: re.findall(r"<!-- table (\S+) -->", text),
    lambda text: [len(heading) for heading in re.findall(r"^(#+) ", text, flags=re.M)],
    lambda text: [line.count("|") for line in text.splitlines() if line.startswith("|")],
], ids=["commands", "numbers", "pictures and links", "tables", "headings", "rows"])
def test_the_vietnamese_page_is_in_step_with_the_english_one(found):
    english, vietnamese = (sorted(found(page.read_text(encoding="utf-8")), key=str)
                           for page in (ENGLISH, VIETNAMESE))
    only = {"README.md": [item for item in english if item not in vietnamese],
            "README.vi.md": [item for item in vietnamese if item not in english]}
    assert english == vietnamese, f"only in one of them: {only}"
