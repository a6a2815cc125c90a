"""From `--image` or `--map` to the condition of one generation, and the size of its image."""

import argparse
import copy
import math
import warnings
from typing import TYPE_CHECKING, Any

from nexus_adapters.cli.extract import declare_extractor_options, extractor_options, running_extractor
from nexus_adapters.cli.generation import SCHEDULERS
from nexus_adapters.cli.options import (
    ADAPTER_HELP,
    BASE_CONFIG_HELP,
    DEVICES,
    DTYPES,
    PREDICTION_TYPE_HELP,
    PREDICTION_TYPES,
    expect_between,
    expect_finite,
    expect_side,
)
from nexus_adapters.errors import InvalidArgument, expect

if TYPE_CHECKING:
    from PIL import Image

POLICIES = ("positive", "per_branch", "cond_only")
BALANCES = ("balanced", "prompt", "control")

# Option -> its value where it is not given.
DEFAULTS: dict[str, Any] = {
    "condition": "canny",
    "adapter": None,
    "scale": 1.0,
    "start": 0.0,
    "end": 1.0,
    "policy": None,
    "balance": None,
    "level_scales": None,
    "mask": None,
    "noise_exponent": None,
}


class AppendSource(argparse.Action):
    """Keeps the order in which --image and --map came: `sources` has (option, file) pairs."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        """Add the pair."""
        namespace.sources = [*(namespace.sources or []), (self.dest, values)]


def declare_controls(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.set_defaults(sources=None)
    group = parser.add_argument_group(
        "controls",
        "Each --image or --map is one control. Give the other options once for all controls, or once for "
        "each in the same order.",
    )
    for option, text in (
        ("image", "a photo to extract the structure map from"),
        ("map", "a structure map"),
    ):
        group.add_argument(
            f"--{option}", metavar="FILE", action=AppendSource, default=argparse.SUPPRESS, help=text
        )

    def add(option: str, **settings: Any) -> None:
        group.add_argument(f"--{option}", action="append", **settings)

    add("condition", metavar="NAME", help="kind of map (default: canny)")
    add(
        "adapter", metavar="PATH", help=f"{ADAPTER_HELP} (default: prime; required with a --base of your own)"
    )
    add("scale", type=float, help="strength of the adapter; 0 is the base alone (default: 1)")
    add("start", type=float, help="where in the schedule the adapter starts to act, 0 to 1 (default: 0)")
    add("end", type=float, help="where in the schedule it stops (default: 1)")
    add("policy", choices=POLICIES, help="which text the adapter reads (default: positive)")
    add("balance", choices=BALANCES, help="what takes precedence; sets --policy and --level-scales")
    add("level-scales", metavar="N,N,...", help="a factor for each feature of the adapter, finest first")
    add(
        "noise-exponent",
        type=float,
        metavar="P",
        help="how features fade as the noise does: they are multiplied by its share of the variance to this "
        "power (default: as the adapter was trained)",
    )
    add("mask", metavar="FILE", help="an image that is white where the control acts")


def split_controls(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each control, together with all others. `InvalidArgument` names the option."""
    sources = args.sources or []
    if not sources:
        raise InvalidArgument("--image or --map")
    controls = []
    for place, (option, file) in enumerate(sources):
        control = copy.copy(args)
        control.image, control.map = (file, None) if option == "image" else (None, file)
        for name, default in DEFAULTS.items():
            given = getattr(args, name)
            option_name = f"--{name.replace('_', '-')}"
            fits = given is None or len(given) in (1, len(sources))
            count = f"once or {len(sources)} times" if len(sources) > 1 else "once, for one map"
            expect(fits, option_name, f"to be given {count}", f"{len(given or [])} values")
            value = default if given is None else given[place if len(given) > 1 else 0]
            setattr(control, name, value)
        controls.append(_checked(control))
    return controls


