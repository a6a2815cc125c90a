"""The preview page of a prepared set, which shows a few samples from its shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from nexus_adapters.data.sample_page import ROWS, Row, page


def preview_page(
    shards: Sequence[tuple[Path, int]], conditions: Sequence[str], image_format: str, summary: str
) -> str:
    """Return the HTML preview page of a prepared set, with embedded images.

    Args:
        shards: path and number of samples of each shard.
        conditions: names of the maps.
        image_format: extension of the images.
        summary: a line of text below the title.
    """
    total = sum(samples for _, samples in shards)
    rows = min(ROWS, total)
    # Samples number r * total / rows, without reading those in between.
    wanted = [row * total // rows for row in range(rows)]
    first, found = 0, []
    for path, samples in shards:
        places = [place - first for place in wanted if first <= place < first + samples]
        if places:
            found += [_row(files, key, conditions, image_format) for key, files in _samples(path, places)]
        first += samples
    return page("Prepared set", summary, found)


def _samples(path: Path, places: Sequence[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files, by extension, of the samples at these indices in a shard."""
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
