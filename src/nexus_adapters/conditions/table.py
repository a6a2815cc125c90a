"""The extractors by name: the package's own, and what other packages add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

from PIL import Image

from nexus_adapters.conditions.built_in import BUILT_IN
from nexus_adapters.conditions.extractor import Extractor
from nexus_adapters.conditions.plugins import load_plugin, plugin_names


class _Extractors(Mapping[str, Extractor]):
    """Name -> extractor. Those of other packages are found when they are asked for, and loaded only then."""

    def __getitem__(self, name: str) -> Extractor:
        return BUILT_IN[name] if name in BUILT_IN else load_plugin(name)

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in plugin_names()

    def __iter__(self) -> Iterator[str]:
        yield from BUILT_IN
        yield from (name for name in plugin_names() if name not in BUILT_IN)

    def __len__(self) -> int:
        return sum(1 for _ in self)


EXTRACTORS: Mapping[str, Extractor] = _Extractors()


@overload
def extract(name: str, image: Image.Image, **options: object) -> Image.Image: ...
@overload
def extract(name: str, image: Sequence[Image.Image], **options: object) -> list[Image.Image]: ...
def extract(
    name: str, image: Image.Image | Sequence[Image.Image], **options: object
) -> Image.Image | list[Image.Image]:
    """Draw the structure map of `image`.

    Args:
        name: of an extractor in `EXTRACTORS`, such as "canny".
        image: a PIL image, or a list of them. Pixels are taken as they lie; `load_image` has already turned
            them upright.
        options: the extractor's own, such as canny's `low` and `high`.

    Returns:
        PIL RGB, same size as `image`; a list for a list.

    Raises:
        ValueError: for an unknown name or option, an object that is not a PIL image, and whatever else the
            extractor refuses.
    """
    extractor = find_extractor(name)
    if isinstance(image, Sequence):
        return extractor.draw_all(image, options)
    (condition,) = extractor.draw_all([image], options)
    return condition


def find_extractor(name: str) -> Extractor:
    """Look up an extractor; a ValueError lists the known names."""
    if str(name) not in EXTRACTORS:  # what has no hash, too, is told what was expected
        raise ValueError(f"name: expected one of {', '.join(sorted(EXTRACTORS))}; received {name!r}")
    return EXTRACTORS[name]
