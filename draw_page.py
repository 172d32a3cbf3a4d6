"""The page to draw on, in Gradio's terms; what it answers is `serve.Answers`, its canvas is in web/.

Needs Gradio, which is optional; import this module where it is used.
"""

import html
from pathlib import Path

import fastapi
import gradio

from serve import Answers, canvas_value, message

WEB = Path(__file__).parent / "web"
EVENT = {"picture", "file", "name"}  # what canvas.js says of a drawing, or of a file


def options() -> dict:
    """For `launch`; the system's fonts, because Gradio's own come from the internet."""
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return {"theme": theme, "css": (WEB / "page.css").read_text(encoding="utf-8"),
            "app_kwargs": {"dependencies": [fastapi.Depends(refuse)]}}


async def refuse(request: fastapi.Request) -> None:
    """Answer 422 to a call that the page does not make, where Gradio would fail and print a traceback.

    A `path` in an event is such, as Gradio looks for it before we see it; the page calls a file's `file`.
    """
    if not request.headers.get("content-type", "").startswith("application/json"):
        return
    try:
        body = await request.json()
    except ValueError:
        return  # Gradio says so itself
    if not isinstance(body, dict) or "data" not in body:
        return
    event = body.get("event_data") or {}
    texts = event.values() if isinstance(event, dict) and event.keys() <= EVENT else [None]
    if body.get("fn_index") not in list(request.app.get_blocks().fns) or not all(
            isinstance(text, str) and "\0" not in text for text in texts):
        raise fastapi.HTTPException(422, "the page does not ask like this")


def build(answers: Answers) -> gradio.Blocks:
    def draw(event: gradio.EventData) -> str:
        return answers.drawing((event._data or {}).get("picture", ""))

    def drop(event: gradio.EventData) -> tuple:
        told = event._data or {}
        name, path = told.get("name", "the file"), Path(told.get("file", ""))
        if not path.resolve().is_relative_to(Path(gradio.utils.get_upload_folder()).resolve()):
            return message(f"{name} could not be taken; use a picture below 64 MB"), gradio.skip()
        answer, image = answers.file(path, name)
        return answer, gradio.skip() if image is None else canvas_value(image)

    def random_digit() -> tuple[str, str]:
        answer, image = answers.random_digit()
        return answer, canvas_value(image)

    def hard_digit() -> tuple[str, str]:
        answer, image = answers.hard_digit()
        return answer, canvas_value(image)

    trained, thing = answers.trained, answers.thing
    with gradio.Blocks(title=f"Vision Mamba: draw a {thing}", analytics_enabled=False) as page:
        gradio.HTML(f"<h1>Draw a {thing}</h1><p class='note'>{html.escape(trained.run_name)}, trained on "
                    f"{html.escape(trained.dataset_name)}</p>")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                canvas = gradio.HTML("", thing=thing,
                                     html_template=(WEB / "canvas.html").read_text(encoding="utf-8"),
                                     js_on_load=(WEB / "canvas.js").read_text(encoding="utf-8"))
                with gradio.Row():
                    small = {"size": "sm", "min_width": 120}
                    random_button = gradio.Button(f"Random test {thing}", elem_id="random", **small)
                    hard_button = gradio.Button("One of the hardest", elem_id="hard", **small)
            with gradio.Column(scale=3, min_width=320):
                # Read out when it changes: what is predicted, and not ten bars (serve.py) at every stroke.
                read_out = "element.closest('#answer').setAttribute('aria-live', 'polite')"
                answer = gradio.HTML(answers.invitation(), elem_id="answer", js_on_load=read_out)
        # Unqueued: an answer is faster than the queue. Of strokes that come while one is answered, the last.
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        canvas.drawn(draw, None, answer, trigger_mode="always_last", **quick)
        canvas.dropped(drop, None, [answer, canvas], **quick)
        random_button.click(random_digit, None, [answer, canvas], **quick)
        hard_button.click(hard_digit, None, [answer, canvas], **quick)
    return page
