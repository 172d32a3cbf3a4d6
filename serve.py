"""A page to draw a digit on: the prediction, the ten probabilities and the Δ maps change as one draws.

    python demo_mamba.py --serve

Gradio serves it on 127.0.0.1 alone, and nothing on it comes from the internet. Whatever is drawn or dropped
goes through `pictures.prepare_grey`, which centres and scales it as MNIST's makers did, so that handwriting
is recognised. A picture that cannot be used costs one line on the page; the server runs on.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import os
import socket
import threading
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import evaluate
import explain
from augment import normalize
from errors import UserError
from pictures import prepare_grey, prepare_picture
from trained import TrainedModel

ADDRESS = "127.0.0.1"
HEAT = matplotlib.colormaps["magma"]
MOST_MAPS = 8
HARDEST = 24  # the button goes through that many
PAGE = Path(__file__).parent / "page"  # the canvas in HTML, CSS and JavaScript


class Answers:
    """What the page shows for an image, as HTML. Calls from several threads wait for each other."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained
        self.lock = threading.Lock()  # hooks and Numba's threads serve one call at a time
        self.random = np.random.default_rng()
        self.hardest: list[int] | None = None  # of the test images, found when first asked for
        self.asked = 0

    def drawing(self, picture: str) -> str:
        """Of what is on the canvas, a PNG as data URL: white ink on black."""
        started = time.perf_counter()
        try:
            raw = base64.b64decode(picture.partition(",")[2], validate=True)
            with Image.open(io.BytesIO(raw), formats=("PNG",)) as image:
                image.thumbnail((512, 512))
                grey = np.asarray(image.convert("L"), np.float32)
        except Exception:  # whatever else than the page sent this
            return message("the drawing did not arrive as a PNG; draw it again")
        if grey.max() == 0:
            return message("draw a digit, or drop a picture of one")
        try:
            return self.show(prepare_grey(grey, self.trained.shape[1], "the canvas"), None, started)
        except UserError as error:
            return message(str(error))

    def file(self, path: Path, name: str) -> tuple[str, Tensor | None]:
        """Of a picture file, and the image that the model saw."""
        started = time.perf_counter()
        try:
            image = prepare_picture(path, self.trained.shape[1])
        except UserError as error:
            return message(str(error).replace(str(path), name)), None
        return self.show(image, None, started), image

    def random_digit(self) -> tuple[str, Tensor]:
        return self._test_digit(int(self.random.integers(len(self.trained.dataset.test.labels))))

    def hard_digit(self) -> tuple[str, Tensor]:
        """The test images that the model is least right about, one after the other."""
        with self.lock:
            if self.hardest is None:
                test = self.trained.dataset.test
                probabilities = evaluate.predict(self.trained.model, test, self.trained.dataset,
                                                 self.trained.device)
                given_to_truth = probabilities.gather(1, test.labels[:, None])[:, 0]
                self.hardest = given_to_truth.argsort()[:HARDEST].tolist()
            number = self.hardest[self.asked % len(self.hardest)]
            self.asked += 1
        return self._test_digit(number)

    def _test_digit(self, number: int) -> tuple[str, Tensor]:
        images, labels = self.trained.dataset.test
        started = time.perf_counter()
        return self.show(images[number:number + 1], int(labels[number]), started), images[number:number + 1]

    def show(self, image: Tensor, truth: int | None, started: float) -> str:
        """The answer to `image` (1, C, H, W) uint8; its class where it is known."""
        with self.lock, torch.inference_mode():
            logits, scans = self._run(image)
        row = logits.softmax(dim=-1)[0].numpy()
        best = int(row.argmax())
        classes = [html.escape(name) for name in self.trained.classes]
        verdict = "" if truth is None else "✓" if truth == best else f"✗ it is {classes[truth]}"
        bars = "".join(
            f'<div class="bar{" best" if place == best else ""}"><b>{name}</b>'
            f'<i><u style="width:{100 * value:.1f}%"></u></i><span>{100 * value:.1f}%</span></div>'
            for place, (name, value) in enumerate(zip(classes, row, strict=True)))
        maps = [("as the model sees it", picture_url(image[0].permute(1, 2, 0).squeeze(-1).numpy()))]
        maps += [(f"Δ, {scan.name}", picture_url(heat(scan.delta_map()[0].numpy())))
                 for scan in scans[:MOST_MAPS]]
        figures = "".join(f'<figure><img src="{url}" alt=""><figcaption>{name}</figcaption></figure>'
                          for name, url in maps)
        took = 1000 * (time.perf_counter() - started)
        return (f'<div class="answer"><div class="prediction"><strong id="prediction">{classes[best]}</strong>'
                f'<span>{100 * row[best]:.1f}% {verdict}</span></div><div class="bars">{bars}</div></div>'
                f'<div class="maps">{figures}</div><p class="note" id="took">answered in {took:.0f} ms. '
                'Δ: how much each token writes into the state; light is much.</p>')

    def _run(self, image: Tensor) -> tuple[Tensor, list[explain.Scan]]:
        """Logits and scans of one forward pass; no scans of a model without any."""
        images = normalize(image.to(self.trained.device), self.trained.mean, self.trained.std)
        logits: list[Tensor] = []
        handle = self.trained.model.register_forward_hook(lambda *call: logits.append(call[2]))
        try:
            scans = explain.record(self.trained.model, images)
        except UserError:
            scans = []
            self.trained.model(images)
        finally:
            handle.remove()
        return logits[-1].float().cpu(), scans


