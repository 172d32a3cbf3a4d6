"""folder.py, streaming.py and picture_file.py: your own pictures, through the whole path."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import checkpoint
import data
import demo_mamba
import evaluate
import folder
import train_mamba
import training
from errors import UserError
from picture_file import ENDINGS, open_picture, read_rgb
from streaming import PictureFiles
from tests.commands import Ended
from trained import TrainedModel

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 30, 20)}
MODES = ("L", "RGB", "RGBA", "P", "1", "LA", "CMYK", "I;16")
DIGIT_MODES = ("L", "RGB", "RGBA", "LA", "P", "I;16")


def picture(colour, size=(20, 24), mode: str = "RGB") -> Image.Image:
    """A picture of one colour with a little noise, of `size` (width, height)."""
    noise = np.random.default_rng(size[0]).integers(-8, 9, (size[1], size[0], 3))
    image = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)


def write(place: Path, each: int = 10, classes=tuple(COLOURS)) -> Path:
    """`each` pictures of every class, of mixed sizes, half of them PNG and half JPEG."""
    for name in classes:
        (place / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            image = picture(COLOURS[name], (16 + number, 40 - 2 * number % 24))
            image.save(place / name / f"{number}.{'jpg' if number % 2 else 'png'}")
    return place


def cut_jpeg() -> bytes:
    """A JPEG file that ends in the middle."""
    whole = io.BytesIO()
    picture((9, 99, 199), (64, 64)).save(whole, "JPEG")
    return whole.getvalue()[:len(whole.getvalue()) // 2]


def load(place: Path, **options) -> data.Dataset:
    return data.load("folder", place, image_size=(16, 16), **options)


# ---- One picture


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_becomes_colour_of_the_size_asked_for(mode, tmp_path):
    ending = "jpg" if mode == "CMYK" else "png"
    picture((250, 250, 250), (30, 50), mode).save(tmp_path / f"a.{ending}")
    got = read_rgb(tmp_path / f"a.{ending}", (12, 18))
    assert got.shape == (3, 12, 18) and got.dtype == np.uint8
    assert got.mean() > 235


@pytest.mark.parametrize("scale", [257, 16, 1])
def test_a_picture_of_more_bits_keeps_its_contrast(scale, tmp_path):
    """Of 16 or 12 bits, or of 8 in a file for 16: blank paper must not become one of black and white."""
    grey = np.random.default_rng(0).integers(150, 155, (9, 9)).astype(np.uint16)
    grey[0, 0] = 254
    Image.fromarray(grey * np.uint16(scale)).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png")), grey)


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_a_picture_of_every_ending_is_read(ending, tmp_path):
    picture((200, 200, 200)).save(tmp_path / f"a{ending}")
    assert abs(read_rgb(tmp_path / f"a{ending}", (24, 20)).mean() - 200) < 3


def test_the_first_of_a_cameras_pictures_in_one_file_is_read(tmp_path):
    picture(COLOURS["red"]).save(tmp_path / "a.jpg", "MPO", save_all=True,
                                 append_images=[picture(COLOURS["blue"])])
    assert read_rgb(tmp_path / "a.jpg", (24, 20)).mean((1, 2)).argmax() == 0


@pytest.mark.parametrize("content", [b"", b"seven", b"<!DOCTYPE html>"])
def test_what_is_no_picture_is_said_to_be_none(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="it is none of a known kind"):
        open_picture(tmp_path / "a.png")


def test_what_stands_over_is_cut_off_evenly_and_transparent_is_white(tmp_path):
    wide = np.zeros((10, 30, 4), np.uint8)
    wide[:, 10:20] = (255, 0, 0, 255)
    Image.fromarray(wide).save(tmp_path / "a.png")
    got = read_rgb(tmp_path / "a.png", (10, 10))
    assert (got[0] == 255).all() and (got[1:] == 0).all()
    assert (read_rgb(tmp_path / "a.png", (10, 30))[:, :, :8] == 255).all()


def test_a_large_jpeg_is_decoded_small(tmp_path):
    picture((10, 200, 90), (1600, 1200)).save(tmp_path / "a.jpg")
    assert open_picture(tmp_path / "a.jpg", least=(100, 100)).size == (200, 150)
    small, whole = read_rgb(tmp_path / "a.jpg", (64, 64)), open_picture(tmp_path / "a.jpg").resize((64, 64))
    assert abs(small.mean(axis=(1, 2)) - np.asarray(whole).mean(axis=(0, 1))).max() < 2


# ---- Which pictures


def test_the_split_is_stratified_apart_and_remembered(tmp_path):
    found = folder.find(write(tmp_path, each=20))
    assert found.classes == ("blue", "green", "red")
    for part, each in (("train", 16), ("val", 2), ("test", 2)):
        assert np.bincount([label for _, label in getattr(found, part)]).tolist() == [each] * 3
    everything = found.train + found.val + found.test
    assert len(set(everything)) == 60 and all(path.startswith(found.classes[n]) for path, n in everything)
    assert folder.find(tmp_path) == found
    # What comes later is trained on; what goes is gone.
    picture(COLOURS["red"]).save(tmp_path / "red" / "0a.png")
    (tmp_path / found.test[0][0]).unlink()
    later = folder.find(tmp_path)
    assert set(later.train) - set(found.train) == {("red/0a.png", 2)}
    assert later.val == found.val and later.test == found.test[1:]


def test_train_and_val_folders_as_imagenet_has_them(tmp_path):
    write(tmp_path / "train", 4)
    write(tmp_path / "val", 2, ("green", "red"))
    found = folder.find(tmp_path)
    assert [len(found.train), len(found.val)] == [12, 4] and found.test is found.val
    assert {label for _, label in found.val} == {1, 2} and not (tmp_path / "split.json").exists()
    dataset = load(tmp_path)
    assert dataset.test is dataset.val and dataset.val.labels.unique().tolist() == [1, 2]


def test_train_and_test_folders_leave_validation_to_be_cut(tmp_path):
    write(tmp_path / "train", 10)
    write(tmp_path / "test", 2)
    found = folder.find(tmp_path)
    assert [len(found.train), len(found.val), len(found.test)] == [27, 3, 6]
    assert all(path.startswith("test/") for path, _ in found.test)
    assert not set(found.train) & set(found.val)


@pytest.mark.parametrize(("make", "says"), [
    (lambda place: None, "no pictures in .*it needs a folder for each class"),
    (lambda place: (place / "cats").mkdir(), "no pictures in"),
    (lambda place: picture((1, 2, 3)).save(place / "a.png"), "no pictures in"),
    (lambda place: write(place, classes=["red"]), "one class only, 'red'"),
    (lambda place: (write(place / "train", 3, ["red", "blue"]), write(place / "val", 1)),
     "has the class 'green', which .*train lacks"),
    (lambda place: write(place / "val"), "no train/"),
    (lambda place: write(place, 2), "no pictures for validation.*at least 3"),
    (lambda place: (write(place), (place / "split.json").write_text("[]")), "split.json cannot be read"),
    (lambda place: [(place / name).mkdir() or (place / name / "a.png").write_bytes(b"no picture")
                    for name in ("ab", "for", "c", "d")], "no pictures for validation"),
    (lambda place: place.rmdir(), "there is no folder"),
], ids=["empty", "empty class", "no classes", "one class", "class of val alone", "no train", "too few",
        "bad split", "few and no pictures", "missing"])
def test_a_folder_that_cannot_be_learnt_from_is_one_line(make, says, tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    make(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=says) as caught:
        load(place)
    assert "\n" not in str(caught.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("number", [0, 5])
def test_a_folder_holds_out_its_own_pictures(number, tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="leave out --hold-out and --train-on-all"):
        data.load("folder", tmp_path, hold_out=number)


def test_a_folder_of_no_pictures_at_all(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures for validation"):
        load(tmp_path)


# ---- Reading them


def spoilt(place: Path) -> Path:
    """Pictures, two of those for training broken, and one that is none."""
    write(place, 10)
    train = folder.find(place).train
    (place / train[0][0]).write_bytes(cut_jpeg())
    (place / train[9][0]).write_text("<!DOCTYPE html>")
    (place / "red" / "notes.txt").write_text("no picture, and does not say so")
    return place


def test_broken_pictures_are_skipped_named_and_counted(tmp_path, capsys):
    train = folder.find(spoilt(tmp_path)).train
    dataset = load(tmp_path)
    assert not dataset.streamed and dataset.shape == (3, 16, 16) and dataset.train.images.dtype == torch.uint8
    assert len(dataset.train.labels) == len(dataset.train.images) == 22
    said = capsys.readouterr().err
    for number in (0, 9):
        assert said.count(f"{train[number][0]} cannot be read as a picture") == 1
    assert said.endswith("2 of 24 pictures skipped, because they cannot be read\n")
    for images, labels in (dataset.train, dataset.val, dataset.test):
        brightest = images.float().mean((2, 3)).argmax(1)  # red, green, blue
        assert torch.equal(2 - brightest, labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_batches_of_the_tensors(workers, tmp_path, capsys):
    tensors = load(write(tmp_path, 10))
    stream = load(tmp_path, memory_budget=0, workers=workers)
    assert stream.streamed and stream.shape == tensors.shape and stream.train.images.workers == workers
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(stream, name).labels, getattr(tensors, name).labels)
    for start in (0, 2):
        a, b = (data.epoch_batches(dataset.train, 5, torch.Generator().manual_seed(3), start=start)
                for dataset in (tensors, stream))
        batches = list(zip(a, b, strict=True))
        assert len(batches) == 5 - start
        for (images, labels), (streamed, streamed_labels) in batches:
            assert torch.equal(images, streamed) and torch.equal(labels, streamed_labels)
    assert torch.equal(stream.val.images[:2], tensors.val.images[:2])
    assert torch.equal(stream.val.images[1], tensors.val.images[1])
    assert capsys.readouterr().err == ""


def test_a_stream_is_moved_by_the_generator_whatever_the_workers_and_the_start(tmp_path, monkeypatch):
    write(tmp_path, 10)

    def batches(workers: int, start: int = 0, seed: int = 1, **moves):
        dataset = load(tmp_path, memory_budget=0, workers=workers, **moves)
        return list(data.epoch_batches(dataset.train, 4, torch.Generator().manual_seed(seed), start=start))

    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda _: pytest.fail("that sets the GPUs' generators, too"))
        whole = batches(0, augment=True, flip=True)
    assert torch.equal(torch.get_rng_state(), before), "reading must not draw from the run's generator"
    for other in (batches(2, augment=True, flip=True)[2:], batches(1, start=2, augment=True, flip=True)):
        for (images, labels), (again, labels_again) in zip(whole[2:], other, strict=True):
            assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(whole[0][0], batches(0, seed=2, augment=True, flip=True)[0][0])
    still, mirrored = batches(0), batches(0, flip=True)
    same = torch.cat([(a == b).flatten(1).all(1) for (a, _), (b, _) in zip(still, mirrored, strict=True)])
    turned = torch.cat([(a.flip(-1) == b).flatten(1).all(1)
                        for (a, _), (b, _) in zip(still, mirrored, strict=True)])
    assert (same | turned).all() and same.any() and turned.any()


def test_of_a_stream_a_process_reads_its_part_alone(tmp_path):
    stream = load(write(tmp_path, 10), memory_budget=0, workers=0, augment=True)

    def batches(**options):
        return data.epoch_batches(stream.train, 5, torch.Generator().manual_seed(3), **options)

    halves = [batches(part=lambda size: slice(0, size // 2)),
              batches(part=lambda size: slice(size // 2, size))]
    for (images, labels), (first, some), (second, others) in zip(batches(), *halves, strict=True):
        assert torch.equal(torch.cat([first, second]), images)
        assert torch.equal(labels, some) and torch.equal(labels, others)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_puts_the_next_picture_in_the_place_of_a_broken_one(workers, tmp_path, capfd):
    train = folder.find(spoilt(tmp_path)).train
    dataset = load(tmp_path, memory_budget=0, workers=workers)
    for _ in range(2):
        batches = list(data.epoch_batches(dataset.train, 6, torch.Generator().manual_seed(0)))
        assert [len(labels) for _, labels in batches] == [6] * 4
        for images, labels in batches:
            assert torch.equal(2 - images.float().mean((2, 3)).argmax(1), labels)
    said = capfd.readouterr().err
    for number in (0, 9):
        assert said.count(f"{train[number][0]} cannot be read as a picture") == 1
    assert said.count("2 of 24 pictures skipped") == 1


def test_a_stream_of_no_pictures_ends_in_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for workers in (0, 1):
        files = PictureFiles(tmp_path, ["a.png"], (8, 8), workers=workers)
        with pytest.raises(UserError, match="no readable picture") as caught:
            list(files.batches([torch.tensor([0])], seed=0))
        assert "\n" not in str(caught.value)


# ---- The whole path


@pytest.fixture(scope="module")
def digit_pictures(tmp_path_factory) -> Path:
    """scikit-learn's digits as files of mixed sizes and modes: digits/<class>/…, and unseen/<class>-…"""
    place = tmp_path_factory.mktemp("digits")
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    unseen = set(rng.permutation(len(labels))[:20].tolist())
    (place / "unseen").mkdir()
    for name in range(10):
        (place / "digits" / f"digit {name}").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        image = Image.fromarray(np.uint8(image.reshape(8, 8) * 255 / 16))
        side = int(rng.integers(16, 49))
        image = image.resize((side, side + int(rng.integers(0, 3))), Image.Resampling.BICUBIC)
        if number % 2:
            image, ending = image.convert(("L", "RGB", "CMYK")[number % 3]), "jpg"
        else:
            mode, ending = DIGIT_MODES[number % len(DIGIT_MODES)], "png"
            image = (Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16"
                     else image.convert(mode))
        path = (place / "unseen" / f"{label}-{number}.{ending}" if number in unseen
                else place / "digits" / f"digit {label}" / f"{number}.{ending}")
        image.save(path)
    (place / "digits" / "digit 3" / "cut.jpg").write_bytes(cut_jpeg())
    return place


