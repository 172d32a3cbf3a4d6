"""No table of a README differs from the file that a command wrote; English and Vietnamese are in step."""

from __future__ import annotations

import json
import re

import pytest

import checkpoint
from benchmarks import tables
from errors import UserError
from flags import MAY_CHANGE_ON_RESUME, fill_in, is_off, parse_arguments

ENGLISH, VIETNAMESE = (tables.ROOT / name for name in ("README.md", "README.vi.md"))
PROGRAMS = ("python", "pip", "tensorboard", "torchrun", "source", ".venv", "from")


def test_the_tables_are_what_the_result_files_say():
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(page, text) == text, f"{page.name}: run python benchmarks/tables.py"
        assert "<!-- table" in text


MACHINE = {"gpu": "GPU", "torch": "2"}


def settings_of(flags: str) -> dict:
    """Those that a results file tells of runs with these flags."""
    settings = parse_arguments(flags.split())
    fill_in(settings)
    return {name: value for name, value in vars(settings).items()
            if name not in MAY_CHANGE_ON_RESUME | {"seed", "run_name"}}


def test_presets_that_were_measured_have_a_row_in_a_fixed_order(tmp_path, monkeypatch):
    page = "<!-- table accuracy -->\n\n<!-- end -->"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.accuracies() == "None is measured yet."
    assert "Chưa đo preset nào." in tables.fill(VIETNAMESE, page)
    (tmp_path / "results").mkdir()
    runs = [{"nan": False, "training_seconds": seconds} for seconds in (1000, 1300)]
    settings = settings_of("--preset tiny --train-on-all")
    about = {"parameters": 12345, "nan_runs": 0, "jobs": 1, "machine": MACHINE, "runs": runs,
             "arguments": ["--preset", "tiny", "--train-on-all"], "settings": settings,
             "test_accuracy": {"mean": 0.99123, "std": 0.00049}}
    for preset, changes in {
            "default": {"runs": runs[:1], "test_accuracy": {"mean": 0.99, "std": None}},
            "gpu": {"nan_runs": 1, "jobs": 5, "runs": [*runs, {"nan": True, "training_seconds": 9}]},
            "tiny": {"runs": [runs[0] | {"machine": {"gpu": "older GPU", "torch": "1"}}, runs[1]]},
            "smnist": {"runs": [], "nan_runs": 2, "test_accuracy": {"mean": None, "std": None},
                       "settings": settings | {"lr": 0.5, "ema": 0.0}},
            "other": {}}.items():
        (tmp_path / "results" / f"accuracy-{preset}.json").write_text(json.dumps(about | changes))
    assert tables.accuracies().splitlines()[2:] == [
        "| `--preset tiny --train-on-all` | MNIST, at most 0.1 million parameters | 12,345 | 99.12 ± 0.05 % "
        "(2 seeds) | 1,300 s | GPU; PyTorch 2 / older GPU; PyTorch 1 |",
        "| `--preset tiny --train-on-all --lr 0.5 --ema 0.0` | MNIST, pixel by pixel | 12,345 | – (0 seeds, "
        "2 more ended in NaN) | – | GPU; PyTorch 2 |",
        "| `--preset tiny --train-on-all` | MNIST, on a GPU | 12,345 | 99.12 ± 0.05 % (2 seeds, 1 more ended "
        "in NaN) | 1,150 s, 5 at once | GPU; PyTorch 2 |",
        "| `--preset tiny --train-on-all` | MNIST, on a laptop's CPU | 12,345 | 99.00 % (1 seed) | 1,000 s "
        "| GPU; PyTorch 2 |"]
    translated = tables.fill(VIETNAMESE, page)
    assert "99.12 ± 0.05 % (2 hạt giống, 1 nữa kết thúc bằng NaN) | 1,150 s, 5 cùng lúc" in translated
    assert "nhiều nhất 0.1 triệu tham số" in translated and "seed" not in translated


def test_the_flags_of_a_row_give_the_settings_that_were_measured():
    measured = 0
    for file in (tables.ROOT / "results").glob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        if "settings" in found and "arguments" in found:
            flags_now = vars(parse_arguments([]))
            saved = {name: tuple(value) if isinstance(value, list) else value
                     for name, value in found["settings"].items() if name in flags_now or not is_off(value)}
            flags = " ".join(tables.flags_today(found["settings"], found["arguments"]))
            assert settings_of(flags).items() >= saved.items(), file.name
            measured += 1
    assert measured > 3


def test_settings_that_no_flag_gives_beside_a_preset():
    saved = settings_of("--preset smnist") | {"preset": "gone", "warm_up": None}
    assert saved["permute_seed"] is None and "--preset psmnist" not in " ".join(tables.shortest_flags(saved))
    with pytest.raises(UserError, match="what ran without permute_seed cannot be said by --preset psmnist"):
        tables.flags_today(saved, ["--preset", "psmnist"])


def test_the_shipped_model_is_named_with_the_command_that_made_it():
    contents = checkpoint.load(tables.SHIPPED)
    made_by = re.search(r"`python train_mamba.py ([^`]+)`", tables.shipped())[1]
    settings = parse_arguments(made_by.split())
    fill_in(settings)
    differing = [name for name, value in vars(parse_arguments([], contents["settings"])).items()
                 if name not in MAY_CHANGE_ON_RESUME | {"run_name", "preset"}
                 and getattr(settings, name) != value]
    assert differing == []
    assert f"| {100 * contents['metrics']['test_accuracy']:.2f} % |" in tables.shipped()


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
