"""serve.py: what the page answers, and the page itself in a real browser where there is one."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import checkpoint
import data
import serve
from errors import UserError
from mamba_ssm_simple import VisionMamba2
from tests.page import MISSING, STROKES, Page, Server
from trained import TrainedModel

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "vision_mamba2_mnist.pt"
CONFIG = {"d_model": 16, "num_blocks": 2, "patch_size": 2, "d_state": 4}
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def tiny(tmp_path) -> TrainedModel:
    return untrained(tmp_path, "digits")


def untrained(tmp_path: Path, dataset: str) -> TrainedModel:
    """A small model for a dataset, as scikit-learn's digits are, saved in checkpoints/tiny.pt."""
    entry = data.DATASETS[dataset]
    path = tmp_path / "checkpoints" / "tiny.pt"
    checkpoint.save(path, {
        "architecture": "mamba", "config": CONFIG, "model": VisionMamba2(**CONFIG).state_dict(),
        "dataset": {"name": dataset, "classes": list(entry.classes), "mean": list(entry.mean),
                    "std": list(entry.std)},
        "epoch": 0, "metrics": {}, "settings": {"run_name": "tiny"}})
    return TrainedModel(path, torch.device("cpu"), tmp_path, tmp_path)


def canvas(points: list[tuple[float, float]], size: int = 280) -> str:
    """What the page sends of a drawing."""
    image = Image.new("RGBA", (size, size), "black")
    if points:
        ImageDraw.Draw(image).line([(x * size, y * size) for x, y in points], fill="white", width=22)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def prediction(answer: str) -> str:
    return re.search(r'id="prediction">([^<]*)<', answer)[1]


def said(answer: str) -> str:
    """The one line of an answer that shows no prediction."""
    assert "prediction" not in answer
    return re.search(r'id="message">([^<]*)</p>', answer)[1]


def test_a_drawing_is_answered_with_probabilities_and_maps(tiny, seed):
    answer = serve.Answers(tiny).drawing(canvas(STROKES["7"]))
    assert prediction(answer) in set("0123456789")
    assert answer.count('class="bar') - answer.count('class="bars') == 10
    assert answer.count("<img") == 3 and "block 1 →" in answer and "block 2 ↓" in answer
    ranges = re.findall(r"block \d .<br>([\d.e-]+)–([\d.e-]+)</fig", answer)
    assert len(ranges) == 2 and all(0 < float(low) < float(high) for low, high in ranges)
    shown = [float(value) for value in re.findall(r"<span>([\d.]+)%</span></div>", answer)]
    assert sum(shown) == pytest.approx(100, abs=1)


def test_a_drawing_of_another_size_keeps_mnists_margin(tiny):
    """As `TrainedModel.picture` has it: put into 28 by 28, then brought to the model's height and width."""
    tiny.entry, tiny.shape = data.DATASETS["mnist"], (1, 14, 21)
    grey = np.zeros((280, 280), np.float32)
    grey[40:240, 130:150] = 255
    seen = tiny.drawing(grey, "the canvas")
    assert seen.shape == (1, 1, 14, 21)
    rows, columns = (np.flatnonzero(seen[0, 0].amax(axis).numpy() > 60) for axis in (1, 0))
    assert len(rows) == 10 and len(columns) <= 3, "20 of 28 rows"


@pytest.mark.parametrize("sent", ["", "hello", "data:image/png;base64,", "data:image/png;base64,AAAA",
                                  "data:image/png;base64,!!!!"])
def test_what_is_no_drawing_is_one_line(tiny, sent):
    assert "did not arrive" in said(serve.Answers(tiny).drawing(sent))


def test_an_empty_canvas_is_one_line(tiny):
    assert "draw a digit" in said(serve.Answers(tiny).drawing(canvas([])))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """{name: (path, what is said of it)}"""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("seven")
    Image.new("1", (10000, 10000)).save(folder / "huge.png")
    Image.new("L", (60, 60), 9).save(folder / "even.png")
    return {name: (folder / name, says) for name, says in (
        ("empty.png", "cannot be read"), ("text.png", "cannot be read"), ("huge.png", "64 megapixels"),
        ("even.png", "no digit"))}


