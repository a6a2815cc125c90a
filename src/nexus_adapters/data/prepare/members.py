"""From a sample and its maps to the files of a shard, the same bytes every time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
_PNG = {"format": "PNG", "compress_level": 4}  # half of the time of 6, for files 3 % larger
_WEBP = {"format": "WEBP", "lossless": True, "quality": 50, "exact": True}
_SAVED: dict[str, dict[str, Any]] = {"jpg": _JPEG, "png": _PNG, "webp": _WEBP}


def encode_image(image: Image.Image, image_format: Literal["jpg", "png", "webp"]) -> bytes:
    """Of RGB; what is not "jpg" is without loss."""
    return _saved(image, _SAVED[image_format])


def encode_map(condition: Image.Image) -> bytes:
    """PNG of RGB, in grey or black and white where that says the same: read as RGB, it is the same map."""
    pixels = np.asarray(condition)
    red = np.ascontiguousarray(pixels[..., 0])
    if not ((red == pixels[..., 1]).all() and (red == pixels[..., 2]).all()):
        return _saved(condition, _PNG)
    grey = Image.fromarray(red)
    is_two_toned = not (red + np.uint8(1) > 1).any()  # 0 and 255 alone become 1 and 0
    return _saved(grey.convert("1", dither=Image.Dither.NONE) if is_two_toned else grey, _PNG)


def sample_members(
    key: str,
    image: tuple[str, bytes],
    conditions: Mapping[str, bytes],
    about: Mapping[str, Any],
) -> Iterator[tuple[str, bytes]]:
    """Name and content of a sample's files, in WebDataset's layout.

    Args:
        key: unique in the set, without dots.
        image: extension and content.
        conditions: name -> PNG.
        about: goes to the JSON; its "captions" are also read by others, who know only one .txt.
    """
    extension, content = image
    yield f"{key}.{extension}", content
    for name, png in conditions.items():
        yield f"{key}.{name}.png", png
    yield f"{key}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    yield f"{key}.txt", about["captions"][0].encode("utf-8", "replace")


def _saved(image: Image.Image, options: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    image = image.copy()
    image.info = {}  # comments and profiles of the source, which would not fit the pixels any more
    image.save(stream, **options)
    return stream.getvalue()
