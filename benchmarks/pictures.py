"""Make the pictures of README.md anew, in images/, from a trained model.

    python benchmarks/pictures.py --checkpoint checkpoints/vision_mamba2_mnist.pt

The page is photographed in Chromium, which needs requirements-dev.txt and Debian's chromium and
chromium-driver.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of the repository

import torch
from PIL import Image

import explain
import figures
import scan_figures
from errors import ArgumentParser, UserError, run_script
from tests.page import MISSING, Page
from trained import TrainedModel

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "images"
SEVEN = [(0.27, 0.24), (0.5, 0.22), (0.73, 0.2), (0.66, 0.38), (0.55, 0.6), (0.47, 0.83)]


def main() -> None:
    parser = ArgumentParser(description="Make the pictures of README.md anew, in images/.")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", required=True, help="the trained model")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", default=ROOT / "data",
                        help="where datasets are kept")
    arguments = parser.parse_args()
    if MISSING:
        raise UserError(f"not installed: {', '.join(MISSING)}; run: pip install -r requirements-dev.txt, and "
                        "apt-get install chromium chromium-driver")
    trained = TrainedModel(arguments.checkpoint, torch.device("cpu"), ROOT / "runs", arguments.data_dir)
    chosen = explain.one_of_each_class(trained.dataset.test.labels)[[0, 2, 3, 7]]
    images = trained.dataset.test.images[chosen]
    scans = explain.record(trained.model, trained.normalize(images))
    figures.save(explain.draw(images, scans)["delta.png"], IMAGES / "delta.png")
    scan_figures.save_animation(explain.animate(images, scans, 2), IMAGES / "state.gif")
    with tempfile.TemporaryDirectory() as folder:
        page = Page(arguments.checkpoint, arguments.data_dir, Path(folder))
        try:
            page.draw(SEVEN)
            page.wait(lambda: page.read("prediction"))
            page.wait(lambda: page.driver.execute_script("return document.readyState") == "complete")
            page.driver.save_screenshot(str(Path(folder) / "page.png"))
            with Image.open(Path(folder) / "page.png") as picture:
                picture.convert("RGB").quantize(128).save(IMAGES / "page.png", optimize=True)
        finally:
            page.close()
    for path in sorted(IMAGES.iterdir()):
        print(f"images/{path.name}: {path.stat().st_size / 1024:,.0f} KiB")


if __name__ == "__main__":
    run_script(main)