def test_bad_files_are_one_line_and_good_ones_come_back(tiny, tmp_path):
    answers = serve.Answers(tiny)
    for name, (path, says) in bad_files(tmp_path).items():
        answer, image = answers.file(path, name)
        assert says in said(answer) and name in said(answer) and str(tmp_path) not in answer and image is None
    Image.open(io.BytesIO(base64.b64decode(canvas(STROKES["1"]).split(",")[1]))).save(tmp_path / "one.png")
    answer, image = answers.file(tmp_path / "one.png", "one.png")
    assert prediction(answer) and image.shape == (1, 1, 8, 8)
    number, url = serve.canvas_value(image).split()
    assert number.isdecimal() and url.startswith("data:image/png;base64,")


def test_random_and_hard_digits_tell_the_truth(tiny):
    answers = serve.Answers(tiny)
    for digit in (answers.random_digit, answers.hard_digit, answers.hard_digit):
        answer, image = digit()
        assert image.shape == (1, 1, 8, 8) and ("✓" in answer or "✗ it is" in answer)
    assert len(answers.hardest) == serve.HARDEST
    test = tiny.dataset.test
    to_truth = torch.from_numpy(tiny.probabilities(test.images)).gather(1, test.labels[:, None])[:, 0]
    assert to_truth[answers.hardest[0]] == pytest.approx(to_truth.min().item(), abs=1e-6)


def test_many_at_once_get_their_own_answers(tiny, seed):
    answers = serve.Answers(tiny)
    drawings = [canvas(points) for points in STROKES.values()] * 4

    def stable(answer: str) -> str:
        return re.sub(r"answered in \d+ ms", "", answer)

    alone = [stable(answers.drawing(drawing)) for drawing in drawings]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: stable(answers.drawing(drawings[i]))}))
               for i in range(len(drawings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(drawings))] == alone


def test_an_answer_takes_less_than_a_tenth_of_a_second(tiny):
    """Of a model as large as the default one, at MNIST's 7×7 tokens; the fastest, as other programs on the
    machine make an answer slower and never faster."""
    tiny.model = VisionMamba2().eval()
    tiny.shape = (1, 28, 28)
    answers, seconds = serve.Answers(tiny), []
    for _ in range(15):
        started = time.perf_counter()
        answers.drawing(canvas(STROKES["0"]))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1


