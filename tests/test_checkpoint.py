"""checkpoint.py: saved whole or not at all, and no file, however damaged or hostile, does harm."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from errors import UserError

CONTENTS = {"architecture": "mamba", "config": {"d_model": 8}, "model": {"weight": torch.arange(5000.0)},
            "dataset": {"name": "digits"}, "epoch": 3, "metrics": {"val_accuracy": 0.5},
            "settings": {"lr": 1e-3, "run_name": "a"}}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "runs" / "a.pt"
    checkpoint.save(path, CONTENTS)
    return path


def same(contents: dict) -> bool:
    return torch.equal(contents["model"]["weight"], CONTENTS["model"]["weight"]) and all(
        contents[key] == value for key, value in CONTENTS.items() if key != "model")


def test_what_was_saved_comes_back_and_only_plain_values_are_needed(saved):
    assert same(checkpoint.load(saved))
    assert same(torch.load(saved, weights_only=True))
    assert [path.name for path in saved.parent.iterdir()] == ["a.pt"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_a_checkpoint_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        checkpoint.save(tmp_path / "a.pt", CONTENTS)
    finally:
        os.umask(before)
    assert (tmp_path / "a.pt").stat().st_mode & 0o777 == 0o644


# ---- A save that fails


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64"),
                                   KeyboardInterrupt()])
def test_a_failing_save_leaves_the_file_that_was_there(error, saved, monkeypatch):
    def save_half(contents, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        checkpoint.save(saved, {**CONTENTS, "epoch": 4})
    assert [path.name for path in saved.parent.iterdir()] == ["a.pt"]
    assert same(checkpoint.load(saved))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize("limit", [0, 1000, 15000])
def test_a_disk_that_gets_full_is_told_in_one_line(limit, saved):
    import resource  # POSIX only

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write checkpoint"):
            checkpoint.save(saved, {**CONTENTS, "epoch": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in saved.parent.iterdir()] == ["a.pt"]
    assert same(checkpoint.load(saved))


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --checkpoints-dir"):
        checkpoint.save(tmp_path / "file" / "a.pt", CONTENTS)


# ---- Files that are none of ours


@pytest.mark.parametrize("part", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(part, saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(saved)


def test_a_flipped_bit_is_refused_or_harmless(saved):
    whole = saved.read_bytes()
    refused = 0
    places = range(0, len(whole), len(whole) // 199)
    for place in places:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        try:
            assert same(checkpoint.load(saved)), f"byte {place} changed the contents unnoticed"
        except UserError:
            refused += 1
    assert refused > 0.8 * len(places)


@pytest.mark.parametrize("contents", [
    b"", b"text", pickle.dumps({"format": 1}), pickle.dumps(CONTENTS["epoch"])], ids=str)
def test_a_foreign_file_is_refused(contents, tmp_path):
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("contents", [
    [1, 2], torch.ones(3), {}, {"weight": torch.ones(3)}, {**CONTENTS, "format": 1, "settings": 7},
    {**CONTENTS, "format": 1, "epoch": "3"},
    *({key: value for key, value in {**CONTENTS, "format": 1}.items() if key != missing}
      for missing in checkpoint.REQUIRED)], ids=str)
def test_a_foreign_checkpoint_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "a.pt")


def test_another_format_is_refused_by_its_number(tmp_path):
    torch.save({**CONTENTS, "format": 2}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="checkpoint format 2, this version reads 1"):
        checkpoint.load(tmp_path / "a.pt")


class Hostile:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def save_raw(contents: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(contents))


@pytest.mark.parametrize("write", [torch.save, save_raw])
def test_code_in_a_file_does_not_run(write, tmp_path):
    write({**CONTENTS, "format": 1, "metrics": Hostile(tmp_path / "harm")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "a.pt", tmp_path):
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoint.load(path)


# ---- Names


def test_newest_is_the_file_changed_last_of_its_kind(tmp_path):
    for age, name in enumerate([".hidden.pt", "b.last.pt", "b.pt", "a.last.pt", "a.pt", "notes.txt"]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert checkpoint.newest(tmp_path).name == "b.pt"
    assert checkpoint.newest(tmp_path, unfinished=True).name == "b.last.pt"


@pytest.mark.parametrize("unfinished", [False, True])
def test_newest_of_none_says_what_to_do(unfinished, tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="train one with"):
            checkpoint.newest(folder, unfinished)


def test_run_names():
    for name in ("mnist-20260101-120000", "a", "lr=1e-3, wd 0.1", "größe_2", "v1.2"):
        assert checkpoint.is_run_name(name), name
    for name in ("", ".", "..", ".a", "a/b", "../a", "a\\b", "a\nb", "a ", "a.", "a.last", "-a", "a" * 201,
                 "C:a", "ß" * 101, "a\n"):
        assert not checkpoint.is_run_name(name), name
