"""Scripts called wrongly or with wrong files: exit status 2, one line with cause and mend, nothing written.

train_mamba.py's own flags are in test_train_mamba.py, each script's rarer mistakes in its own test.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import runpy
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import checkpoint
import data
import mnist
from errors import UserError, run_script
from mamba_ssm_simple import VisionMamba2

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": "train_mamba", "tune": "tune_mamba", "demo": "demo_mamba", "check": "mamba_ssm_simple",
           "accuracy": "benchmarks.accuracy", "scan": "benchmarks.bench_scan",
           "architectures": "benchmarks.compare_architectures", "crash": "benchmarks.crash_test",
           "load": "benchmarks.load_test", "imagenet": "benchmarks.throughput_imagenet",
           "spoken": "examples.spoken_digits", "tables": "benchmarks.tables"}
CONFIG = {"num_classes": 10, "d_model": 8, "num_blocks": 1, "in_channels": 1, "patch_size": 2, "d_state": 2}


class Hostile:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def sealed(path: Path) -> None:
    """Give what torch.save wrote the right checksum, as someone can who knows the format."""
    content = path.read_bytes() + checkpoint.SEAL % checkpoint.FORMAT
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode() + b"\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint, pictures, and everything else that a command may be given by mistake."""
    place = tmp_path_factory.mktemp("place")
    entry = data.DATASETS["digits"]
    run = {"epochs": 2, "dataset": "digits", "run_name": "a", "d_model": 8}
    good = {"architecture": "mamba", "config": CONFIG, "model": VisionMamba2(**CONFIG).state_dict(),
            "dataset": {"name": "digits", "classes": list(entry.classes), "mean": list(entry.mean),
                        "std": list(entry.std)}, "epoch": 1, "metrics": {}, "settings": run}
    wrong = {
        "foreign": {"architecture": "perceptron"}, "wings": {"config": {**CONFIG, "wings": 2}},
        "wide": {"config": {**CONFIG, "d_model": 16}},
        "birds": {"dataset": {**good["dataset"], "name": "birds"}},
        "two": {"dataset": {**good["dataset"], "classes": ["0", "1"]}}, "dataless": {"dataset": 7},
        "": {}}
    for name, changes in wrong.items():
        checkpoint.save(place / f"{name}.pt", {**good, **changes})
    state = {**good, "optimizer": {}}
    for name, changes in {"many": {"epochs": "many"}, "none": {"d_model": 0}, "spiral": {"scan": "spiral"},
                          "winds": {"winds": "north"}, "maybe": {"augment": "maybe"}, "tree": {"lr": [1, 2]},
                          "away": {"run_name": "../b"}}.items():
        checkpoint.save(place / f"{name}.last.pt", {**state, "settings": {**run, **changes}})
    checkpoint.save(place / "stateless.last.pt", {**state, "settings": {**run, "run_name": "stateless"}})
    for name in ("another", "a"):
        checkpoint.save(place / f"{name}.last.pt", {**state, "epoch": 0, "run_id": "own"})
    (place / "logged" / "a").mkdir(parents=True)
    (place / "logged" / "a" / ".run").write_text("another's\n")
    for name, text in {"table": '{"trials": [{"trial": "table-lr=0.1"}]}', "damaged": "seven"}.items():
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "sweep.json").write_text(text)
    (place / "runs" / "foreign").mkdir()
    (place / "runs" / "foreign" / "sweep.csv").write_text("another's\n")
    checkpoint.save(place / "checkpoints" / "good.pt", good)
    whole = (place / "checkpoints" / "good.pt").read_bytes()
    (place / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (place / "flipped.pt").write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    torch.save({**good, "metrics": Hostile()}, place / "hostile.pt")
    sealed(place / "hostile.pt")
    (place / "pickled.pt").write_bytes(pickle.dumps(Hostile()))
    (place / "future.pt").write_bytes(b"?" + checkpoint.SEAL % 9)
    content = (place / "future.pt").read_bytes()
    (place / "future.pt").write_bytes(content + hashlib.sha256(content).hexdigest().encode() + b"\n")
    torch.save(torch.ones(3), place / "tensor.pt")
    sealed(place / "tensor.pt")
    for name in ("file", "text.png", "text.pt"):
        (place / name).write_text("seven")
    (place / "empty").mkdir()
    (place / "empty.png").write_bytes(b"")
    Image.new("L", (40, 40), 200).save(place / "even.png")
    Image.new("1", (9000, 9000)).save(place / "huge.png")
    Image.new("1", (20000, 20000)).save(place / "bomb.png")
    (place / "cut.png").write_bytes((place / "even.png").read_bytes()[:60])
    for folder, content in (("wrong", b"not MNIST"), ("packed", b"\x1f\x8b not packed")):
        raw = place / folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in mnist.MNIST_MD5:
            (raw / (name + ".gz" if folder == "packed" else name)).write_bytes(content)
    return place


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for folder in folders
            for path in folder.rglob("*")}