def test_a_port_in_use_a_missing_package_and_a_colour_model_are_one_line(tiny, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* choose another by --port"):
            serve.check_port(port)
    serve.check_port(port)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Gradio; run: pip install"):
        serve.serve(tiny, port, browser=False)
    tiny.shape = (3, 8, 8)
    with pytest.raises(UserError, match="colour"):
        serve.serve(tiny, port, browser=False)


# ---- The server


@pytest.mark.skipif("gradio" in MISSING, reason="not installed: gradio")
def test_calls_that_the_page_does_not_make_print_nothing_and_dropped_files_go(tiny, tmp_path):
    server = Server(tiny.path, tmp_path, tmp_path)
    try:
        def ask(number, event) -> tuple[int, str]:
            return server.post("run/predict", json.dumps({
                "data": [], "fn_index": number, "event_data": event, "session_hash": "a"}).encode())

        for event in ([1], "x", 5, {"picture": None}, {"file": "a\0b"}, {"path": "a\0b"},
                      {"path": "/etc/passwd"}):
            assert ask(0, event)[0] == 422 and ask(1, event)[0] == 422, event
        for number in (99, None, [1], "a"):
            assert ask(number, {})[0] == 422, number
        assert server.post("run/predict", b"")[0] == 422 and server.post("run/predict", b"{no")[0] == 422
        assert "did not arrive" in ask(0, None)[1] and "could not be taken" in ask(1, None)[1]
        assert "prediction" in ask(0, {"picture": canvas(STROKES["7"])})[1]
        assert "could not be taken" in ask(1, {"file": str(tiny.path), "name": "tiny.pt"})[1]
        image = base64.b64decode(canvas(STROKES["1"]).split(",")[1])
        form = (b"--X\r\ncontent-disposition: form-data; name=files; filename=one.png\r\n\r\n" + image
                + b"\r\n--X--\r\n")
        place = Path(json.loads(server.post("upload", form, "multipart/form-data; boundary=X")[1])[0])
        assert place.is_relative_to(server.temporary) and place.read_bytes() == image
        assert "prediction" in ask(1, {"file": str(place), "name": "one.png"})[1]
    finally:
        printed = server.close()
    assert printed.strip() == "stopped"
    assert not list(server.temporary.rglob("*.png"))


# ---- In a browser


@needs_browser
def test_the_page_in_chromium(tiny, tmp_path):
    """Buttons, files good and bad, an empty canvas; nothing from the internet, and the server runs on."""
    page = Page(tiny.path, tmp_path, tmp_path)
    try:
        page.draw(STROKES["7"])
        page.wait(lambda: page.read("prediction"))
        page.clear()
        upload = page.driver.find_element("id", "file")
        for path, says in bad_files(tmp_path).values():
            upload.send_keys(str(path))
            page.wait(lambda name=path.name, says=says: name in page.text() and says in page.text())
        Image.new("L", (50, 50), 255).save(tmp_path / "paper.png")
        with Image.open(tmp_path / "paper.png") as paper:
            ImageDraw.Draw(paper).line([(20, 10), (20, 40)], fill=0, width=5)
            paper.save(tmp_path / "one.png")
        upload.send_keys(str(tmp_path / "one.png"))
        page.wait(lambda: page.read("prediction"))
        page.clear()
        page.drop("dropped.png", (tmp_path / "one.png").read_bytes())
        page.wait(lambda: page.read("prediction"))
        page.drop("letter.txt", b"Dear model,")
        page.wait(lambda: "letter.txt cannot be read" in page.text())
        page.draw(STROKES["1"])
        page.wait(lambda: page.read("prediction"))
        page.clear()
        for button in ("random", "hard"):
            page.driver.find_element("id", button).click()
            page.wait(lambda: "✓" in page.text() or "it is" in page.text())
            page.clear()
        assert page.foreign() == []
    finally:
        printed = page.close()
    assert printed.strip() == "stopped"


@needs_browser
def test_fingers_keys_screen_readers_and_long_names(tmp_path):
    page = Page(untrained(tmp_path, "fashion-mnist").path, tmp_path, tmp_path)
    try:
        assert "Draw a garment" in page.driver.execute_script("return document.body.innerText")
        focused, ring, live = page.driver.execute_script("""
            const file = document.getElementById('file');
            file.focus();
            return [document.activeElement === file, getComputedStyle(file.parentElement).outlineStyle,
                    document.getElementById('answer').getAttribute('aria-live')]""")
        assert focused and ring == "solid", "keys reach it, and one sees that"
        assert live == "polite"
        right = {"pointerId": 1, "button": 2, "buttons": 2}
        page.point(("pointerdown", 0.5, 0.5, right), ("pointermove", 0.5, 0.8, right),
                   ("pointerup", 0.5, 0.8, right))
        assert not page.has_ink(0.5, 0.5)
        finger, palm = {"pointerId": 2}, {"pointerId": 3}
        page.point(("pointerdown", 0.2, 0.2, finger), ("pointerdown", 0.8, 0.2, palm),
                   ("pointermove", 0.2, 0.5, finger), ("pointermove", 0.8, 0.5, palm),
                   ("pointerup", 0.8, 0.5, palm), ("pointermove", 0.2, 0.8, finger),
                   ("pointerup", 0.2, 0.8, finger), ("pointermove", 0.8, 0.8, palm))
        assert page.has_ink(0.2, 0.35) and page.has_ink(0.2, 0.75)
        assert not page.has_ink(0.5, 0.5) and not page.has_ink(0.8, 0.5)
        page.wait(lambda: page.read("prediction"))
        lefts, wide = page.driver.execute_script("""
            const big = document.getElementById('prediction'), bars = document.querySelectorAll('.bar i');
            big.textContent = 'ankle boot';  // the longest
            return [[...bars].map(bar => bar.getBoundingClientRect().left), big.scrollWidth]""")
        assert len(set(lefts)) == 1 and wide <= 150, "bars begin at one place, and no name lies on them"
    finally:
        page.close()


@needs_browser
@pytest.mark.skipif(not SHIPPED.is_file(), reason=f"{SHIPPED.name} is not there")
def test_handwriting_is_recognised_in_chromium(tmp_path):
    page = Page(SHIPPED, ROOT / "data", tmp_path)
    try:
        for digit, points in STROKES.items():
            page.draw(points)
            page.wait(lambda digit=digit: page.read("prediction") == digit)
            assert re.search(r"answered in \d+ ms", page.read("took"))
            page.clear()
        assert page.foreign() == []
    finally:
        page.close()
