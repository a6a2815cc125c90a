"""Read the files of a control: the photo or structure map, and the mask. Extract the map from a photo."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nexus_adapters.errors import expect, renamed, warn_caller
from nexus_adapters.generation.requests import ControlRequest, MapSource
from nexus_adapters.library_logs import library_logs_as_warnings

if TYPE_CHECKING:
    from PIL import Image

SMALLEST_PX = 8  # one latent
_SMALLEST_FOR_MODELS_PX = 64  # smallest side that models for depth and segmentation take
_ARGUMENTS = ("low", "high")  # canny's options that are arguments of their own


@dataclass(frozen=True)
class ReadControl:
    """A control with its files as images.

    Attributes:
        request: the request, which now says whether the map is inverted.
        source: the photo or the map.
        mask: white where the control acts; None for everywhere.
    """

    request: ControlRequest
    source: "Image.Image"
    mask: "Image.Image | None" = None


def read_control(control: ControlRequest) -> ReadControl:
    """Read and check a control's files. `InvalidArgument` is named "image", "map", "mask" or "option KEY"."""
    source, decided = read_source(control)
    return ReadControl(decided, source, read_mask(control))


def read_source(control: ControlRequest) -> tuple["Image.Image", ControlRequest]:
    """Read and check the photo or the map, and return it with the request.

    The returned request says whether the map is inverted; a map extracted from a photo is inverted only on
    request. `InvalidArgument` names the argument.
    """
    from nexus_adapters.conditions import EXTRACTORS, extract, load_as_stored, load_image
    from nexus_adapters.conditions.maps import read_and_invert

    name, given = control.condition_name, control.given
    known = ", ".join(sorted(EXTRACTORS))
    expect(name in EXTRACTORS, "condition", f"one of {known}", repr(name))
    load = load_as_stored if isinstance(given, MapSource) else load_image
    image = load(given.file, control.max_megapixels, argument=given.argument)
    size = f"{image.width}x{image.height}"
    expect(min(image.size) >= SMALLEST_PX, given.argument, f"at least {SMALLEST_PX} pixels a side", size)
    if isinstance(given, MapSource):
        options = given.reading.values(name)
        with renamed(lambda argument: f"option {argument}" if argument in options else argument):
            image, inverted = read_and_invert(
                image, EXTRACTORS[name].kind, invert=control.invert, name=given.argument, **options
            )
        return image, replace(control, invert=inverted)
    # Run the extractor on a small image before the base is loaded, so that it checks its options.
    side = _SMALLEST_FOR_MODELS_PX if EXTRACTORS[name].model else SMALLEST_PX
    options = given.extractor.values(name)
    with running_extractor(name, options):
        extract(name, image.resize((side, side)), **options)
    return image, replace(control, invert=bool(control.invert))


def read_mask(control: ControlRequest) -> "Image.Image | None":
    """Read the mask as a grayscale image; transparent parts become black (no control)."""
    from PIL import Image

    from nexus_adapters.conditions import load_as_stored
    from nexus_adapters.conditions.images import GREY_16_BIT, is_transparent, to_rgb

    if control.mask is None:
        return None
    mask = load_as_stored(control.mask, control.max_megapixels, argument="mask")
    if is_transparent(mask) and mask.mode not in GREY_16_BIT:
        warn_caller("mask: transparent parts are read as black: the control does not act there")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    with renamed({"image": "mask"}):
        return to_rgb(mask).convert("L")


def check_size(
    control: ControlRequest,
    source: "Image.Image",
    width: int | None,
    height: int | None,
    argument: str = "",
) -> None:
    """Raise `InvalidArgument` if the source's aspect ratio differs and the control has no `resize_mode`.

    Args:
        control: the control.
        source: its photo, map or mask.
        width: of the generated image, in pixels.
        height: of the generated image, in pixels.
        argument: the argument that names the file of `source`; "" for that of the control's photo or map.
    """
    from nexus_adapters.injection.condition import check_aspect

    if width is not None and height is not None and control.resize_mode is None:
        name = argument or control.given.argument
        check_aspect(source.height, source.width, height, width, name, "`resize_mode`")


def structure_map(control: ControlRequest, source: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """Return the given map, or extract it from the photo.

    A photo is first resized to `size`, which is (width, height), so that lines stay sharp.
    """
    from PIL import Image

    from nexus_adapters.conditions import EXTRACTORS, extract, invert
    from nexus_adapters.conditions.resize import padded, placement

    name, kind, mode = control.condition_name, EXTRACTORS[control.condition_name].kind, control.resize_mode
    if isinstance(control.given, MapSource):
        return source
    placed = placement((0, 0, *source.size), size, mode)
    resized = source.resize(placed.size, Image.Resampling.LANCZOS, box=placed.box)
    options = control.given.extractor.values(name)
    with running_extractor(name, options):
        condition = extract(name, resized, **options)
    if control.invert:
        condition = invert(condition)
    return padded(condition, placed, size, kind)


@contextmanager
def without_chatter(uses_models: bool) -> Iterator[None]:
    """Silence messages and progress bars of model libraries; import these only if models are used."""
    if not uses_models:
        yield
        return
    from nexus_adapters.bases.loading import quiet_loading

    with library_logs_as_warnings(), quiet_loading():
        yield


@contextmanager
def running_extractor(condition_name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Wrap the call of an extractor: silence libraries, and name its options in errors as "option KEY"."""
    from nexus_adapters.conditions import EXTRACTORS

    extractor = EXTRACTORS[condition_name]
    takes = {*extractor.options(), *options}

    def as_written(argument: str) -> str:
        if argument == "options":
            return "option"
        return f"option {argument}" if argument in takes and argument not in _ARGUMENTS else argument

    with without_chatter(bool(extractor.model or options.get("model"))), renamed(as_written):
        yield
