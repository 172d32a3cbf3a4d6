"""demo_mamba.py: called as a user calls it, and prepare_picture on pictures as users have them."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import augment
import checkpoint
import data
import demo_mamba
import evaluate
from baselines import ARCHITECTURES, VisionLSTM, VisionTransformer, matched_config
from demo_mamba import parse_arguments, picture_names
from errors import UserError
from mamba_ssm_simple import VisionMamba2
from pictures import prepare_picture
from prompt import converse, fetch_image, terminal_bars
from trained import TrainedModel

ROOT = Path(__file__).parent.parent
CONFIG = {"num_classes": 10, "d_model": 16, "num_blocks": 1, "in_channels": 1, "patch_size": 2, "d_state": 4}
COLOUR = CONFIG | {"in_channels": 3}
WRITTEN = {"confusion.png", "predictions.png", "mistakes.png", "hardest.png", "reliability.png",
           "robustness.png", "class_scores.png", "performance.png", "performance.txt", "report.json",
           "delta.png", "memory.png", "memory_reach.png"}


def contents(**changes) -> dict:
    """A checkpoint of a tiny untrained model for digits."""
    torch.manual_seed(0)
    entry = data.DATASETS["digits"]
    return {"architecture": "mamba", "config": CONFIG, "model": VisionMamba2(**CONFIG).state_dict(),
            "dataset": {"name": "digits", "classes": list(entry.classes), "mean": list(entry.mean),
                        "std": list(entry.std)},
            "epoch": 0, "metrics": {}, "settings": {"run_name": "tiny"}, **changes}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with checkpoints/tiny.pt, where the demo is run."""
    checkpoint.save(tmp_path / "checkpoints" / "tiny.pt", contents())
    return tmp_path


@pytest.fixture
def demo(place, command, monkeypatch):
    """Runs the demo in `place` and in this process: demo(*arguments) → status, stdout, stderr."""
    monkeypatch.setattr(evaluate, "SECONDS", 0.01)  # how fast it is is measured, and not what is tested
    return functools.partial(command, demo_mamba, "--device", "cpu")


@pytest.fixture
def refused(place, demo):
    """refused(*arguments) → the one line on stderr of a demo that must fail and write nothing."""
    def call(*arguments: object) -> str:
        done = demo(*arguments)
        assert done.status == 2
        assert done.err.count("\n") == 1 and done.err.startswith("error: ")
        assert not (place / "runs").exists()
        return done.err
    return call


def seven(mode: str = "L", size: tuple[int, int] = (300, 200), paper=255, ink=0) -> Image.Image:
    """A 7 of about 60 × 100 pixels, drawn off-centre."""
    image = Image.new(mode, size, paper)
    left, top = size[0] // 8, size[1] // 3
    ImageDraw.Draw(image).line([(left, top), (left + 60, top), (left + 20, top + 100)], fill=ink, width=12)
    return image