def message(text: str) -> str:
    return f'<p class="message" id="message">{html.escape(" ".join(text.split()))}</p>'


def heat(values: np.ndarray) -> np.ndarray:
    """(h, w) → (h, w, 3) uint8, dark to light over their own range."""
    low, high = values.min(), values.max()
    return np.uint8(255 * HEAT((values - low) / max(high - low, 1e-9))[..., :3])


def picture_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------ the page


def serve(trained: TrainedModel, port: int, browser: bool) -> None:
    """Serve the page on http://127.0.0.1:`port` till Ctrl-C; `browser` opens it there, too.

    Raises UserError for a model of colour images, a missing Gradio and a port in use.
    """
    if trained.shape[0] != 1:
        raise UserError(f"--serve draws in grey, but {trained.path} is for colour images; choose another")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--serve needs Gradio; run: pip install -r requirements-demo.txt")
    check_port(port)
    page = build_page(trained)
    answers_ready = f"draw on http://{ADDRESS}:{port} (Ctrl-C ends it)"
    page.launch(server_name=ADDRESS, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                inbrowser=browser, max_file_size="64mb", footer_links=[], ssr_mode=False, **looks())
    print(answers_ready, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        page.close(verbose=False)


def check_port(port: int) -> None:
    """Raise UserError where nothing can listen on `port`."""
    with socket.socket() as trial:
        if os.name != "nt":  # where a port just left counts as free; on Windows it would count as shared
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((ADDRESS, port))
        except OSError as error:
            raise UserError(f"port {port} of {ADDRESS} cannot be used ({error.strerror}); choose another by "
                            "--port") from error


def looks() -> dict:
    """Theme and style of the page; fonts of the system, for Gradio's own are fetched."""
    import gradio
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return {"theme": theme, "css": (PAGE / "page.css").read_text(encoding="utf-8")}


def build_page(trained: TrainedModel):
    """The page as gradio.Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), ADDRESS, "localhost"]))
    import gradio
    answers = Answers(trained)

    def draw(event: gradio.EventData) -> str:
        return answers.drawing(str(event._data.get("picture", "")))

    def drop(event: gradio.EventData) -> tuple:
        path = Path(str(event._data.get("path", "")))
        if not path.resolve().is_relative_to(Path(gradio.utils.get_upload_folder()).resolve()):
            return message("only files that were dropped here are read"), gradio.skip()
        answer, image = answers.file(path, str(event._data.get("name", "the file")))
        return answer, gradio.skip() if image is None else on_canvas(image)

    def on_canvas(image: Tensor) -> str:
        # The number makes the value new even if the image is the same.
        return f"{time.monotonic_ns()} {picture_url(image[0, 0].numpy())}"

    def shown(digit: tuple[str, Tensor]) -> tuple[str, str]:
        return digit[0], on_canvas(digit[1])

    with gradio.Blocks(title="Vision Mamba: draw a digit", analytics_enabled=False) as page:
        gradio.HTML(f"<h1>Draw a digit</h1><p class='note'>{html.escape(trained.run_name)}, trained on "
                    f"{html.escape(trained.dataset_name)}</p>")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                canvas = gradio.HTML("", html_template=(PAGE / "canvas.html").read_text(encoding="utf-8"),
                                     js_on_load=(PAGE / "canvas.js").read_text(encoding="utf-8"))
                with gradio.Row():
                    random_button = gradio.Button("Random test digit", elem_id="random", min_width=120)
                    hard_button = gradio.Button("One of the hardest", elem_id="hard", min_width=120)
            with gradio.Column(scale=3, min_width=320):
                answer = gradio.HTML(message("draw a digit, or drop a picture of one"), elem_id="answer")
        # Unqueued: an answer is faster than the queue. Of strokes that come while one is answered, the last.
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        canvas.drawn(draw, None, answer, trigger_mode="always_last", **quick)
        canvas.dropped(drop, None, [answer, canvas], **quick)
        random_button.click(lambda: shown(answers.random_digit()), None, [answer, canvas], **quick)
        hard_button.click(lambda: shown(answers.hard_digit()), None, [answer, canvas], **quick)
    with answers.lock:  # the first pass compiles
        answers._run(torch.zeros(1, *trained.shape, dtype=torch.uint8))
    return page
