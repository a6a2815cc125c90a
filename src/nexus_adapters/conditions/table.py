"""The extractors by name: the package's own, those that users register, and those of installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

from PIL import Image

from nexus_adapters.conditions.built_in import BUILT_IN
from nexus_adapters.conditions.extractor import Extractor
from nexus_adapters.conditions.plugins import load_plugin, plugin_names
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.registry import IMPORT_HINT

_registered: dict[str, Extractor] = {}


class _Extractors(Mapping[str, Extractor]):
    """Name -> extractor. Those of other packages are found when they are asked for, and loaded only then."""

    def __getitem__(self, name: str) -> Extractor:
        here = BUILT_IN | _registered
        return here[name] if name in here else load_plugin(name)

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in _registered or name in plugin_names()

    def __iter__(self) -> Iterator[str]:
        here = BUILT_IN | _registered
        yield from here
        yield from (name for name in plugin_names() if name not in here)

    def __len__(self) -> int:
        return sum(1 for _ in self)


EXTRACTORS: Mapping[str, Extractor] = _Extractors()


def register_condition(extractor: Extractor) -> Extractor:
    """Add an extractor under its name, which `extract`, recipes and commands then know.

    It takes precedence over those of installed packages. It replaces one of the same name whose `draw` is
    defined in the same place, so that a notebook's cell can run again.

    Returns:
        `extractor`.

    Raises:
        InvalidArgument: for an object that is no `Extractor`, or a name that another one has.
    """
    if not isinstance(extractor, Extractor):
        raise InvalidArgument("extractor", "an Extractor", type(extractor).__name__)
    name = extractor.name
    taken = (_registered | BUILT_IN).get(name)
    if (
        taken is not None
        and taken != extractor
        and (name in BUILT_IN or not _defined_alike(taken, extractor))
    ):
        raise InvalidArgument(
            "extractor", "a name that is not taken", repr(name), "Register it under another name"
        )
    if taken is None or name in _registered:
        _registered[name] = extractor
    return extractor


def _defined_alike(first: Extractor, second: Extractor) -> bool:
    """Whether both draw by functions from one place in one module; lambdas have no place of their own."""
    places = [
        (getattr(each.draw, "__module__", ""), getattr(each.draw, "__qualname__", "<lambda>"))
        for each in (first, second)
    ]
    return places[0] == places[1] and not places[0][1].endswith("<lambda>")


@overload
def extract(name: str, image: Image.Image, **options: object) -> Image.Image: ...
@overload
def extract(name: str, image: Sequence[Image.Image], **options: object) -> list[Image.Image]: ...
def extract(
    name: str, image: Image.Image | Sequence[Image.Image], **options: object
) -> Image.Image | list[Image.Image]:
    """Extract the structure map of `image`.

    Args:
        name: of an extractor in `EXTRACTORS`, such as "canny".
        image: a PIL image, or a list of them. Pixels are taken as they lie; `load_image` has already turned
            them upright.
        options: the extractor's own, such as canny's `low` and `high`.

    Returns:
        PIL RGB, same size as `image`; a list for a list.

    Raises:
        InvalidArgument: for an unknown name or option, an object that is not a PIL image, and whatever else
            the extractor refuses.
    """
    extractor = find_extractor(name)
    if isinstance(image, Sequence):
        return extractor.draw_all(image, options)
    (condition,) = extractor.draw_all([image], options)
    return condition


def find_extractor(name: str) -> Extractor:
    """Look up an extractor; an InvalidArgument lists the known names."""
    if str(name) not in EXTRACTORS:  # str: an object without a hash gets the same error
        raise InvalidArgument("name", f"one of {', '.join(sorted(EXTRACTORS))}", repr(name), IMPORT_HINT)
    return EXTRACTORS[name]
