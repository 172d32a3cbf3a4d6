"""checkpoint.py: saved whole or not at all, and no file, however damaged or hostile, does harm."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import checkpoint
from errors import UserError

ROOT = Path(__file__).parent.parent

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


def mounted(folder: Path, options: str) -> Iterator[Path]:
    """`folder` as a file system of its own, in memory, where this machine lets us mount one."""
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=64k")


@pytest.fixture
def read_only_disk(tmp_path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "ro")


def test_a_full_disk_leaves_the_checkpoint_that_was_there(small_disk):
    path = small_disk / "a.pt"
    checkpoint.save(path, CONTENTS)  # about 25 KB of 64
    with pytest.raises(UserError, match=r"cannot write checkpoint .*a.pt: .*; free space"):
        checkpoint.save(path, {**CONTENTS, "metrics": {"filler": torch.zeros(50_000)}})
    assert [file.name for file in small_disk.iterdir()] == ["a.pt"]
    assert same(checkpoint.load(path))


def test_a_read_only_disk_is_told_in_one_line(read_only_disk):
    with pytest.raises(UserError, match="choose another --checkpoints-dir"):
        checkpoint.save(read_only_disk / "runs" / "a.pt", CONTENTS)
    assert list(read_only_disk.iterdir()) == []


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write")
def test_a_folder_without_permission_is_told_in_one_line(saved):
    saved.parent.chmod(0o500)
    try:
        with pytest.raises(UserError, match="choose another --checkpoints-dir"):
            checkpoint.save(saved, {**CONTENTS, "epoch": 4})
        assert same(checkpoint.load(saved))
    finally:
        saved.parent.chmod(0o700)


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --checkpoints-dir"):
        checkpoint.save(tmp_path / "file" / "a.pt", CONTENTS)


SAVE_ON_AND_ON = """
import sys, itertools, pathlib, torch, checkpoint
contents = eval(sys.argv[2])
sys.stdin.readline() or sys.exit()
for epoch in itertools.count():
    weight = torch.full((200_000,), float(epoch))
    checkpoint.save(pathlib.Path(sys.argv[1]), {**contents, "model": {"weight": weight}, "epoch": epoch},
                    keep_previous=True)
    print(epoch, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX")
def test_a_kill_during_the_write_leaves_a_whole_checkpoint(tmp_path, seed):
    """Three processes that do nothing but save, one after another, each killed at a random moment."""
    path, moments = tmp_path / "a.last.pt", random.Random(seed)
    plain = repr({key: value for key, value in CONTENTS.items() if key != "model"})
    processes = [subprocess.Popen([sys.executable, "-c", SAVE_ON_AND_ON, str(path), plain], cwd=ROOT,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                 for _ in range(3)]  # at once, for their imports
    for process in processes:
        with process:
            process.stdin.write("\n")
            process.stdin.flush()
            for _ in range(3):
                told = int(process.stdout.readline())
            time.sleep(moments.random() / 20)
            process.kill()
            told = int(([told, *process.stdout.read().split()])[-1])
        contents = checkpoint.load_good(path)
        assert contents["epoch"] >= told, "a save that was told of is lost"
        assert (contents["model"]["weight"] == contents["epoch"]).all()
        allowed = {"a.last.pt", "a.last.pt.previous", ".a.last.pt.writing"}
        assert {file.name for file in tmp_path.iterdir()} <= allowed
    checkpoint.save(path, CONTENTS)
    assert not (tmp_path / ".a.last.pt.writing").exists(), "what a kill leaves is gone after the next save"


# ---- The checkpoint before


def test_the_one_before_is_kept_where_asked_for(tmp_path):
    path = tmp_path / "a.last.pt"
    for epoch in range(4):
        checkpoint.save(path, {**CONTENTS, "epoch": epoch}, keep_previous=True)
    assert checkpoint.load(path)["epoch"] == 3
    assert checkpoint.load(checkpoint.previous(path))["epoch"] == 2


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(b"X" + path.read_bytes()[1:])], ids=["missing", "empty", "cut", "flipped"])
def test_the_one_before_takes_the_place_of_a_damaged_one_with_a_line(spoil, tmp_path, capsys):
    path = tmp_path / "a.last.pt"
    for epoch in (3, 4):
        checkpoint.save(path, {**CONTENTS, "epoch": epoch}, keep_previous=True)
    spoil(path)
    assert checkpoint.newest(tmp_path, unfinished=True) == path
    assert same(checkpoint.load_good(path))
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == ""
    assert str(path) in said.err and f"going on from the one before, {path}.previous" in said.err


def test_two_damaged_ones_are_an_error_about_the_first(tmp_path):
    path = tmp_path / "a.last.pt"
    for epoch in (3, 4):
        checkpoint.save(path, {**CONTENTS, "epoch": epoch}, keep_previous=True)
    for file in (path, checkpoint.previous(path)):
        file.write_bytes(file.read_bytes()[:-70])
    with pytest.raises(UserError, match=r"a\.last\.pt is not a checkpoint of this version or is damaged"):
        checkpoint.load_good(path)