def with_clear_corner() -> Image.Image:
    """A 7 on white whose upper left corner is transparent black, as round corners of screenshots are."""
    image = seven("RGBA", paper=(255, 255, 255, 255), ink=(0, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((0, 0, 30, 30), fill=(0, 0, 0, 0))
    return image


# ---- prepare_picture


@pytest.mark.parametrize("size", [28, 8])
@pytest.mark.parametrize("image", [
    pytest.param(seven(), id="dark on light"),
    pytest.param(seven(paper=0, ink=255), id="light on dark"),
    pytest.param(seven(paper=130, ink=40), id="dark on grey"),
    pytest.param(seven(paper=120, ink=220), id="light on grey"),
    pytest.param(seven("RGB", paper=(250, 240, 200), ink=(20, 30, 160)), id="colour"),
    pytest.param(seven("RGB", paper=(0, 170, 0), ink=(220, 30, 30)), id="red on green as bright"),
    pytest.param(seven("RGBA", paper=(0, 0, 0, 0), ink=(0, 0, 0, 255)), id="black on nothing"),
    pytest.param(seven("RGBA", paper=(0, 0, 0, 0), ink=(255, 255, 255, 255)), id="white on nothing"),
    pytest.param(with_clear_corner(), id="clear corner"),
    pytest.param(seven("LA", paper=(255, 255), ink=(0, 255)), id="grey with alpha"),
    pytest.param(seven().convert("P"), id="palette"),
    pytest.param(seven().convert("1"), id="one bit"),
    pytest.param(seven("I;16", paper=60000, ink=900), id="16 bit"),
    pytest.param(seven(size=(4000, 3000)).resize((6000, 4500)), id="big"),
    pytest.param(seven(size=(120, 2400)), id="tall"),
])
def test_a_picture_becomes_a_centred_light_digit_on_dark(image, size, tmp_path):
    image.save(tmp_path / "seven.png")
    picture = prepare_picture(tmp_path / "seven.png", size)
    assert picture.shape == (1, 1, size, size) and picture.dtype == torch.uint8
    digit = picture[0, 0].double().numpy()
    rows, columns = np.flatnonzero(digit.max(axis=1) > 40), np.flatnonzero(digit.max(axis=0) > 40)
    box = 20 if size == 28 else 8
    assert digit.max() == 255 and np.median(digit) < 40
    assert box - 1 <= np.ptp(rows) + 1 <= box and 0.4 * box < np.ptp(columns) + 1 < 0.8 * box
    if size == 28:
        assert digit.sum(axis=1) @ np.arange(28) / digit.sum() == pytest.approx(14, abs=0.51)
        assert digit.sum(axis=0) @ np.arange(28) / digit.sum() == pytest.approx(14, abs=0.51)
        assert digit[rows[0], columns[0]] > 100, "a 7 has its bar above"
        assert digit[rows[-1], columns[-1]] < 40, "and nothing below on the right"


def test_paper_with_coloured_noise_holds_no_digit(tmp_path):
    noise = np.random.default_rng(0).normal((215, 205, 180), 6, (500, 400, 3))
    Image.fromarray(np.uint8(noise.clip(0, 255))).save(tmp_path / "blank.png")
    with pytest.raises(UserError):
        prepare_picture(tmp_path / "blank.png", 28)


def test_a_photograph_is_turned_upright(tmp_path):
    turned = seven().rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = prepare_picture(saved(seven(), tmp_path / "upright.png"), 28)
    assert torch.equal(prepare_picture(tmp_path / "turned.png", 28), upright)


def test_an_mnist_like_picture_comes_back_almost_the_same(tmp_path):
    digit = prepare_picture(saved(seven(), tmp_path / "a.png"), 28)
    again = prepare_picture(saved(Image.fromarray(digit[0, 0].numpy()), tmp_path / "b.png"), 28)
    assert (digit.float() - again.float()).abs().mean() < 5


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize(("name", "make", "says"), [
    ("absent.png", lambda path: None, "no picture"),
    ("folder.png", lambda path: path.mkdir(), "is a folder"),
    ("empty.png", lambda path: path.write_bytes(b""), "cannot be read"),
    ("text.png", lambda path: path.write_text("seven"), "cannot be read"),
    ("cut.png", lambda path: path.write_bytes(saved(seven(), path).read_bytes()[:200]), "cannot be read"),
    ("even.png", lambda path: Image.new("L", (50, 50), 200).save(path), "no digit"),
    ("one.png", lambda path: Image.new("L", (1, 1), 200).save(path), "no digit"),
    ("clear.png", lambda path: Image.new("RGBA", (50, 50)).save(path), "no digit"),
    ("huge.png", lambda path: Image.new("1", (8200, 8200)).save(path), "64 megapixels"),
    ("bomb.png", lambda path: Image.new("1", (20000, 20000)).save(path), "64 megapixels"),
])
def test_a_useless_picture_is_refused_in_one_line(name, make, says, tmp_path, recwarn):
    make(tmp_path / name)
    with pytest.raises(UserError, match=says) as caught:
        prepare_picture(tmp_path / name, 28)
    assert "\n" not in str(caught.value) and not recwarn.list


def test_names_of_charts_never_collide():
    paths = [Path(name) for name in ("a.png", "b/a.jpg", "A.png", "a-2.png", "confusion.png", "ü $.gif")]
    names = picture_names(paths)
    assert len({name.lower() for name in names}) == len(names)
    assert names[:2] == ["image-a.png", "image-a-2.png"] and "confusion.png" not in names


def test_bars_in_a_terminal_keep_to_their_lines():
    said = terminal_bars(np.array([0.25, 0.75]), ("a\nb", "\x1b[2Jc"), 1)
    assert said.count("\n") == 2 and "\x1b" not in said and said.endswith("predicted ?[2Jc ✓")


# ---- the commands


def test_the_test_set_is_evaluated_measured_and_written(place, demo):
    done = demo()
    assert (done.status, done.err) == (0, "")
    folder = place / "runs" / "tiny" / "demo"
    assert {path.name for path in folder.iterdir()} == WRITTEN
    assert all(name in done.out for name in WRITTEN)

    report = json.loads((folder / "report.json").read_text())
    assert done.out.startswith(f"test accuracy {100 * report['test']['accuracy']:.2f}%")
    assert report["test"]["images"] == 360 and set(report["classes"]) == set("0123456789")
    assert sum(scores["images"] for scores in report["classes"].values()) == 360
    assert all(0 <= scores[key] <= 1 for scores in report["classes"].values()
               for key in ("precision", "recall", "f1"))
    costs = report["performance"]
    assert costs["parameters"] == sum(p.numel() for p in VisionMamba2(**CONFIG).parameters())
    assert set(costs["images_per_second"]) == {"1", "64", "1024"}
    assert report["images_per_second_of_others"].keys() == {"lstm", "transformer"}
    assert costs["latency_ms"] > 0 and costs["peak_memory_mib"] > 0 and costs["multiply_adds"] > 0
    text = (folder / "performance.txt").read_text(encoding="utf-8")
    assert f"{costs['parameters']:,}" in text and "not counted" in text


def test_runs_are_compared_side_by_side(place, demo):
    for name in ("lstm", "transformer"):
        config = matched_config(name, CONFIG)
        checkpoint.save(place / "checkpoints" / f"{name}.pt", contents(
            architecture=name, config=config, model=ARCHITECTURES[name](**config).state_dict(),
            settings={"run_name": name}))
    done = demo("--compare", "tiny", "checkpoints/lstm.pt", "transformer")
    assert (done.status, done.err) == (0, "")
    assert done.out.split()[:3] == ["tiny", "lstm", "transformer"]
    folder = place / "runs" / "comparison"
    assert {path.name for path in folder.iterdir()} == {"comparison.png", "comparison.json"}
    models = json.loads((folder / "comparison.json").read_text())["models"]
    assert [model["architecture"] for model in models] == ["mamba", "lstm", "transformer"]
    assert all(model["memory_mib"] > 0 and model["multiply_adds"] > 1000 and 0 <= model["accuracy"] <= 1
               for model in models)
    (place / "other").mkdir()
    shutil.copy(place / "checkpoints" / "tiny.pt", place / "other" / "tiny.pt")
    paths = ["checkpoints/tiny.pt", "other/tiny.pt"]
    assert demo("--compare", *paths).out.split()[:2] == paths, "names that are the same tell nothing"


def test_comparing_what_cannot_be_compared_is_one_line(place, refused):
    checkpoint.save(place / "checkpoints" / "other.pt", contents(dataset={
        "name": "mnist", "classes": list("0123456789"), "mean": [0.1], "std": [0.3]}))
    assert "two runs or more" in refused("--compare", "tiny")
    assert "compare runs of one dataset" in refused("--compare", "tiny", "other")
    assert "no checkpoint at" in refused("--compare", "tiny", "nothing")


def test_explain_and_report_write_what_they_promise(place, demo):
    done = demo("--explain")
    assert (done.status, done.err) == (0, "")
    folder = place / "runs" / "tiny"
    explained = {"delta.png", "memory.png", "memory_reach.png", "state.gif"}
    assert {path.name for path in (folder / "demo").iterdir()} == explained
    done = demo("--report")
    assert (done.status, done.err) == (0, "")
    assert {path.name for path in (folder / "demo").iterdir()} == WRITTEN | explained
    page = (folder / "report.html").read_text(encoding="utf-8")
    pictures = [name for name in WRITTEN | explained if name.endswith((".png", ".gif"))]
    assert page.count("<img ") == page.count("src='data:image/") == len(pictures)
    assert "http" not in page and done.out.splitlines()[0].split()[2] in page  # the accuracy


def test_a_model_without_a_scan_is_tested_and_not_explained(place, demo, refused):
    config = {key: value for key, value in CONFIG.items() if key != "d_state"}
    checkpoint.save(place / "checkpoints" / "tiny.pt", contents(
        architecture="lstm", config=config, model=VisionLSTM(**config).state_dict()))
    assert "--explain needs a mamba model, but" in refused("--explain")
    done = demo()
    assert (done.status, done.err) == (0, "")
    assert not (place / "runs" / "tiny" / "demo" / "delta.png").exists()


def test_own_pictures_and_the_prompt(place):
    """By the command itself, in an environment where hardly anything is set."""
    saved(seven(), place / "seven.png")
    asked = "5\n\n-1\n360\nnowhere.png\nseven.png\nq\n7\n"
    done = subprocess.run([sys.executable, ROOT / "demo_mamba.py", "--device", "cpu", "--image", "seven.png",
                           "seven.png", "--interactive"],
                          cwd=place, input=asked, capture_output=True, encoding="utf-8", timeout=300,
                          env={"PATH": "", "PYTHONIOENCODING": "utf-8", "HOME": str(place)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("seven.png: ") == 2
    names = {path.name for path in (place / "runs" / "tiny" / "demo").iterdir()}
    assert names == {"image-seven.png", "image-seven-2.png"}
    for line in ("nothing was asked", "no test image -1; choose from 0 to 359", "no test image 360",
                 "no picture nowhere.png"):
        assert line in done.stdout
    assert done.stdout.count("predicted ") == 2, "the 5 and seven.png, and nothing after q"
    assert "█" in done.stdout


def test_wrong_pictures_are_named_and_the_others_in_a_folder_too_are_classified(place, demo):
    (place / "mine" / "more").mkdir(parents=True)
    (place / "empty").mkdir()
    for name in ("b.png", "more/a.JPG"):
        saved(seven(), place / "mine" / name)
    (place / "note.png").write_text("no picture")
    (place / "mine" / "notes.txt").write_text("no picture, and does not say so")
    done = demo("--image", "nowhere.png", "mine", "note.png", "empty")
    assert done.status == 2
    assert [line.split(": ")[0] for line in done.out.splitlines()[:2]] == [
        str(Path("mine", "b.png")), str(Path("mine", "more", "a.JPG"))]
    told = ("skipped: .*nowhere.png", "skipped: note.png cannot be read", "skipped: .*in the folder empty",
            "error: 3 of 5 pictures skipped; ")
    assert all(map(re.match, told, done.err.splitlines())) and done.err.count("\n") == len(told)
    done = demo("--image", "nowhere.png", "note.png")
    assert (done.status, done.out) == (2, "") and "error: none of the 2 pictures" in done.err


def test_a_path_in_quotes_is_that_path(place):
    model = TrainedModel(place / "checkpoints" / "tiny.pt", torch.device("cpu"), place / "runs", place)
    path = saved(seven(), place / "my seven.png")
    for quoted in (f"'{path}'", f'"{path}"'):
        assert torch.equal(fetch_image(model, quoted)[0], model.picture(path))


def test_the_prompt_ends_at_the_end_of_input_alone_and_writes_nothing(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"~nobody-of-that-name/a.png\n{'a' * 300}.png\n3\n"))
    converse(TrainedModel(place / "checkpoints" / "tiny.pt", torch.device("cpu"), place / "runs", place))
    assert not (place / "runs").exists()
    said = capsys.readouterr().out
    assert "no picture ~nobody-of-that-name" in said and "a.png cannot be read" in said and "█" in said


def test_help_names_every_flag_and_its_default(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo_mamba.py", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments()
    text = capsys.readouterr().out
    for flag in ("--checkpoint", "--checkpoints-dir", "--runs-dir", "--data-dir", "--device", "--image",
                 "--interactive", "--explain", "--report", "--serve", "--port", "--export"):
        assert flag in text
    assert text.count("(default:") >= 8


def test_mistakes_of_the_user_cost_one_line_and_write_nothing(place, refused):
    (place / "note.png").write_text("no picture")
    assert "note.png cannot be read" in refused("--image", "note.png")
    assert "--port" in refused("--serve", "--port", "70000")
    assert "does not end in .onnx" in refused("--export", "model.pt")
    (place / "checkpoints" / "tiny.pt").write_bytes(b"damaged")
    assert "is not a checkpoint" in refused()


# ---- evaluate.py


@pytest.mark.parametrize("changes", [
    {"architecture": "perceptron"},
    {"architecture": ["mamba"]},
    {"config": {**CONFIG, "wings": 2}},
    {"config": {**CONFIG, "d_model": 32}},
    {"config": {**CONFIG, "d_model": -4}},
    {"config": None},
    {"model": {}},
    {"model": 3},
])
def test_a_foreign_checkpoint_is_refused(changes):
    with pytest.raises(UserError, match="checkpoint"):
        evaluate.rebuild(contents(**changes), "cpu")


@pytest.mark.parametrize("changes", [
    {"dataset": {"name": "birds", "classes": ["wren"], "mean": [0.5], "std": [0.5]}},
    {"dataset": {"name": "digits", "classes": ["0", "1"], "mean": [0.5], "std": [0.5]}},
    {"dataset": {"name": "digits"}},
    {"dataset": 7},
    {"config": COLOUR, "model": VisionMamba2(**COLOUR).state_dict()},
])
def test_a_checkpoint_that_does_not_fit_its_dataset_is_refused(changes, tmp_path):
    checkpoint.save(tmp_path / "odd.pt", contents(**changes))
    with pytest.raises(UserError, match="train it anew"):
        TrainedModel(tmp_path / "odd.pt", torch.device("cpu"), tmp_path, tmp_path)


def test_a_model_is_shown_under_its_files_name_whatever_the_one_inside(tmp_path):
    for name, run in {"mine.pt": "mine", "a b.last.pt": "a b", "a.last.pt.previous": "a",
                      "mine (1).pt": "mine _1_"}.items():
        checkpoint.save(tmp_path / name, contents(settings={"run_name": "../outside"}))
        shown = TrainedModel(tmp_path / name, torch.device("cpu"), tmp_path / "runs", tmp_path)
        assert (shown.run_name, shown.folder) == (run, tmp_path / "runs" / run / "demo")


def test_predict_gives_every_probability_and_leaves_the_mode():
    dataset = data.load("digits", "unused")
    model = evaluate.rebuild(contents(), "cpu").train()
    probabilities = evaluate.predict(model, dataset.val, dataset, "cpu", batch_size=100)
    assert model.training and probabilities.shape == (len(dataset.val.labels), 10)
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(len(probabilities)), atol=1e-5)
    some = model.eval()(augment.normalize(dataset.val.images[100:130], dataset.mean, dataset.std)).softmax(-1)
    assert torch.allclose(probabilities[100:130], some, atol=1e-5)


def test_multiply_adds_are_those_of_the_layers():
    e, n, w, r, tokens = 32, 4, 4, 1, 16
    stem = 16 * 9 * tokens
    mixer = tokens * (16 * 2 * e + e * (r + 2 * n) + r * e + e * 16 + 3 * e * n + e * w)
    counted = evaluate.count_multiply_adds(evaluate.rebuild(contents(), "cpu"), torch.zeros(1, 1, 8, 8))
    assert counted == stem + mixer + 16 * 10


def test_multiply_adds_of_attention_are_counted_on_a_cpu_too():
    width, mlp, tokens = 16, 20, 64
    model = VisionTransformer(d_model=width, num_blocks=1, mlp_width=mlp, patch_size=1)
    block = tokens * (4 * width * width + 2 * width * mlp) + 2 * tokens * tokens * width
    counted = evaluate.count_multiply_adds(model, torch.zeros(1, 1, 8, 8))
    assert counted == tokens * width + block + width * 10


def test_pick_device():
    assert evaluate.pick_device("cpu").type == "cpu"
    assert evaluate.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UserError):
            evaluate.pick_device(name)
