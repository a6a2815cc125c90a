"""A canvas to draw on or drop an image on. What the browser sends is checked before it is decoded."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from nexus_adapters.app.assets import text_of
from nexus_adapters.conditions.images import decode_image, open_image
from nexus_adapters.errors import InvalidArgument, expect

_START = "data:image/png;base64,"
_PNG = b"\x89PNG\r\n\x1a\n"
MAX_BYTES = 16 * 2**20
"""Largest PNG file that the page sends for one canvas."""
MAX_MEGAPIXELS = 8.0
"""Largest image of one canvas. The page makes larger ones smaller before it sends them."""


@dataclass(frozen=True)
class Drawn:
    """What is on a canvas.

    Attributes:
        png: the content of a PNG file; None for an empty canvas.
        is_edited: whether the user drew on it since it was last filled by the page.
    """

    png: bytes | None = None
    is_edited: bool = False

    def rgb(self, argument: str = "image") -> Image.Image:
        """Return the pixels, without anything else in the file. `InvalidArgument` for a damaged file."""
        assert self.png is not None
        return decode_image(self.png, MAX_MEGAPIXELS, argument)


@dataclass(frozen=True)
class Paper:
    """How one draws on a canvas.

    Attributes:
        ground: the color of an empty canvas and of the eraser, as #rrggbb.
        colors: (name, #rrggbb) of each color of the brush.
        filled: whether rectangles and ellipses are filled.
        thickness: of the brush, in pixels, at first.
        has_names: whether the names of the colors say more than the colors do.
    """

    ground: str
    colors: Sequence[tuple[str, str]]
    filled: bool
    thickness: int
    has_names: bool = False

    def props(self) -> dict[str, Any]:
        """Return what the page reads."""
        colors = [list(color) for color in self.colors]
        return {
            "ground": self.ground,
            "colors": colors,
            "filled": self.filled,
            "thickness": self.thickness,
            "named": self.has_names,
        }


def read(value: object, argument: str = "image") -> Drawn:
    """Check what the page sent for a canvas, without decoding pixels.

    Raises:
        InvalidArgument: for anything but None or a PNG file of moderate size in a data URL.
    """
    if value is None:
        return Drawn()
    expect(isinstance(value, Mapping), argument, "a drawing of this page", type(value).__name__)
    assert isinstance(value, Mapping)
    url = value.get("image")
    if url is None:
        return Drawn(None, bool(value.get("edited")))
    is_png = isinstance(url, str) and url.startswith(_START)
    expect(is_png, argument, "a PNG image in a data URL", "something else")
    megabytes = f"{len(url) * 3 / 4 / 2**20:.0f} MB"
    expect(len(url) <= MAX_BYTES * 4 / 3, argument, f"at most {MAX_BYTES / 2**20:.0f} MB", megabytes)
    try:
        png = base64.b64decode(url[len(_START) :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(argument, "a PNG image in a data URL", "damaged base64") from error
    expect(png.startswith(_PNG), argument, "a PNG image", "another kind of file")
    with open_image(png, MAX_MEGAPIXELS, argument):
        pass
    return Drawn(png, bool(value.get("edited")))


def data_url(png: bytes) -> str:
    """Return a PNG file's content as a data URL."""
    return _START + base64.b64encode(png).decode()


def png_of(image: Image.Image) -> bytes:
    """Return an image as the content of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def canvas(value: Drawn, props: Mapping[str, Any], **options: Any) -> gr.HTML:
    """Add a canvas to the page, with brush, shapes, eraser, undo, files by drop or paste, and the keyboard.

    It is no class of its own, since gradio writes a file of type hints next to each subclass of a component.

    Args:
        value: what is on it at first.
        props: see `props_of`. An update replaces all of them.
        options: of `gr.HTML`.
    """
    return gr.HTML(
        value_of(value),
        html_template=text_of("canvas.html"),
        js_on_load=text_of("canvas.js"),
        apply_default_css=False,
        **props,
        **options,
    )


def props_of(name: str, hint: str, paper: Paper, size: int, behind: Drawn | None = None) -> dict[str, Any]:
    """Return what a canvas reads in addition to its value.

    Args:
        name: for screen readers.
        hint: text on the empty canvas.
        paper: how one draws on it.
        size: side of an empty canvas in pixels. Images are reduced to 1.5 times that, or to 512.
        behind: an image behind the canvas, which CSS makes transparent.
    """
    return {
        "name": name,
        "hint": hint,
        "behind": data_url(behind.png) if behind and behind.png else "",
        "size": [size, size],
        "largest": max(512, size * 3 // 2),
        **paper.props(),
    }


def value_of(drawn: Drawn) -> dict[str, Any]:
    """Return what the page shows on a canvas."""
    return {"image": data_url(drawn.png) if drawn.png else None, "edited": False}
