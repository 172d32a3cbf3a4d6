"""No figure in a README differs from the file that a command wrote."""

from benchmarks import tables


def test_the_tables_are_what_the_result_files_say():
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text) == text, f"{page.name}: run python benchmarks/tables.py"
        assert "<!-- table" in text