RESUMED = "do not fit this version"
LONG = "a" * 300
CASES = [  # (script, arguments, what the line says)
    ("train", "--resume cut.pt", "is not a checkpoint of this version or is damaged"),
    ("train", "--resume flipped.pt", "its checksum is wrong"),
    ("train", "--resume hostile.pt", "nothing in it was run"),
    ("train", "--resume pickled.pt", "is not a checkpoint"),
    ("train", "--resume future.pt", "has checkpoint format 9, this version reads 2"),
    ("train", "--resume tensor.pt", "is not a checkpoint of this project"),
    ("train", "--resume text.pt", "is not a checkpoint"),
    ("train", "--resume empty", "no checkpoint at empty"),
    ("train", "--resume foreign.pt", "resume a .last.pt"),
    ("train", "--resume --checkpoints-dir empty", "no .last.pt checkpoint in empty"),
    ("train", "--resume --checkpoints-dir file", "no .last.pt checkpoint in file"),
    ("train", "--resume many.last.pt", f"{RESUMED}: argument --epochs"),
    ("train", "--resume none.last.pt", f"{RESUMED}: argument --d-model"),
    ("train", "--resume spiral.last.pt", f"{RESUMED}: argument --scan"),
    ("train", "--resume winds.last.pt", f"{RESUMED}: unrecognized arguments: --winds"),
    ("train", "--resume maybe.last.pt", RESUMED),
    ("train", "--resume tree.last.pt", f"{RESUMED}: argument --lr"),
    ("train", "--resume away.last.pt", "--run-name '../b'"),
    ("train", "--resume another.last.pt", "is of the run a, whose files would be written over"),
    ("train", "--resume a.last.pt --runs-dir logged", "logged/a is of another run than a.last.pt"),
    ("train", "--resume stateless.last.pt", "does not fit this version or device"),
    ("train", "--resume stateless.last.pt --d-model 16", "a resumed run keeps its settings"),
    ("train", "--resume stateless.last.pt --device toaster", "--device: invalid choice"),
    ("train", "--dataset mnist --data-dir wrong", "has the wrong checksum"),
    ("train", "--dataset mnist --data-dir packed", "cannot read"),
    ("train", "--dataset mnist --data-dir file", "choose another data folder"),
    ("demo", "--checkpoint nowhere.pt", "no checkpoint at nowhere.pt"),
    ("demo", "--checkpoint empty", "no checkpoint at empty"),
    ("demo", "--checkpoint text.pt", "is not a checkpoint"),
    ("demo", "--checkpoint cut.pt", "damaged"),
    ("demo", "--compare a b --image seven.png", "nothing else; leave --image out"),
    ("demo", "--checkpoint flipped.pt", "its checksum is wrong"),
    ("demo", "--checkpoint hostile.pt", "nothing in it was run"),
    ("demo", "--checkpoint pickled.pt", "is not a checkpoint"),
    ("demo", "--checkpoint foreign.pt", "model of kind 'perceptron'"),
    ("demo", "--checkpoint wings.pt", "do not fit this version's mamba model"),
    ("demo", "--checkpoint wide.pt", "do not fit this version's mamba model"),
    ("demo", "--checkpoint birds.pt", "train it anew"),
    ("demo", "--checkpoint two.pt", "names 2 classes"),
    ("demo", "--checkpoint dataless.pt", "train it anew"),
    ("demo", "--checkpoint .pt", "rename it"),
    ("demo", "--checkpoint", "--checkpoint: expected one argument"),
    ("demo", f"--checkpoint {LONG}.pt", "File name too long"),
    ("demo", f"--checkpoints-dir {LONG}", "File name too long"),
    ("demo", f"--image {LONG}.png", "cannot be read as a picture"),
    ("demo", f"--export {LONG}.onnx", "File name too long"),
    ("train", f"--resume {LONG}.pt", "File name too long"),
    ("train", f"--data-dir {LONG}", "File name too long"),
    ("train", f"--dataset folder --data-dir {LONG}", "File name too long"),
    ("demo", "--checkpoints-dir empty", "no .pt checkpoint in empty"),
    ("demo", "--device toaster", "--device: invalid choice"),
    ("demo", "--device mps" if not torch.backends.mps.is_available() else "--device x", "--device"),
    ("demo", "--image", "--image: expected at least one argument"),
    ("demo", "--image nowhere.png", "no picture nowhere.png"),
    ("demo", "--image empty", "no pictures in the folder empty"),
    ("demo", "--image empty.png", "empty.png cannot be read"),
    ("demo", "--image text.png", "text.png cannot be read"),
    ("demo", "--image cut.png", "cut.png cannot be read"),
    ("demo", "--image even.png", "shows no digit"),
    ("demo", "--image huge.png", "more than 64 megapixels"),
    ("demo", "--image bomb.png", "more than 64 megapixels"),
    ("demo", "--port 0", "--port: must be a number from 1"),
    ("demo", "--port 65536", "--port"),
    ("demo", "--port http", "--port"),
    ("demo", "--export model.txt", "onnx"),
    ("demo", "--export empty", "onnx"),
    ("demo", "--winds north", "unrecognized arguments: --winds"),
    ("demo", "seven.png", "unrecognized arguments: seven.png"),
    ("check", "--winds", "unrecognized arguments: --winds"),
    ("check", "north", "unrecognized arguments: north"),
    ("tune", "", "required: --grid"),
    ("tune", "--grid", "--grid: expected at least one argument"),
    ("tune", "--grid lr", "names no values; write it as lr=1e-3,2e-3"),
    ("tune", "--grid winds=1,2", "train_mamba.py has no setting 'winds'"),
    ("tune", "--grid no_augment=true", "has no setting 'no_augment'"),
    ("tune", "--grid lr=fast", "--lr: must be a number above 0"),
    ("tune", "--grid d_model=64,1.5", "--d-model: must be a whole number"),
    ("tune", "--grid scan=spiral", "--scan: invalid choice"),
    ("tune", "--grid bidirectional=maybe", "--bidirectional"),
    ("tune", "--grid lr=", "has an empty value"),
    ("tune", "--grid lr=1e-3,,2e-3", "has an empty value"),
    ("tune", "--grid lr=1e-3,0.001", "has the value 0.001 twice"),
    ("tune", "--grid weight-decay=0 weight_decay=1", "--grid has weight_decay twice"),
    ("tune", "--grid lr=1 --grid lr=2", "--grid has lr twice"),
    *(("tune", f"--grid {name}=a", "is not for a trial; leave it out")
      for name in ("run_name", "resume", "runs_dir", "checkpoints-dir", "data_dir", "profile",
                   "train_on_all", "draw", "checkpoint_every", "workers", "hold_out")),
    ("tune", "--grid lr=1 -- --lr 2", "--lr is in the grid and after --"),
    ("tune", "--grid lr=1 -- --winds north", "unrecognized arguments: --winds"),
    ("tune", "--grid lr=1 -- --epochs 0", "--epochs: must be a whole number"),
    ("tune", "--grid lr=1 -- --device toaster", "--device: invalid choice"),
    *(("tune", f"--grid lr=1 -- {flag}", "is not for a trial; leave it out after --")
      for flag in ("--run-name a", "--resume", "--profile", "--train-on-all")),
    ("tune", "--grid lr=1 -- --runs-dir file", "choose another --runs-dir"),
    ("tune", "--grid lr=1 --name ../a", "--name must be letters"),
    ("tune", "--grid lr=1 --name " + "a" * 199, "choose a shorter --name"),
    ("tune", "--grid lr=1 --jobs 0", "--jobs must be at least 1"),
    ("tune", "--grid lr=1 --jobs few", "--jobs: invalid int value"),
    ("tune", "--grid lr=1 --trials 0", "--trials must be at least 1"),
    ("tune", "--grid lr=1 --trials 2 --jobs 2", "leave --jobs out"),
    ("tune", "--grid lr=1 --name table", "has table-lr=0.1, which this grid has not, and would be replaced"),
    ("tune", "--grid lr=1 --name damaged", "no table of this version"),
    ("tune", "--grid lr=1 --name foreign", "sweep.csv is of no sweep, and would be replaced"),
    ("accuracy", "--name mnist-20-epochs -- --device cpu", "would lose 2 of its seeds"),
    ("accuracy", "--name mnist-20-epochs -- --epochs 1", "were trained with --epochs 20 and not 1"),
    ("accuracy", "--name crash_test", "no seeds in"),
    ("accuracy", "", "one of --preset and --name is required"),
    ("accuracy", "--preset huge", "--preset: invalid choice"),
    ("accuracy", "--preset best --jobs 0", "--jobs must be at least 1"),
    ("accuracy", "--preset best -- --preset tiny", "--preset behind -- is set by this script itself"),
    ("accuracy", "--preset best -- --seed 3", "--seed behind -- is set by this script itself"),
    ("accuracy", "--name a -- --resume", "--resume behind -- is set by this script itself"),
    ("accuracy", "--name a -- --epochs 0", "--epochs: must be a whole number"),
    ("accuracy", "--name a -- --winds north", "unrecognized arguments: --winds"),
    ("accuracy", "--name a north", "unrecognized arguments: north"),
    ("accuracy", "--name a --validation -- --train-on-all", "leave one out"),
    ("accuracy", "--name a -- --device cuda" if not torch.cuda.is_available() else "--name a --device x",
     "--device"),
    ("accuracy", "--name a --seeds 0", "--seeds must be at least 1"),
    ("accuracy", "--name a --seeds many", "--seeds: invalid int value"),
    ("accuracy", "--name ../a", "--name must be letters"),
    ("accuracy", "--name ''", "--name must be letters"),
    ("accuracy", "--name a --winds", "unrecognized arguments: --winds"),
    ("scan", "--device toaster", "--device: invalid choice"),
    ("scan", "--device cuda" if not torch.cuda.is_available() else "--device x", "--device"),
    ("scan", "--parts all", "--parts: invalid choice"),
    ("scan", "--shapes 1,2,3", "must be four numbers"),
    ("scan", "--shapes 1,2,3,0", "must be four numbers"),
    ("scan", "--shapes 1,2,3,four", "must be four numbers"),
    ("scan", "--shapes 9999999999,1,1,1", "must be four numbers"),
    ("scan", "--device cpu --shapes 1,2,3,4", "name another file by --output"),
    ("scan", "--device cpu --parts step", "name another file by --output"),
    ("scan", "--device cpu --parts table", "is measured on a GPU alone"),
    ("scan", "--repeats 0", "--repeats must be at least 1"),
    ("scan", "--repeats few", "--repeats: invalid int value"),
    ("scan", "--output empty", "empty cannot be written"),
    ("scan", "--output file/a.json", "cannot be written; choose another file"),
    ("architectures", "--sizes 784", "must be TOKENSxBATCH"),
    ("architectures", "--sizes 10x3", "a square number of tokens"),
    ("architectures", "--sizes 0x1", "must be TOKENSxBATCH"),
    ("architectures", "--networks perceptron", "--networks: invalid choice"),
    ("architectures", "--repeats -1", "--repeats must be at least 1"),
    ("architectures", "--output empty", "empty cannot be written"),
    ("architectures", "--device cuda --networks lstm", "name another file by --output, or add --merge"),
    ("architectures", "--device cpu --output logged/a/.run --merge", "is no file of this benchmark"),
    ("imagenet", "--device cpu --output runs/damaged/sweep.json --merge", "is no file of this benchmark"),
    ("crash", "--kills 1", "name another file by --output"),
    ("crash", "--datasets mnist --data-dir wrong --output a.json", "has the wrong checksum"),
    ("crash", "--kills 0", "--kills must be at least 1"),
    ("crash", "--kills all", "--kills: invalid int value"),
    ("crash", "--datasets cats", "--datasets: invalid choice"),
    ("crash", "--seed now", "--seed: invalid int value"),
    ("crash", "--output file/a.json", "cannot be written; choose another file"),
    ("crash", "--device toaster", "--device: invalid choice"),
    ("crash", "--device cuda" if not torch.cuda.is_available() else "--device x", "--device"),
    ("load", "--loads all", "--loads: invalid choice"),
    ("load", "--starts 5", "name another file by --output"),
    ("load", "--starts 4", "--starts must be at least 5"),
    ("load", "--starts many", "--starts: invalid int value"),
    ("load", "--classifications 0", "--classifications must be at least 5"),
    ("load", "--loads pictures --checkpoint nowhere.pt --output a.json", "no checkpoint at nowhere.pt"),
    ("load", "--loads drawings --checkpoint cut.pt --output a.json", "damaged"),
    ("load", "--output empty", "empty cannot be written"),
    ("imagenet", "--device toaster", "--device: invalid choice"),
    ("imagenet", "--device cuda" if not torch.cuda.is_available() else "--device x", "--device"),
    ("imagenet", "--device cpu --sizes 0", "--sizes must be at least 1"),
    ("imagenet", "--device cpu --sizes large", "--sizes: invalid int value"),
    ("imagenet", "--device cpu --batch-size 0", "--batch-size must be at least 1"),
    ("imagenet", "--device cpu --repeats 0", "--repeats must be at least 1"),
    ("imagenet", "--device cpu --patch-size 3", "no networks can be built with these sizes"),
    ("imagenet", "--device cpu --variants captured", "--variants captured needs --device cuda"),
    ("imagenet", "--device cpu --output file/a.json", "cannot be written; choose another file"),
    ("spoken", "--seeds 1", "name another file by --output"),
    ("spoken", "--seeds 0", "must be 1 or more"),
    ("spoken", "--steps few", "--steps: invalid int value"),
    ("spoken", "--takes -1", "must be 1 or more"),
    ("spoken", "--data-dir file", "in file nothing can be written"),
    ("spoken", "--output file/a", "file/a cannot be written"),
    ("spoken", "--winds", "unrecognized arguments: --winds"),
    ("tables", "--write", "unrecognized arguments: --write"),
    ("tables", "--check north", "unrecognized arguments: north"),
]


