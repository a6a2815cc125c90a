"""A page that shows a few samples, evenly spaced over a prepared set or over what it will be made of."""

from __future__ import annotations

import base64
import html
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nexus_adapters.errors import in_utf8

ROWS = 12
_SIDE = 224  # pixels, of a thumbnail's longer side

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
    """A sample on the page: its images by name, its captions, and its name."""

    images: Mapping[str, Image.Image]
    captions: Sequence[str]
    key: str


def preview_page(
    shards: Sequence[tuple[Path, int]], conditions: Sequence[str], image_format: str, summary: str
) -> str:
    """The page of a prepared set, as HTML that includes its images.

    Args:
        shards: path and number of samples of each.
        conditions: names of the maps.
        image_format: extension of the images.
        summary: a line below the title.
    """
    total = sum(samples for _, samples in shards)
    rows = min(ROWS, total)
    # Sample number r * total / rows, without going through all of them.
    wanted = [row * total // rows for row in range(rows)]
    first, found = 0, []
    for path, samples in shards:
        places = [place - first for place in wanted if first <= place < first + samples]
        if places:
            found += [_row(files, key, conditions, image_format) for key, files in _samples(path, places)]
        first += samples
    return page("Prepared set", summary, found)


def page(title: str, summary: str, rows: Sequence[Row]) -> str:
    """A page of samples, as HTML that includes their images."""
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


def _samples(path: Path, places: Sequence[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files, by extension, of the samples at these places of a shard."""
    with tarfile.open(path) as tar:
        groups: dict[str, list[tarfile.TarInfo]] = {}
        for member in tar:
            groups.setdefault(member.name.partition(".")[0], []).append(member)
        keys = list(groups)
        for place in places:
            files = {}
            for member in groups[keys[place]]:
                content = tar.extractfile(member)
                assert content is not None
                files[member.name.partition(".")[2]] = content.read()
            yield keys[place], files


def _row(files: dict[str, bytes], key: str, conditions: Sequence[str], image_format: str) -> Row:
    named = {"image": files[image_format]} | {name: files[f"{name}.png"] for name in conditions}
    images = {name: _opened(content) for name, content in named.items()}
    return Row(images, [files["txt"].decode()], key)


def _opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def thumbnail(image: Image.Image, side: int) -> str:
    """The image at most `side` pixels long, as WebP in base64, for the source of an HTML image."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=85)
    return base64.b64encode(stream.getvalue()).decode()
