"""One HTML file with everything, pictures embedded, that opens from the disk without a server."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import checkpoint
from errors import UserError

TYPES = {".png": "image/png", ".gif": "image/gif"}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #22272e; background: white; max-width: 960px;
       margin: 0 auto; padding: 24px; }
h1 { margin: 0; } h2 { margin-top: 48px; border-top: 1px solid #c9ced6; padding-top: 20px; }
.quiet { color: #6b7480; } img { max-width: 100%; height: auto; display: block; margin: 16px 0; }
nav a { margin-right: 14px; } table { border-collapse: collapse; margin: 16px 0; }
td, th { padding: 4px 18px 4px 0; text-align: left; border-bottom: 1px solid #eef1f4; }
"""


def write(path: Path, title: str, about: str, numbers: Sequence[tuple[str, str]],
          sections: Sequence[tuple[str, str, Sequence[Path]]]) -> None:
    """Write a report to `path`, whole or not at all.

    numbers   lines (name, value) of a table at the top
    sections  (heading, a sentence or two, picture files); all text is plain

    Raises UserError where a picture cannot be read or the report not be written.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p class='quiet'>{html.escape(about)}</p>",
             "<nav>" + "".join(f"<a href='#{number}'>{html.escape(heading)}</a>"
                               for number, (heading, _, _) in enumerate(sections)) + "</nav>",
             "<table>" + "".join(f"<tr><td>{html.escape(name)}</td><th>{html.escape(value)}</th></tr>"
                                 for name, value in numbers) + "</table>"]
    try:
        for number, (heading, text, pictures) in enumerate(sections):
            parts.append(f"<h2 id='{number}'>{html.escape(heading)}</h2><p>{html.escape(text)}</p>")
            parts += [f"<img alt='{html.escape(picture.stem)}' src='{_embedded(picture)}'>"
                      for picture in pictures]
        head = (f"<meta charset='utf-8'><title>{html.escape(title)}</title>"
                f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style>")
        body = "\n".join(parts)
        page = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.whole_file(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; free space or choose another "
                        "--runs-dir") from error


def _embedded(picture: Path) -> str:
    return f"data:{TYPES[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"