def assert_refused(status: int, out: str, err: str, says: str) -> None:
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert says in err
    assert "; " in err, "the line must also say how to mend it"
    assert out == ""


@pytest.mark.parametrize(("script", "arguments", "says"), CASES)
def test_one_line_and_nothing_written(script, arguments, says, place, monkeypatch, capfd):
    module = importlib.import_module(SCRIPTS[script])
    monkeypatch.chdir(place)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # set back after the test
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(arguments)])
    main = importlib.import_module("self_check").script if script == "check" else module.main
    before = snapshot(place, ROOT / "results")
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert_refused(ended.value.code, *capfd.readouterr(), says)
    assert snapshot(place, ROOT / "results") == before


SHELLED = ("train", "accuracy", "spoken")  # one of each folder, as imports take seconds


def script_path(script: str) -> Path:
    return ROOT / (SCRIPTS[script].replace(".", os.sep) + ".py")


@pytest.fixture(scope="module")
def shelled(tmp_path_factory) -> dict[str, tuple[Path, subprocess.Popen]]:
    """The folder and process of each of SHELLED, side by side, begun as a user does it."""
    places = {script: tmp_path_factory.mktemp(script) for script in SHELLED}
    return {script: (place, subprocess.Popen([sys.executable, script_path(script), "--winds"], cwd=place,
                                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                             encoding="utf-8")) for script, place in places.items()}


