"""A page that shows a few samples of a prepared set, evenly spaced over all of it."""

from __future__ import annotations

import base64
import html
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

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


def preview_page(
    shards: Sequence[tuple[Path, int]], conditions: Sequence[str], image_format: str, summary: str
) -> str:
    """The page, as HTML that includes its images.

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
    first, figures = 0, []
    for path, samples in shards:
        places = [place - first for place in wanted if first <= place < first + samples]
        if places:
            figures += [_row(files, key, conditions, image_format) for key, files in _samples(path, places)]
        first += samples
    return _PAGE.format(
        title="Prepared set",
        summary=html.escape(summary),
        width=(_SIDE + 12) * (len(conditions) + 1),
        side=_SIDE,
        rows="\n".join(figures),
    )


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


def _row(files: dict[str, bytes], key: str, conditions: Sequence[str], image_format: str) -> str:
    named = {"image": files[image_format]} | {name: files[f"{name}.png"] for name in conditions}
    cells = "".join(
        _CELL.format(data=_thumbnail_of(content), name=html.escape(name)) for name, content in named.items()
    )
    return _ROW.format(cells=cells, caption=html.escape(files["txt"].decode()), key=key)


def _thumbnail_of(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        return thumbnail(image, _SIDE)


def thumbnail(image: Image.Image, side: int) -> str:
    """The image at most `side` pixels long, as WebP in base64, for the source of an HTML image."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=85)
    return base64.b64encode(stream.getvalue()).decode()
