"""Extractors of other packages: by entry points, and those of controlnet-aux where it is installed.

A package adds one in its pyproject.toml, under a name of its own:

    [project.entry-points."nexus_adapters.conditions"]
    lineart = "my_package.lines:LINEART"

where LINEART is an `Extractor`, or a callable that takes a PIL image and options by keyword, and returns PIL
RGB of the same size. The maps of a plain callable have no structure score; an `Extractor` says by `compare`
how two of its maps are compared.

Of controlnet-aux, maps of lines are compared as edges and normal maps by their angles. `openpose` has no
structure score: its maps are drawn skeletons, and without the key points behind them nothing says which joint
is whose, so that no comparison of pixels measures a pose.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from PIL import Image

from nexus_adapters.conditions.comparison import compare_normals, normals_agreement
from nexus_adapters.conditions.extractor import Extractor
from nexus_adapters.conditions.rgb import to_rgb
from nexus_adapters.errors import InvalidArgument, one_line

GROUP = "nexus_adapters.conditions"

_AUX = "controlnet_aux"
_AUX_WEIGHTS = "lllyasviel/Annotators"
# Name -> class of the package, and what its maps are.
_AUX_DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "hed": ("HEDdetector", {"lines": True}),
    "pidinet": ("PidiNetDetector", {"lines": True}),
    "lineart": ("LineartDetector", {"lines": True}),
    "mlsd": ("MLSDdetector", {"lines": True}),
    "normal": (
        "NormalBaeDetector",
        {"lines": False, "compare": compare_normals, "agreement": normals_agreement},
    ),
    "openpose": ("OpenposeDetector", {"lines": False}),
}


def plugin_names() -> list[str]:
    """The names of all that there are, without loading any."""
    names = {point.name for point in entry_points(group=GROUP)}
    return sorted(names | (set(_AUX_DETECTORS) if _has_aux() else set()))


def load_plugin(name: str) -> Extractor:
    """Load one of `plugin_names`; an entry point takes precedence over controlnet-aux.

    Raises:
        KeyError: for another name.
        InvalidArgument: for one that cannot be loaded, is no extractor, or that two packages provide.
    """
    points = list(entry_points(group=GROUP, name=name))
    if len({point.value for point in points}) > 1:
        shown = ", ".join(sorted(point.value for point in points))
        raise InvalidArgument("name", f"one installed package with an extractor '{name}'", shown)
    if points:
        return _from_entry_point(points[0])
    if name in _AUX_DETECTORS and _has_aux():
        return _from_aux(name)
    raise KeyError(name)


def _from_entry_point(point: EntryPoint) -> Extractor:
    expected = f"an Extractor or a callable as '{point.name}'"
    try:
        found = point.load()
    except Exception as error:  # whatever another package does when it is imported
        received = f"{point.value}, which cannot be loaded ({error})"
        raise InvalidArgument("name", expected, received) from error
    if isinstance(found, Extractor):
        return found
    if not callable(found):
        raise InvalidArgument("name", expected, f"{point.value} of type {type(found).__name__}")
    summary = ((found.__doc__ or "").strip() or point.value).splitlines()[0]
    return Extractor(point.name, found, summary, lines=False, needs=(point.value.partition(":")[0],))


def _has_aux() -> bool:
    return importlib.util.find_spec(_AUX) is not None


def _from_aux(name: str) -> Extractor:
    def draw(image: Image.Image, model: str = _AUX_WEIGHTS) -> Image.Image:
        color = to_rgb(image)
        # Its sides are multiples of 64 in between.
        drawn = _aux_detector(name, model)(
            color, detect_resolution=min(color.size), image_resolution=min(color.size), output_type="pil"
        )
        return to_rgb(drawn).resize(color.size, Image.Resampling.BILINEAR)

    class_name, facts = _AUX_DETECTORS[name]
    needs = ("controlnet-aux",)
    return Extractor(name, draw, f"controlnet-aux's {class_name}", needs=needs, model=_AUX_WEIGHTS, **facts)


@lru_cache(maxsize=4)
def _aux_detector(name: str, model: str) -> Any:
    try:
        kind = getattr(importlib.import_module(_AUX), _AUX_DETECTORS[name][0])
        return kind.from_pretrained(model)
    except Exception as error:
        reason = one_line(error)
        expected = f"weights that controlnet-aux's {name} loads"
        raise InvalidArgument("model", expected, f"'{model}' ({reason})") from error
