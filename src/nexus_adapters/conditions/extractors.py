"""The extractors by name: the package's own, those that users register, and those of installed packages.

A package adds one in its pyproject.toml, under its own name:

    [project.entry-points."nexus_adapters.conditions"]
    lineart = "my_package.lines:LINEART"

where LINEART is an `Extractor`, or a callable that takes a PIL image and options by keyword, and returns PIL
RGB of the same size. The maps of a plain callable have no structure score; an `Extractor` defines in
`compare` how two of its maps are compared.

For controlnet-aux, line maps are compared as edges and normal maps by their angles. `openpose` has no
structure score: its maps are images of skeletons without the key points, so comparing pixels does not measure
a pose.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import Any, overload

from PIL import Image

from nexus_adapters.conditions.canny import canny
from nexus_adapters.conditions.depth import DEFAULT_DEPTH_MODEL, PREDICTIONS, depth, depths
from nexus_adapters.conditions.extractor import (
    Extractor,
    brightness_agreement,
    compare_depths,
    compare_labels,
    compare_normals,
    compare_sketches,
    normals_agreement,
)
from nexus_adapters.conditions.images import to_rgb
from nexus_adapters.conditions.resize import resize_map
from nexus_adapters.conditions.segmentation import (
    DEFAULT_SEGMENTATION_MODEL,
    PALETTES,
    segmentation,
    segmentations,
)
from nexus_adapters.conditions.sketch import sketch
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.registry import IMPORT_HINT, Registry, defined_alike

BUILT_IN: dict[str, Extractor] = {
    extractor.name: extractor
    for extractor in (
        Extractor("canny", canny, "edges, with OpenCV's Canny; options low, high, auto", kind="lines"),
        Extractor(
            "depth",
            depth,
            "nearness of each pixel, with a model; options model, predicts, device",
            kind="depth",
            needs=(f"the model {DEFAULT_DEPTH_MODEL}, 99 MB, or another model",),
            extract_many=depths,
            model=DEFAULT_DEPTH_MODEL,
            choices={"predicts": PREDICTIONS},
            compare=compare_depths,
            agreement=brightness_agreement,
        ),
        Extractor(
            "segmentation",
            segmentation,
            "a color for each class, with a model; options model, palette, device",
            kind="labels",
            needs=(f"the model {DEFAULT_SEGMENTATION_MODEL}, 241 MB, or another model",),
            extract_many=segmentations,
            model=DEFAULT_SEGMENTATION_MODEL,
            choices={"palette": ("auto", *PALETTES)},
            compare=compare_labels,
            agreement=brightness_agreement,
        ),
        Extractor(
            "sketch",
            sketch,
            "lines, with a difference of Gaussians; options sigma, threshold, coherence, model",
            kind="lines",
            compare=compare_sketches,
        ),
    )
}

_AUX = "controlnet_aux"
_AUX_WEIGHTS = "lllyasviel/Annotators"
# Name -> class in controlnet-aux, and the kind of its maps.
_AUX_DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "hed": ("HEDdetector", {"kind": "lines"}),
    "pidinet": ("PidiNetDetector", {"kind": "lines"}),
    "lineart": ("LineartDetector", {"kind": "lines"}),
    "mlsd": ("MLSDdetector", {"kind": "lines"}),
    "normal": (
        "NormalBaeDetector",
        {"kind": "image", "compare": compare_normals, "agreement": normals_agreement},
    ),
    "openpose": ("OpenposeDetector", {"kind": "image"}),
}


@overload
def extract(name: str, image: Image.Image, **options: object) -> Image.Image: ...
@overload
def extract(name: str, image: Sequence[Image.Image], **options: object) -> list[Image.Image]: ...
def extract(
    name: str, image: Image.Image | Sequence[Image.Image], **options: object
) -> Image.Image | list[Image.Image]:
    """Extract the structure map of `image`.

    Args:
        name: name of an extractor in `EXTRACTORS`, such as "canny".
        image: a PIL image, or a list of images. EXIF orientation is not applied here; `load_image` applies
            it.
        options: the extractor's options, such as canny's `low` and `high`.

    Returns:
        The map, PIL RGB of the same size as `image`; a list for a list.

    Raises:
        InvalidArgument: for an unknown name or option, an object that is not a PIL image, and whatever else
            the extractor rejects.
    """
    extractor = find_extractor(name)
    if isinstance(image, Sequence) and not isinstance(image, (str, bytes)):
        return extractor.extract_all(image, options)
    (condition,) = extractor.extract_all([image], options)
    return condition


def find_extractor(name: str) -> Extractor:
    """Return the extractor of this name. `InvalidArgument` lists the known names."""
    if str(name) not in EXTRACTORS:  # str: an unhashable object gets the same error
        raise InvalidArgument("name", f"one of {', '.join(sorted(EXTRACTORS))}", repr(name), IMPORT_HINT)
    return EXTRACTORS[name]


class _Extractors(Registry[Extractor]):
    """The registry, with the detectors of controlnet-aux if it is installed.

    Registered extractors take precedence over entry points, and these over controlnet-aux.
    """

    def add(self, name: str, entry: Any) -> None:
        """Add an extractor under its name. `InvalidArgument` if another one has this name."""
        taken = self._entries.get(name)
        if taken == entry:
            return
        if taken is not None and (name in BUILT_IN or not defined_alike(taken.extract, entry.extract)):
            raise InvalidArgument("extractor", "an unused name", repr(name), "Register it under another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Extractor:
        # Extractors of packages are not stored here, so that users can register others under their names.
        return self._entries[name] if name in self._entries else self._load(name)

    def _load(self, name: str) -> Extractor:
        try:
            return super()._load(name)
        except KeyError:
            if name in _AUX_DETECTORS and _has_aux():
                return _from_aux(name)
            raise

    def _entry_of(self, point: EntryPoint, found: Any) -> Extractor:
        if isinstance(found, Extractor):
            return found
        if not callable(found):
            expected = f"an Extractor or a callable as '{point.name}'"
            raise InvalidArgument("name", expected, f"{point.value} of type {type(found).__name__}")
        summary = ((found.__doc__ or "").strip() or point.value).splitlines()[0]
        return Extractor(point.name, found, summary, needs=(point.value.partition(":")[0],))

    def _installed_names(self) -> set[str]:
        return super()._installed_names() | (set(_AUX_DETECTORS) if _has_aux() else set())


EXTRACTORS: Registry[Extractor] = _Extractors("condition", "nexus_adapters.conditions")
"""Name -> extractor. Those of installed packages are imported when they are first used."""
for _extractor in BUILT_IN.values():
    EXTRACTORS.add(_extractor.name, _extractor)


def register_condition(extractor: Extractor) -> Extractor:
    """Register an extractor under its name, for use in `extract`, recipes and commands.

    It takes precedence over extractors of installed packages. It replaces one of the same name whose
    `extract` is defined in the same place, so a notebook cell can run again.

    Returns:
        `extractor`.

    Raises:
        InvalidArgument: for an object that is not an `Extractor`, or a name that is taken.
    """
    if not isinstance(extractor, Extractor):
        raise InvalidArgument("extractor", "an Extractor", type(extractor).__name__)
    EXTRACTORS.add(extractor.name, extractor)
    return extractor


def _has_aux() -> bool:
    return importlib.util.find_spec(_AUX) is not None


def _from_aux(name: str) -> Extractor:
    def detect(image: Image.Image, model: str = _AUX_WEIGHTS) -> Image.Image:
        color = to_rgb(image)
        found = _aux_detector(name, model)(
            color, detect_resolution=min(color.size), image_resolution=min(color.size), output_type="pil"
        )
        # The detector rounds the sides to multiples of 64.
        return resize_map(to_rgb(found), color.size, facts["kind"])

    class_name, facts = _AUX_DETECTORS[name]
    needs = ("controlnet-aux",)
    return Extractor(name, detect, f"controlnet-aux's {class_name}", needs=needs, model=_AUX_WEIGHTS, **facts)


@lru_cache(maxsize=4)
def _aux_detector(name: str, model: str) -> Any:
    try:
        kind = getattr(importlib.import_module(_AUX), _AUX_DETECTORS[name][0])
        return kind.from_pretrained(model)
    except Exception as error:
        reason = one_line(error)
        expected = f"weights that controlnet-aux's {name} loads"
        raise InvalidArgument("model", expected, f"'{model}' ({reason})") from error