# ---- Files that are none of ours


@pytest.fixture
def nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a damaged file was loaded"))


def test_every_random_truncation_is_seen_before_anything_is_loaded(saved, seed, nothing_is_loaded):
    whole, places = saved.read_bytes(), random.Random(seed)
    lengths = {0, 1, 64, 65, 66, len(whole) - 1, *(places.randrange(len(whole)) for _ in range(500))}
    for length in lengths:
        saved.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(saved)


def test_every_random_bit_flip_is_seen_before_anything_is_loaded(saved, seed, nothing_is_loaded):
    whole, places = saved.read_bytes(), random.Random(seed)
    for bit in [0, 8 * len(whole) - 1, *(places.randrange(8 * len(whole)) for _ in range(1000)),
                *range(8 * (len(whole) - checkpoint.SEAL_SIZE - 30), 8 * len(whole), 3)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(saved)


def sealed(content: bytes, number: int = checkpoint.FORMAT) -> bytes:
    """`content` with the right checksum: what someone makes who knows the format."""
    content += checkpoint.SEAL % number
    return content + hashlib.sha256(content).hexdigest().encode() + b"\n"


@settings(max_examples=200)
@given(content=st.binary(max_size=400), seal=st.booleans())
@example(content=b"", seal=True)
@example(content=pickle.dumps({"format": 2}), seal=True)
def test_any_bytes_are_refused_in_one_line(content, seal, tmp_path):
    (tmp_path / "a.pt").write_bytes(sealed(content) if seal else content)
    with pytest.raises(UserError, match="is not a checkpoint of this") as caught:
        checkpoint.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


@settings(max_examples=300)
@given(damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
                       min_size=1, max_size=4), cut=st.floats(0.5, 1))
def test_a_checkpoint_changed_by_someone_who_mends_its_checksum_does_no_harm(damage, cut, tmp_path):
    """What zip and pickle readers make of it: refused in one line, or read as plain values."""
    checkpoint.save(tmp_path / "small.pt", {**CONTENTS, "model": {"weight": torch.arange(9.0)}})
    content = bytearray((tmp_path / "small.pt").read_bytes()[:-checkpoint.SEAL_SIZE])
    content = content[:max(8, int(cut * len(content)))] if cut < 0.9 else content
    for place, value in damage:
        start = int(place * len(content))
        content[start:start + len(value)] = value
    (tmp_path / "a.pt").write_bytes(sealed(bytes(content)))
    try:
        contents = checkpoint.load(tmp_path / "a.pt")
    except UserError as error:
        assert "\n" not in str(error) and "; " in str(error)
    else:
        assert contents.keys() >= set(checkpoint.REQUIRED)


@pytest.mark.parametrize("contents", [
    b"", b"text", pickle.dumps({"format": 2}), pickle.dumps(CONTENTS["epoch"])], ids=str)
def test_a_foreign_file_is_refused(contents, tmp_path):
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")


def test_what_torch_save_alone_writes_is_refused(tmp_path):
    torch.save({**CONTENTS, "format": 2}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")


def save_sealed(contents: object, path: Path) -> None:
    torch.save(contents, path)
    path.write_bytes(sealed(path.read_bytes()))


@pytest.mark.parametrize("contents", [
    [1, 2], torch.ones(3), {}, {"weight": torch.ones(3)}, {**CONTENTS, "format": 2, "settings": 7},
    {**CONTENTS, "format": 2, "epoch": "3"},
    *({key: value for key, value in {**CONTENTS, "format": 2}.items() if key != missing}
      for missing in checkpoint.REQUIRED)], ids=str)
def test_a_foreign_checkpoint_is_refused(contents, tmp_path):
    save_sealed(contents, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "a.pt")


def test_another_format_is_refused_by_its_number(tmp_path):
    (tmp_path / "a.pt").write_bytes(sealed(b"of the future", 7))
    with pytest.raises(UserError, match="checkpoint format 7, this version reads 2"):
        checkpoint.load(tmp_path / "a.pt")


class Hostile:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def save_raw(contents: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(contents))


def save_raw_sealed(contents: dict, path: Path) -> None:
    path.write_bytes(sealed(pickle.dumps(contents)))


@pytest.mark.parametrize("write", [torch.save, save_raw, save_sealed, save_raw_sealed])
def test_code_in_a_file_does_not_run(write, tmp_path):
    write({**CONTENTS, "format": 2, "metrics": Hostile(tmp_path / "harm")}, tmp_path / "a.pt")
    says = "nothing in it was run" if write in (save_sealed, save_raw_sealed) else "not a checkpoint"
    with pytest.raises(UserError, match=says):
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
    for name in ("folder.pt", "folder.last.pt"):
        (tmp_path / name).mkdir()
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


def test_json_is_written_whole_or_refused_in_one_line(tmp_path):
    checkpoint.save_json(tmp_path / "new" / "a.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save_json(tmp_path / "file" / "a.json", {})
