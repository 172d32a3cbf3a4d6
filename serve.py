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
import tempfile
import threading
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import evaluate
import explain
from errors import UserError
from picture_file import MAX_PIXELS
from trained import TrainedModel

ADDRESS = "127.0.0.1"
HEAT = matplotlib.colormaps["magma"]
MOST_MAPS = 8
DRAWN = {"kmnist": "character", "emnist": "character", "fashion-mnist": "garment"}  # others: a digit
HARDEST, SEARCHED = 24, 2000  # the button goes through that many, out of so many test images


class Answers:
    """What the page shows for an image, as HTML. Calls from several threads wait for each other."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained
        self.thing = DRAWN.get(trained.dataset_name, "digit")
        self.lock = threading.Lock()  # hooks and Numba's threads serve one call at a time
        self.random = np.random.default_rng()
        self.hardest: list[int] | None = None  # of the test images, found when first asked for
        self.asked = 0
        with self.lock:  # the first pass compiles
            self._run(torch.zeros(1, *trained.shape, dtype=torch.uint8))

    def drawing(self, picture: str) -> str:
        """Of what is on the canvas, a PNG as data URL: white ink on black."""
        started = time.perf_counter()
        try:
            raw = base64.b64decode(picture.partition(",")[2], validate=True)
            with Image.open(io.BytesIO(raw), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError
                image.thumbnail((512, 512))
                grey = np.asarray(image.convert("L"), np.float32)
        except Exception:  # whatever else than the page sent this
            return message("the drawing did not arrive as a PNG; draw it again")
        if grey.max() == 0:
            return self.invitation()
        try:
            return self.show(self.trained.drawing(grey, "the canvas"), None, started)
        except UserError as error:
            return message(str(error))

    def invitation(self) -> str:
        return message(f"draw a {self.thing}, or drop a picture of one")

    def file(self, path: Path, name: str) -> tuple[str, Tensor | None]:
        """Of a picture file, and the image that the model saw."""
        started = time.perf_counter()
        try:
            image = self.trained.picture(path)
        except UserError as error:
            return message(str(error).replace(str(path), name)), None
        return self.show(image, None, started), image

    def random_digit(self) -> tuple[str, Tensor]:
        return self._test_digit(int(self.random.integers(len(self._test().labels))))

    def hard_digit(self) -> tuple[str, Tensor]:
        """The test images that the model is least right about, one after the other."""
        with self.lock:
            if self.hardest is None:
                test = data.Split(*(tensor[:SEARCHED] for tensor in self.trained.dataset.test))
                probabilities = evaluate.predict(self.trained.model, test, self.trained.dataset,
                                                 self.trained.device)
                given_to_truth = probabilities.gather(1, test.labels[:, None])[:, 0]
                self.hardest = given_to_truth.argsort()[:HARDEST].tolist()
            number = self.hardest[self.asked % len(self.hardest)]
            self.asked += 1
        return self._test_digit(number)

    def _test(self) -> data.Split:
        """The test set, which the first of several calls loads."""
        with self.lock:
            return self.trained.dataset.test

    def _test_digit(self, number: int) -> tuple[str, Tensor]:
        images, labels = self._test()
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
        maps = [("what it sees", picture_url(image[0].permute(1, 2, 0).squeeze(-1).numpy()))]
        for scan in scans[:MOST_MAPS]:
            values = scan.delta_map()[0].numpy()  # each has colours of its own, so the range must be told
            maps.append((f"Δ, {scan.name}<br>{values.min():#.3g}–{values.max():#.3g}",
                         picture_url(heat(values))))
        figures = "".join(f'<figure><img src="{url}" alt=""><figcaption>{name}</figcaption></figure>'
                          for name, url in maps)
        took = 1000 * (time.perf_counter() - started)
        letters = max(map(len, self.trained.classes))
        return (f'<div class="answer" style="--letters:{letters}"><div class="prediction">'
                f'<b id="prediction">{classes[best]}</b><span>{100 * row[best]:.1f}% {verdict}</span></div>'
                f'<div class="bars" aria-live="off">{bars}</div></div>'
                f'<div class="maps" aria-live="off">{figures}</div>'
                f'<p class="note" id="took" aria-live="off">answered in {took:.0f} ms. Δ: how much each '
                'token writes into the state; light: more than other tokens.</p>')

    def _run(self, image: Tensor) -> tuple[Tensor, list[explain.Scan]]:
        """Logits and scans of one forward pass; no scans of a model without any."""
        images = self.trained.normalize(image)
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


def canvas_value(image: Tensor) -> str:
    """What lays `image` (1, 1, H, W) on the canvas; its number makes it new even if the image is the same."""
    return f"{time.monotonic_ns()} {picture_url(image[0, 0].numpy())}"


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
    # Nothing is sent anywhere: not to Gradio, and not through a proxy to this machine itself.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), ADDRESS, "localhost"]))
    import draw_page  # here, because Gradio is optional and takes seconds
    page = draw_page.build(Answers(trained))
    # Gradio's own folder would keep what is dropped, where every user of the machine can read it.
    with tempfile.TemporaryDirectory(prefix="draw-", ignore_cleanup_errors=True) as dropped:
        os.environ["GRADIO_TEMP_DIR"] = dropped
        page.launch(server_name=ADDRESS, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                    inbrowser=browser, max_file_size="64mb", footer_links=[], ssr_mode=False,
                    **draw_page.options())
        print(f"draw on http://{ADDRESS}:{port} (Ctrl-C ends it)", flush=True)
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
