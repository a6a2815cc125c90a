"""The arguments of the controls of `nexus generate`, parsed into one request for each control."""

import argparse
from collections.abc import Sequence
from typing import Any

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.choices import BALANCE_NAMES, CONDITION, RESIZE_MODES
from nexus_adapters.cli.options import ADAPTER_SOURCES, add_options
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.generation.requests import (
    ACTING,
    ADAPTER,
    ControlRequest,
    ExtractorOptions,
    ImageSource,
    MapSource,
)

IMAGE, MAP = (f"--{source.argument}" for source in (ImageSource, MapSource))
# Options of a control, given once for all controls or once for each.
_PER_CONTROL = (*ACTING, "resize_mode", "condition", "adapter")


class _AppendSource(argparse.Action):
    """Store --image and --map in the order given, as pairs of option and file."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        namespace.sources = [*(namespace.sources or []), (option, values)]


def add_controls(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the controls and their maps."""
    parser.set_defaults(sources=None)
    group = parser.add_argument_group(
        "controls",
        "Each --image or --map is one control. Give the other options once for all controls, or once for "
        "each in the same order.",
    )
    for option, text in (
        (IMAGE, "a photo to extract the structure map from"),
        (MAP, "a structure map"),
    ):
        group.add_argument(option, metavar="FILE", action=_AppendSource, default=argparse.SUPPRESS, help=text)
    # No defaults: they would hide whether an option was given.
    add_options(group, "--condition", action="append", default=None)
    group.add_argument(
        "--adapter",
        action="append",
        metavar="PATH",
        help=f"{ADAPTER_SOURCES} (default: {ADAPTER}; required with a --base of your own)",
    )
    add_options(group, "--scale", action="append", default=None)
    start = "where in the schedule the adapter starts to act, from 0 to 1 (default: 0)"
    group.add_argument("--start", action="append", type=float, metavar="N", help=start)
    end = "where in the schedule the adapter stops acting, from 0 to 1 (default: 1)"
    group.add_argument("--end", action="append", type=float, metavar="N", help=end)
    add_options(group, "--policy", "--noise-exponent", action="append", default=None)
    group.add_argument(
        "--balance",
        action="append",
        choices=BALANCE_NAMES,
        help="what takes precedence, prompt or control; sets --policy and --level-scales",
    )
    group.add_argument(
        "--level-scales",
        action="append",
        metavar="N,N,...",
        help="a factor for each of the adapter's feature maps, finest first",
    )
    group.add_argument(
        "--mask", action="append", metavar="FILE", help="an image that is white where the control acts"
    )
    group.add_argument(
        "--resize-mode",
        action="append",
        choices=RESIZE_MODES,
        help="how to fit a map or photo whose aspect ratio differs from the image's: stretch, crop to the "
        "center, or pad (default: report an error)",
    )
    maps = parser.add_argument_group("maps")
    add_options(maps, "--low", "--high")
    add_options(
        maps,
        "--option",
        help="an option of the extractor, such as auto=true, sigma=2 or model=FOLDER; with --map, how to "
        "read its values: unit=mm, unit=m or unit=inverse for depth, palette=NAME for labels. Applies to all "
        "controls whose condition takes it, CONDITION.KEY=VALUE to that condition only (repeatable)",
    )
    add_options(maps, "--invert", "--max-megapixels")


def parse_controls(args: argparse.Namespace) -> tuple[ControlRequest, ...]:
    """Return a request for each control, with its own values. `InvalidArgument` names the option."""
    sources: list[tuple[str, str]] = args.sources or []
    if not sources:
        raise InvalidArgument("--image or --map")
    given: list[dict[str, Any]] = [{} for _ in sources]
    for name in _PER_CONTROL:
        values = getattr(args, name)
        fits = values is None or len(values) in (1, len(sources))
        count = f"once or {len(sources)} times" if len(sources) > 1 else "once for one map"
        expect(fits, _option(name), f"to be given {count}", f"{len(values or [])} values")
        for place, own in enumerate(given if values else []):
            own[name] = values[place if len(values) > 1 else 0]
    is_bundled = args.base in BUNDLED
    for own in given:
        if not is_bundled and "adapter" not in own:
            hint = f"--base {args.base} needs an adapter that was trained for it"
            raise InvalidArgument("--adapter", hint=hint)
    kinds = [
        (option, own.get("condition", CONDITION)) for (option, _), own in zip(sources, given, strict=True)
    ]
    options = _options_of_each(kinds, ExtractorOptions(args.low, args.high, tuple(args.option)))
    shared = {"invert": args.invert, "max_megapixels": args.max_megapixels}
    return tuple(
        _control(option, file, extractor, {**own, **shared})
        for (option, file), extractor, own in zip(sources, options, given, strict=True)
    )


def _options_of_each(kinds: Sequence[tuple[str, str]], given: ExtractorOptions) -> list[ExtractorOptions]:
    """Distribute the options to the controls, each given by --image or --map and its condition.

    CONDITION.KEY=VALUE applies to the controls of this condition only. An option that no control takes goes
    to all of them; their own checks then report what is wrong with it.

    Raises:
        InvalidArgument: for a condition that no control has.
    """
    pairs: list[list[str]] = [[] for _ in kinds]
    for pair in given.pairs:
        condition_name, dot, rest = pair.partition(".")
        is_for_one = bool(dot) and "=" not in condition_name
        names = ", ".join(dict.fromkeys(name for _, name in kinds))
        fits = not is_for_one or condition_name in [name for _, name in kinds]
        expect(fits, "--option", f"KEY=VALUE or CONDITION.KEY=VALUE, of {names}", f"'{pair}'")
        own = rest if is_for_one else pair
        among = [place for place, (_, name) in enumerate(kinds) if not is_for_one or name == condition_name]
        for place in _takers(kinds, among, own.partition("=")[0]):
            pairs[place].append(own)
    everywhere = range(len(kinds))
    low = [] if given.low is None else _takers(kinds, everywhere, "low")
    high = [] if given.high is None else _takers(kinds, everywhere, "high")
    return [
        ExtractorOptions(given.low if i in low else None, given.high if i in high else None, tuple(own))
        for i, own in enumerate(pairs)
    ]


def _takers(kinds: Sequence[tuple[str, str]], among: Sequence[int], key: str) -> Sequence[int]:
    """Return which of the controls take an option; all of them if none does."""
    return [place for place in among if _takes(*kinds[place], key)] or among


def _takes(option: str, condition_name: str, key: str) -> bool:
    from nexus_adapters.conditions import EXTRACTORS
    from nexus_adapters.conditions.maps import MAP_OPTIONS

    if condition_name not in EXTRACTORS:  # rejected later
        return False
    extractor = EXTRACTORS[condition_name]
    return key in MAP_OPTIONS[extractor.kind] if option == MAP else extractor.takes(key)


def _control(option: str, file: str, extractor: ExtractorOptions, values: dict[str, Any]) -> ControlRequest:
    """Build one control from the values of its options. `InvalidArgument` names the option or argument."""
    condition_name = values.pop("condition", CONDITION)
    level_scales = values.pop("level_scales", None)
    if level_scales is not None:
        values["level_scales"] = _numbers(level_scales)
    given = MapSource(file, extractor) if option == MAP else ImageSource(file, extractor)
    return ControlRequest(given, condition_name, **values)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "numbers separated by commas, as in 0.5,1,1,1"
        raise InvalidArgument("--level-scales", expected, f"'{text}'") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
