"""An extractor: a name, a function from image to structure map, and how two maps are compared.

Each `compare_...` takes (found map, wanted map), RGB of one size, and returns metric -> value, with names in
`nexus_adapters.metrics.METRICS`. Each `..._agreement` takes the same and returns one number in [0, 1] (higher
is better), used in validation during training. Comparing depth, labels and sketches needs the extra `eval`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from PIL import Image

from nexus_adapters.choices import MAP_KINDS, MapKind
from nexus_adapters.conditions.images import check_image
from nexus_adapters.errors import InvalidArgument

_MOST_CLASSES = 512


def compare_lines(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Return the F1 of the pixels above half brightness, with a tolerance of one pixel."""
    return {"edge_f1": lines_agreement(found, wanted)}


def compare_sketches(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Return the MS-SSIM of the soft lines, and the F1 of their pixels."""
    from nexus_adapters.metrics.structure import luminance, ms_ssim

    return {"sketch_ms_ssim": ms_ssim(luminance(found), luminance(wanted))} | compare_lines(found, wanted)


def compare_depths(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Return the root-mean-square error and the rank correlation of the pixels' brightness."""
    from nexus_adapters.metrics.structure import depth_rmse, luminance, rank_correlation

    first, second = luminance(found)[0], luminance(wanted)[0]
    return {
        "depth_rmse": depth_rmse(first, second),
        "depth_rank_correlation": rank_correlation(first, second),
    }


def compare_labels(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Return the mean IoU, where each color is a class.

    Raises:
        InvalidArgument: for more than 512 colors, since such maps have no classes.
    """
    import torch

    from nexus_adapters.metrics.structure import mean_iou

    first, second = np.asarray(found.convert("RGB")), np.asarray(wanted.convert("RGB"))
    pixels = np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)])
    colors, labels = np.unique(pixels, axis=0, return_inverse=True)
    if len(colors) > _MOST_CLASSES:
        raise InvalidArgument(
            "condition", f"segmentation maps of at most {_MOST_CLASSES} colors", len(colors)
        )
    one, other = torch.from_numpy(labels.reshape(2, *first.shape[:2]))
    return {"mean_iou": mean_iou(one, other, len(colors))}


def compare_normals(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Return the mean angle between the surface normals, in degrees."""
    return {"normal_angle": _normal_angle(found, wanted)}


def lines_agreement(found: Image.Image, wanted: Image.Image) -> float:
    """Return the F1 of the pixels above half brightness, with a tolerance of one pixel."""
    from nexus_adapters.metrics.structure import edge_f1

    first, second = (np.asarray(each.convert("L")) > 127 for each in (found, wanted))
    return float(edge_f1(first, second))


def brightness_agreement(found: Image.Image, wanted: Image.Image) -> float:
    """Return 1 minus the mean absolute difference of brightness, where white is 1."""
    first, second = (np.asarray(each.convert("L")) for each in (found, wanted))
    return 1.0 - float(np.abs(first.astype(float) - second).mean()) / 255


def normals_agreement(found: Image.Image, wanted: Image.Image) -> float:
    """Return 1 for equal normals and 0 for opposite ones: 1 minus the mean angle / 180 degrees."""
    return 1.0 - _normal_angle(found, wanted) / 180


def _normal_angle(found: Image.Image, wanted: Image.Image) -> float:
    from nexus_adapters.metrics.structure import normal_angle_deg

    return normal_angle_deg(*(np.asarray(each.convert("RGB")) for each in (found, wanted)))


Compare = Callable[[Image.Image, Image.Image], dict[str, float]]
Agreement = Callable[[Image.Image, Image.Image], float]


@dataclass(frozen=True)
class Extractor:
    """One way to extract a structure map.

    Attributes:
        name: the name that users write.
        extract: takes a PIL image, then options by keyword; returns the map, PIL RGB of the same size. The
            same image and options must give the same map.
        summary: one line for lists.
        kind: what the map shows, which decides how it is read and resized: "lines" for light lines on black,
            "labels" for colors that stand for classes, "depth" for nearness, "image" for anything else.
        needs: what it needs in addition to a plain installation, in words.
        extract_many: the same for a list of images; None if that would not be faster.
        model: the default weights, which the option `model` replaces; "" for none.
        compare: takes (found map, wanted map), PIL RGB of one size, and returns metric -> value. In an
            evaluation, the found map is extracted from a generated image, and the wanted map is the one it
            was generated from. None for no structure scores; line maps are compared as edges by default.
        agreement: takes the same and returns one number in [0, 1], higher is better, for validation during
            training. None for no score; line maps have one by default.
        choices: option -> its allowed values, for options with a fixed set of values.
        files: options that may name a file or a folder, whose content is hashed instead of the name.
    """

    name: str
    extract: Callable[..., Image.Image]
    summary: str
    kind: MapKind = "image"
    needs: tuple[str, ...] = ()
    extract_many: Callable[..., list[Image.Image]] | None = None
    model: str = ""
    compare: Compare | None = None
    agreement: Agreement | None = None
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    files: tuple[str, ...] = ("model",)

    def __post_init__(self) -> None:
        """Check the kind, and set the default comparison of line maps."""
        if self.kind not in MAP_KINDS:
            raise InvalidArgument("kind", f"one of {', '.join(MAP_KINDS)}", repr(self.kind))
        if self.kind == "lines":
            object.__setattr__(self, "compare", self.compare or compare_lines)
            object.__setattr__(self, "agreement", self.agreement or lines_agreement)

    def options(self) -> tuple[str, ...]:
        """Return the names of the options that `extract` takes after the image."""
        return tuple(p.name for p in self._parameters() if p.kind is not inspect.Parameter.VAR_KEYWORD)

    def defaults(self) -> dict[str, object]:
        """Return the default values of these options."""
        given = (p for p in self._parameters() if p.default is not inspect.Parameter.empty)
        return {parameter.name: parameter.default for parameter in given}

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.extract).parameters.values())[1:]

    def takes(self, option: str) -> bool:
        """Return whether `extract` has an option of this name, or takes any option."""
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters())
        return takes_any or option in self.options()

    def check_options(self, options: Mapping[str, object]) -> None:
        """Check the names, types and choices of options.

        Raises:
            InvalidArgument: named "options" for an unknown option; named after the option for a value whose
                type differs from the default's, or that is not among its `choices`.
        """
        known, defaults = self.options(), self.defaults()
        for option, value in options.items():
            if not self.takes(option):
                names = ", ".join(known) or "none"
                raise InvalidArgument("options", f"the options of {self.name} ({names})", repr(option))
            kind = _kind(defaults.get(option))
            if kind and _kind(value) != kind:
                raise InvalidArgument(option, kind, repr(value))
            if option in self.choices and value not in self.choices[option]:
                raise InvalidArgument(option, f"one of {', '.join(self.choices[option])}", repr(value))

    def extract_all(self, images: Sequence[Image.Image], options: Mapping[str, object]) -> list[Image.Image]:
        """Extract the maps of several images, together if that is faster.

        Raises:
            InvalidArgument: for an object that is not a PIL image, an unknown option, or a map that is not
                PIL RGB of the image's size.
        """
        for image in images:
            check_image(image)
        self.check_options(options)
        if self.extract_many is not None and len(images) > 1:
            maps = self.extract_many(images, **options)
        else:
            maps = [self.extract(image, **options) for image in images]
        for image, condition in zip(images, maps, strict=True):
            _check_map(self.name, image, condition)
        return maps


def _kind(value: object) -> str:
    """Return the type of an option's value in words; "" for other types."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Real):
        return "a number"
    return "text" if isinstance(value, str) else ""


def _check_map(name: str, image: Image.Image, condition: object) -> None:
    if not isinstance(condition, Image.Image):
        received = type(condition).__name__
    elif condition.mode != "RGB" or condition.size != image.size:
        received = f"{condition.mode} of {condition.width}x{condition.height}"
    else:
        return
    expected = f"an extractor that returns PIL RGB of {image.width}x{image.height}"
    raise InvalidArgument("name", expected, f"{received} from '{name}'")
