"""The extractors by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from nexus_adapters.conditions.canny import canny


@dataclass(frozen=True)
class Extractor:
    """One way to draw a structure map.

    Attributes:
        name: what users write.
        draw: takes a PIL image first, then options by keyword; returns PIL RGB of the same size.
        summary: one line for lists.
        lines: whether the map is white lines on black, so that `looks_inverted` applies to it.
        needs: what it uses beyond a plain install, in words; empty for nothing.
    """

    name: str
    draw: Callable[..., Image.Image]
    summary: str
    lines: bool
    needs: tuple[str, ...] = ()

    def options(self) -> tuple[str, ...]:
        """Give the names of the options that `draw` takes beside the image."""
        return tuple(inspect.signature(self.draw).parameters)[1:]

    def defaults(self) -> dict[str, object]:
        """Give the values that these options have where they are not given."""
        parameters = inspect.signature(self.draw).parameters
        return {name: parameters[name].default for name in self.options()}


EXTRACTORS: dict[str, Extractor] = {
    extractor.name: extractor
    for extractor in (Extractor("canny", canny, "edges by OpenCV's Canny; options low, high", lines=True),)
}


def find_extractor(name: str) -> Extractor:
    """Look up an extractor; a ValueError lists the known names."""
    if str(name) not in EXTRACTORS:  # what has no hash, too, is told what was expected
        raise ValueError(f"name: expected one of {', '.join(sorted(EXTRACTORS))}; received {name!r}")
    return EXTRACTORS[name]


def extract(name: str, image: Image.Image, **options: object) -> Image.Image:
    """Draw the structure map of `image`.

    Args:
        name: of an extractor in `EXTRACTORS`, such as "canny".
        image: a PIL image. Its pixels are taken as they lie; `load_image` has already turned them upright.
        options: the extractor's own, such as canny's `low` and `high`.

    Returns:
        PIL RGB, same size as `image`.

    Raises:
        ValueError: for an unknown name or option, an object that is not a PIL image, and whatever else the
            extractor refuses.
    """
    extractor = find_extractor(name)
    for option in options:
        if option not in extractor.options():
            known = ", ".join(extractor.options()) or "none"
            raise ValueError(f"options: expected those of {name} ({known}); received {option!r}")
    return extractor.draw(image, **options)
