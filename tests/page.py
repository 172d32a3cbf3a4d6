"""`demo_mamba.py --serve`: the server, and its page in a real browser, Debian's chromium, by selenium."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name, there in (
    ("chromium", CHROMIUM), ("chromedriver", DRIVER), ("selenium", importlib.util.find_spec("selenium")),
    ("gradio", importlib.util.find_spec("gradio"))) if not there]
STROKES = {  # in fractions of the canvas
    "1": [(0.5, 0.15), (0.5, 0.5), (0.5, 0.85)],
    "7": [(0.25, 0.2), (0.75, 0.2), (0.6, 0.5), (0.45, 0.85)],
    "0": [(0.5, 0.15), (0.3, 0.3), (0.27, 0.5), (0.3, 0.7), (0.5, 0.85), (0.7, 0.7), (0.73, 0.5), (0.7, 0.3),
          (0.5, 0.15)],
}


class Server:
    """`demo_mamba.py --serve`, whose temporary files are in `folder`/temporary."""

    def __init__(self, model: Path, data_dir: Path, folder: Path):
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        while True:  # another program may take the port between our look and the server's
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.server = subprocess.Popen(
                [sys.executable, ROOT / "demo_mamba.py", "--serve", "--no-show", "--device", "cpu",
                 "--port", str(port), "--checkpoint", model, "--data-dir", data_dir,
                 "--runs-dir", folder / "runs"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "TMPDIR": str(self.temporary), "TMP": str(self.temporary)},
                # A shell makes what it starts in the background deaf to Ctrl-C, and we may be in there.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            self.printed = self.server.stdout.readline()
            if "cannot be used" not in self.printed:
                break
            self.server.communicate()
        self.url = f"http://127.0.0.1:{port}"
        assert self.url in self.printed

    def post(self, path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
        """Status and text of what is answered to a program that is not the page."""
        request = urllib.request.Request(f"{self.url}/gradio_api/{path}", body, {"content-type": kind})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def close(self) -> str:
        """What the server printed after a Ctrl-C."""
        self.server.send_signal(signal.SIGINT)
        printed, _ = self.server.communicate(timeout=120)
        assert self.server.returncode == 0
        return printed


class Page(Server):
    """The page open in Chromium with no way to the internet."""

    def __init__(self, model: Path, data_dir: Path, folder: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        super().__init__(model, data_dir, folder)
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                     "--window-size=1100,800", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                     f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.driver.get(self.url)
        self.wait(lambda: self.driver.find_elements("id", "canvas"))

    def wait(self, condition, seconds: float = 120):
        """Ask `condition` until it is true; returns what it gave."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"waited in vain; the page says: {self.text()}"
            time.sleep(0.05)
        return found

    def text(self) -> str:
        return self.driver.execute_script("return document.getElementById('answer').innerText")

    def read(self, name: str) -> str:
        return self.driver.execute_script(
            "return document.getElementById(arguments[0])?.innerText ?? ''", name)

    def draw(self, points: list[tuple[float, float]]) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        pad = self.driver.find_element("id", "canvas")
        places = [(round((x - 0.5) * pad.size["width"]), round((y - 0.5) * pad.size["height"]))
                  for x, y in points]
        pen = ActionChains(self.driver, duration=30)
        pen.move_to_element_with_offset(pad, *places[0]).click_and_hold()
        for place in places[1:]:
            pen.move_to_element_with_offset(pad, *place)
        pen.release().perform()

    def point(self, *events: tuple[str, float, float, dict]) -> None:
        """Pointer events as no mouse alone gives them: (type, x and y in fractions of the canvas, more)."""
        self.driver.execute_script("""
            const canvas = document.getElementById('canvas'), box = canvas.getBoundingClientRect();
            canvas.setPointerCapture = () => {};  // it refuses pointers that are not there
            for (const [type, x, y, more] of arguments[0])
                canvas.dispatchEvent(new PointerEvent(type, {bubbles: true, cancelable: true, ...more,
                    clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
            """, events)

    def has_ink(self, x: float, y: float) -> bool:
        """Whether the canvas is white there."""
        return self.driver.execute_script("""
            const canvas = document.getElementById('canvas');
            const [red] = canvas.getContext('2d').getImageData(
                arguments[0] * canvas.width, arguments[1] * canvas.height, 1, 1).data;
            return red > 127""", x, y)

    def drop(self, name: str, content: bytes) -> None:
        """Drop a file on the canvas."""
        self.driver.execute_script("""
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(arguments[1])], arguments[0]));
            document.getElementById('canvas').dispatchEvent(
                new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}));
            """, name, list(content))

    def clear(self) -> None:
        self.driver.find_element("id", "clear").click()
        self.wait(lambda: "draw a digit" in self.read("message"))

    def foreign(self) -> list[str]:
        """What the page asked of other hosts."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [message["params"]["request"]["url"] for message in messages
                if message["method"] == "Network.requestWillBeSent"]
        assert urls
        return [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome"))]

    def close(self) -> str:
        self.driver.quit()
        return super().close()