@pytest.mark.parametrize("script", SHELLED)
def test_in_a_shell_too(script, shelled):
    """A flag that there is not."""
    place, process = shelled[script]
    out, err = process.communicate(timeout=300)
    assert_refused(process.returncode, out, err, "--winds")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in SHELLED])
def test_as_a_script_too(script, tmp_path, monkeypatch, capfd):
    """The others within this process, begun as Python begins a script: they find the repository's modules."""
    path = script_path(script)
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # set back after the test
    monkeypatch.setattr(sys, "path", [str(path.parent), *elsewhere])
    monkeypatch.setattr(sys, "argv", [str(path), "--winds"])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    says = "--winds" if script != "tune" else "--grid"  # the first of two mistakes
    assert_refused(ended.value.code, *capfd.readouterr(), says)
    assert str(ROOT) in sys.path
    assert list(tmp_path.iterdir()) == []


# ---- Readers, with whatever bytes there may be


@settings(max_examples=500)
@given(head=st.sampled_from([b"", b"\0\0\x08", b"\0\0\x08\1", b"\0\0\x08\3", b"\0\0\x0d\1", b"\0\0\x08\xff"]),
       sizes=st.lists(st.sampled_from([0, 1, 2, 3, 2**16, 2**31, 2**32 - 1]), max_size=4),
       rest=st.binary(max_size=40))
@example(head=b"\0\0\x08\2", sizes=[2**31, 2**32 - 1], rest=b"")
@example(head=b"\0\0\x08\1", sizes=[0], rest=b"")
def test_any_bytes_are_an_idx_file_or_refused_in_one_line(head, sizes, rest, tmp_path):
    content = head + b"".join(size.to_bytes(4, "big") for size in sizes) + rest
    path = tmp_path / "a-idx"
    path.write_bytes(content)
    try:
        array = mnist.read_idx(path)
    except UserError as error:
        assert "a-idx" in str(error) and "\n" not in str(error) and ";" in str(error)
    else:  # then it is what the format says, to the byte
        assert content[:3] == b"\0\0\x08" and array.ndim == content[3] > 0
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        assert header + array.tobytes() == content


@settings(max_examples=300)
@given(st.text(max_size=20))
def test_run_names_are_one_part_of_a_path(name):
    if checkpoint.is_run_name(name):
        assert Path(name).name == name and name not in (".", "..") and not name.startswith(".")
        assert all(sign not in name for sign in '/\\:*?"<>|\0\n')
