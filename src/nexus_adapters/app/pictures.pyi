"""Images side by side with their names, as a component of the page: those of a generation, and the gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from nexus_adapters.app.assets import text_of


@dataclass(frozen=True)
class Picture:
    """One image, or the place where one will be.

    Attributes:
        name: the text under it.
        file: the finished image.
        preview: a small picture of an image that is not finished.
        share: how much of the work is done, from 0 to 1; None if it has not begun.
        text: what happens, or a description of the image.
    """

    name: str
    file: Path | None = None
    preview: Image.Image | None = None
    share: float | None = None
    text: str = ""

    def item(self) -> dict[str, Any]:
        """Return what the page reads."""
        address = ""
        if self.file is not None:
            address = address_of(self.file)
        elif self.preview is not None:
            address = _data_url(self.preview)
        return {
            "name": self.name,
            "address": address,
            "file": "" if self.file is None else self.file.name,
            "done": self.file is not None,
            "share": self.share,
            "text": self.text,
        }


def address_of(file: Path) -> str:
    """Return the address of a file of a session, relative to the page."""
    return f"gradio_api/file={quote(str(file))}"

from gradio.events import Dependency

class Pictures(gr.HTML):
    """Images side by side; the event `select` gives the index of the chosen one."""

    def __init__(self, value: Any = None, *, hint: str = "", **options: Any) -> None:
        texts = {
            "html_template": '<div class="nexus-pictures"></div>',
            "js_on_load": text_of("pictures.js"),
            "apply_default_css": False,
        }
        super().__init__(value, hint=hint, **(options | texts))

    def preprocess(self, payload: Any) -> None:
        """Return nothing: what the page shows is known on the server."""

    def postprocess(self, value: Any) -> dict[str, Any]:
        """Return what the page reads, of (pictures, index of the selected one or None)."""
        pictures, selected = value or ((), None)
        return shown(pictures, selected, self.props["hint"])

    def api_info(self) -> dict[str, Any]:
        """Return the type of the value, for Gradio's description of the API."""
        return {"type": "object"}
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


def shown(pictures: Sequence[Picture], selected: int | None, hint: str) -> dict[str, Any]:
    """Return the value that the page reads."""
    return {"items": [each.item() for each in pictures], "selected": selected, "hint": hint}


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()