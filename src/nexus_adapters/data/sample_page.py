"""An HTML page that shows a few samples, evenly spaced over a dataset, with embedded images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from nexus_adapters.data.inspection import evenly_spaced
from nexus_adapters.data.samples import BadSample
from nexus_adapters.errors import InvalidArgument, in_utf8

ROWS = 12
_SIDE = 224  # pixels; the longer side of a thumbnail

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: {width}px; color: #1a1a1a; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
p {{ margin: .2rem 0 0; color: #6b6b6b; }}
figure {{ margin: 1.6rem 0 0; padding-top: 1.2rem; border-top: 1px solid #d9d9d9; }}
div {{ display: flex; flex-wrap: wrap; gap: 12px; }}
span {{ width: {side}px; font-size: 13px; color: #6b6b6b; }}
img {{ display: block; max-width: {side}px; max-height: {side}px; }}
figcaption {{ margin-top: .6rem; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{rows}
</html>
"""
_ROW = "<figure><div>{cells}</div><figcaption>{caption}<p>{key}</p></figcaption></figure>"
_CELL = '<span><img src="data:image/webp;base64,{data}" alt="">{name}</span>'


@dataclass(frozen=True)
class Row:
    """A sample on the page: its images by name, its captions, and its key."""

    images: Mapping[str, Image.Image]
    captions: Sequence[str]
    key: str


def read_rows(argument: str, indices: Sequence[int], read: Callable[[int], Row]) -> list[Row]:
    """Read at most `ROWS` of the samples, evenly spaced, without those that cannot be used.

    Args:
        argument: name of the argument with the dataset, for errors.
        indices: indices of the samples.
        read: reads a row; raises BadSample if the sample cannot be used.

    Raises:
        InvalidArgument: if none of them can be used; it says why the last one cannot.
    """
    rows, reason = [], "no samples"
    for index in evenly_spaced(indices, ROWS):
        try:
            rows.append(read(index))
        except BadSample as error:
            reason = str(error)
    if not rows:
        raise InvalidArgument(argument, "usable samples", f"none among the samples to show ({reason})")
    return rows


def page(title: str, summary: str, rows: Sequence[Row]) -> str:
    """Return an HTML page of samples with embedded images."""
    columns = max((len(row.images) for row in rows), default=1)
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape(in_utf8(summary)),
        width=(_SIDE + 12) * columns,
        side=_SIDE,
        rows="\n".join(map(_figure, rows)),
    )


def _figure(row: Row) -> str:
    cells = "".join(
        _CELL.format(data=thumbnail(image, _SIDE), name=html.escape(name))
        for name, image in row.images.items()
    )
    caption = "<br>".join(html.escape(in_utf8(caption)) for caption in row.captions)
    return _ROW.format(cells=cells, caption=caption, key=html.escape(in_utf8(row.key)))


def thumbnail(image: Image.Image, side: int) -> str:
    """Return the image, shrunk to at most `side` pixels, as base64-encoded WebP for an HTML image."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=85)
    return base64.b64encode(stream.getvalue()).decode()