@pytest.fixture
def run(command, monkeypatch):
    """Runs a script in this process: run(place, module, *arguments) → status, stdout, stderr."""
    def call(place: Path, module: ModuleType, *arguments: object) -> Ended:
        monkeypatch.chdir(place)
        return command(module, *arguments, "--device", "cpu")
    return call


RUN = ("--dataset", "folder", "--data-dir", "digits", "--image-size", "16", "--patch-size",
       "4", "--d-model", "32", "--num-blocks", "2", "--d-state", "4", "--lr", "1e-2", "--batch-size", "16",
       "--run-name", "digits")


@pytest.fixture(scope="module")
def trained(digit_pictures) -> Path:
    """A folder where a model was trained on the digits' pictures."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.chdir(digit_pictures)
        patch.setattr(sys, "argv", ["train_mamba.py", *RUN, "--no-draw", "--epochs", "5", "--device", "cpu"])
        train_mamba.main()
    assert err.getvalue().count("\n") == 2 and "cut.jpg cannot be read" in err.getvalue()
    assert "1 of " in err.getvalue()
    return digit_pictures


def test_a_folder_of_digits_is_learnt_to_95_percent(trained):
    metrics = [json.loads(line) for line in
               (trained / "runs" / "digits" / "metrics.jsonl").read_text().splitlines()]
    best = max(metrics, key=lambda each: each["val_accuracy"])
    assert best["test_accuracy"] >= 0.95 and best["val_accuracy"] >= 0.95
    contents = checkpoint.load(trained / "checkpoints" / "digits.pt")["dataset"]
    assert contents["classes"] == [f"digit {number}" for number in range(10)]
    assert contents["shape"] == [3, 16, 16]


def test_the_demo_names_pictures_that_it_has_not_seen(trained, run):
    files = sorted((trained / "unseen").iterdir())
    status, out, err = run(trained, demo_mamba, "--image", *files)
    assert (status, err) == (0, "")
    lines = out.splitlines()[:len(files)]
    right = sum(f": digit {path.name[0]} (" in line for path, line in zip(files, lines, strict=True))
    assert right >= 0.9 * len(files)


def test_it_is_tested_at_other_sizes_rectangular_too(trained, run, monkeypatch):
    model = TrainedModel(trained / "checkpoints" / "digits.pt", torch.device("cpu"), Path("runs"),
                         trained / "digits", image_size=(20, 18))
    split = model.dataset.test
    assert model.dataset.shape == (3, 20, 18)
    probabilities = evaluate.predict(model.model, split, model.dataset, "cpu")
    assert (probabilities.argmax(1) == split.labels).float().mean() > 0.5
    monkeypatch.setattr("builtins.input", lambda _: "q")
    assert run(trained, demo_mamba, "--interactive", "--image-size", "20x18")[0] == 0
    assert run(trained, demo_mamba, "--image-size", "20xx")[0] == 2


def test_other_classes_are_refused_in_one_line(trained, run, tmp_path):
    write(tmp_path / "colours")
    status, _, err = run(trained, demo_mamba, "--data-dir", tmp_path / "colours")
    assert status == 2 and err.count("\n") == 1
    assert "tells digit 0" in err and "has blue, green, red" in err


def test_a_streamed_run_that_is_resumed_ends_as_if_it_had_not_been_stopped(run, tmp_path, monkeypatch):
    write(tmp_path / "colours", 20)
    write(tmp_path / "others", 20, ("red", "blue"))
    command = ("--dataset", "folder", "--data-dir", "colours", "--image-size", "12x16", "--patch-size", "4",
               "--d-model", "8", "--num-blocks", "1", "--d-state", "2", "--batch-size", "8", "--epochs", "2",
               "--memory-budget", "0", "--flip", "--gradient-checkpointing", "--run-name", "run")
    status, out, err = run(tmp_path, train_mamba, *command, "--workers", "1")
    assert (status, err) == (0, "")
    assert "pictures of 12×16 pixels, streamed by 1 workers" in out
    (tmp_path / "runs").rename(tmp_path / "whole runs")
    (tmp_path / "checkpoints").rename(tmp_path / "whole")

    step = training.Training.train_step

    def stopped(self, *batch):
        result = step(self, *batch)
        if self.step == 9:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "train_step", stopped)
        status, out, err = run(tmp_path, train_mamba, *command, "--workers", "0")
    assert status == 130 and "stopped in epoch 2" in out
    status, _, err = run(tmp_path, train_mamba, "--resume", "--data-dir", "others")
    assert status == 2 and "tells blue, green, red apart, but others has blue, red" in err
    status, _, err = run(tmp_path, train_mamba, "--resume", "--workers", "0")
    assert (status, err) == (0, "")
    ours, whole = (checkpoint.load(tmp_path / place / "run.last.pt")["model"]
                   for place in ("checkpoints", "whole"))
    for name in whole:
        assert torch.equal(ours[name], whole[name]), name