def _checked(control: argparse.Namespace) -> argparse.Namespace:
    for name in ("scale", "start", "end"):
        expect_finite(f"--{name}", getattr(control, name))
    expect(0 <= control.start <= 1, "--start", "a number from 0 to 1", control.start)
    expect(
        control.start <= control.end <= 1,
        "--end",
        f"a number from --start, {control.start}, to 1",
        control.end,
    )
    if control.noise_exponent is not None:
        expect_finite("--noise-exponent", control.noise_exponent)
        expect(control.noise_exponent >= 0, "--noise-exponent", "at least 0", control.noise_exponent)
    for name in ("policy", "level_scales"):
        is_alone = control.balance is None or getattr(control, name) is None
        option = f"--{name.replace('_', '-')}"
        expect(is_alone, "--balance", f"no {option} together with it", f"'{control.balance}' and {option}")
    if control.level_scales is not None:
        control.level_scales = _numbers(control.level_scales)
    return control


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgument(
            "--level-scales", "numbers separated by commas, as in 0.5,1,1,1", f"'{text}'"
        ) from None


def settings_of_control(control: argparse.Namespace) -> dict[str, Any]:
    """What a control's `Control` takes in addition to adapter, condition and mask."""
    names = ("scale", "start", "end", "noise_exponent")
    settings: dict[str, Any] = {name: getattr(control, name) for name in names}
    if control.balance is not None:
        from nexus_adapters.injection import balance

        return settings | balance(control.balance)
    return settings | {"policy": control.policy or POLICIES[0], "level_scales": control.level_scales}


_MAX_STEPS = 1000  # of training: no scheduler takes more
_MAX_NUM = 9999  # of four digits in the files' names
_MAX_SEED = 2**63 - 1


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the image shows")
    parser.add_argument("--out", required=True, metavar="FILE", help="the image to write, a .png")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    declare_controls(parser)
    _add_structure(parser)
    _add_model(parser)
    _add_sampling(parser)


def _add_structure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("maps")
    declare_extractor_options(group)
    group.add_argument("--invert", action="store_true", help="exchange light and dark in the map")
    group.add_argument(
        "--max-megapixels", type=float, default=64, metavar="N", help="refuse larger files (default: 64)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--base",
        default="embedded",
        metavar="PATH",
        help="Stable Diffusion 1.x, 2.x or XL: a folder, Hub id or .safetensors file; needs an --adapter "
        "that was trained for it (default: embedded)",
    )
    group.add_argument("--base-config", metavar="PATH", help=BASE_CONFIG_HELP)
    group.add_argument("--prediction-type", choices=PREDICTION_TYPES, help=PREDICTION_TYPE_HELP)
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH",
        help="LoRA weights: a file, folder or Hub id (repeatable)",
    )
    group.add_argument(
        "--lora-scale",
        action="append",
        type=float,
        metavar="N",
        help="strength of each --lora, or of all (default: 1)",
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="default: cuda if available, else mps, else cpu",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: float16 on cuda, else float32"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="TEXT", help="what to avoid")
    group.add_argument(
        "--scheduler", choices=sorted(SCHEDULERS), help="the sampler (default: the base's own)"
    )
    group.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    group.add_argument("--guidance", type=float, help="guidance scale (default: 7.5; embedded base: 2)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first image; each further image has the next seed (default: 0)",
    )
    group.add_argument(
        "--num", type=int, default=1, help="number of images: FILE-0001.png and so on (default: 1)"
    )
    size = "in pixels (default: the map's, reduced if far above what the base was trained on)"
    group.add_argument("--width", type=int, help=size)
    group.add_argument("--height", type=int, help=size)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` unless each number is in its range."""
    scales = args.lora_scale or [1.0]
    for scale in scales:
        expect_finite("--lora-scale", scale)
    fits = len(scales) in (1, len(args.lora))
    has_lora = args.lora_scale is None or bool(args.lora)
    expect(has_lora, "--lora-scale", "a --lora that it applies to", f"{scales[0]} and no --lora")
    expect(fits, "--lora-scale", f"one for all, or one for each of {len(args.lora)} --lora", len(scales))
    if args.guidance is not None:
        expect_finite("--guidance", args.guidance)
    expect_between("--steps", args.steps, 1, _MAX_STEPS)
    expect_between("--num", args.num, 1, _MAX_NUM)
    expect_between("--seed", args.seed, 0, _MAX_SEED - args.num)
    expect_side("--width", args.width)
    expect_side("--height", args.height)


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
