"""From `--image` or `--map` to the condition of one generation, and the size of its image."""

import argparse
import math
import warnings
from typing import TYPE_CHECKING

from nexus_adapters.cli.extractor_options import extractor_options, running_extractor
from nexus_adapters.errors import InvalidArgument, expect

if TYPE_CHECKING:
    from PIL import Image

SMALLEST_PX = 8  # one latent
_SMALLEST_FOR_MODELS_PX = 64  # that models for depth and segmentation take
# An image may be this many times the base's own area before the default size is cut down to that area.
_LARGEST_AREA = 4


def source_argument(args: argparse.Namespace) -> str:
    """The option that names the source."""
    return "--map" if args.image is None else "--image"


def used_options(args: argparse.Namespace) -> dict[str, object]:
    """All options that the map was extracted with; none for a map that was given."""
    from nexus_adapters.conditions import EXTRACTORS

    if source_argument(args) == "--map":
        return {}
    return EXTRACTORS[args.condition].defaults() | extractor_options(args, args.condition)


def read_source(args: argparse.Namespace) -> "Image.Image":
    """The photo or the map, after all checks of it. `InvalidArgument` names the option."""
    from nexus_adapters.conditions import EXTRACTORS, extract, load_image

    known = ", ".join(sorted(EXTRACTORS))
    expect(args.condition in EXTRACTORS, "--condition", f"one of {known}", repr(args.condition))
    options, argument = extractor_options(args, args.condition), source_argument(args)
    if argument == "--map":
        for name in options:
            flag = f"--{name}" if name in ("low", "high") else f"--option {name}"
            raise InvalidArgument(
                flag,
                "no value with --map",
                repr(options[name]),
                "It is an option of the extractor, for --image",
            )
    path = args.map if args.image is None else args.image
    source = load_image(path, args.max_megapixels, argument=argument)
    size = f"{source.width}x{source.height}"
    expect(min(source.size) >= SMALLEST_PX, argument, f"at least {SMALLEST_PX} pixels a side", size)
    if argument == "--image":
        # The extractor checks its own options: try it on a small image before the base is loaded.
        side = _SMALLEST_FOR_MODELS_PX if EXTRACTORS[args.condition].model else SMALLEST_PX
        with running_extractor(args.condition, options):
            extract(args.condition, source.resize((side, side)), **options)
    return source


def check_size(args: argparse.Namespace, source: "Image.Image") -> None:
    """`InvalidArgument` where `--width` and `--height` would change the source's aspect ratio."""
    from nexus_adapters.injection.condition import check_aspect

    if args.width is not None and args.height is not None:
        check_aspect(source.height, source.width, args.height, args.width, name=source_argument(args))


def image_size(
    source: tuple[int, int], width: int | None, height: int | None, native: int, multiple: int = 8
) -> tuple[int, int]:
    """(width, height) of the image.

    Both given: these. One given: the other by the source's aspect, to the nearest `multiple`. None: the
    source's size, each side rounded down to a `multiple`; but where the source has more than four times the
    area of the base's own `native` x `native`, that area in the source's aspect.
    """
    from nexus_adapters.injection.condition import nearest_multiple, size_by_aspect

    area = source[0] * source[1]
    if width is None and height is None and area > _LARGEST_AREA * native * native:
        factor = native / math.sqrt(area)
        return nearest_multiple(source[0] * factor, multiple), nearest_multiple(source[1] * factor, multiple)
    found_height, found_width = size_by_aspect(source[1], source[0], height, width, multiple)
    return found_width, found_height


def draw_condition(args: argparse.Namespace, source: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """The map for an image of `size`. A photo is resized before extraction, so that lines stay sharp."""
    from PIL import Image

    from nexus_adapters.conditions import EXTRACTORS, extract, invert, looks_inverted

    condition = source
    if source_argument(args) == "--image":
        resized = source.resize(size, Image.Resampling.LANCZOS)
        options = extractor_options(args, args.condition)
        with running_extractor(args.condition, options):
            condition = extract(args.condition, resized, **options)
    if args.invert:
        condition = invert(condition)
    if EXTRACTORS[args.condition].lines and looks_inverted(condition):
        remedy = "leave out --invert" if args.invert else "--invert exchanges them"
        warnings.warn(
            f"{source_argument(args)}: the map looks inverted, dark lines on white; adapters are trained on "
            f"white lines on black ({remedy})",
            stacklevel=2,
        )
    return condition
