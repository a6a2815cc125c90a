"""Images side by side with their names: those of one generation, and the gallery."""

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


def pictures(hint: str, **options: Any) -> gr.HTML:
    """Add images side by side to the page; its event `select` gives the index of the chosen one.

    Args:
        hint: text in place of no images.
        options: of `gr.HTML`.
    """
    return gr.HTML(
        shown((), None),
        html_template='<div class="nexus-pictures"></div>',
        js_on_load=text_of("pictures.js"),
        apply_default_css=False,
        hint=hint,
        **options,
    )


def shown(items: Sequence[Picture], selected: int | None) -> dict[str, Any]:
    """Return what the page reads, with the index of the selected image or None."""
    return {"items": [each.item() for each in items], "selected": selected}


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
