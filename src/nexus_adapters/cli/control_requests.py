"""The controls of `nexus generate`: their arguments, and one checked, frozen request for each control."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.choices import (
    BALANCE_NAMES,
    CONDITION,
    DEFAULT_POLICY,
    MAX_MEGAPIXELS,
    RESIZE_MODES,
    Balance,
    Policy,
    ResizeMode,
)
from nexus_adapters.cli.extract import ExtractorOptions
from nexus_adapters.cli.options import ADAPTER, ADAPTER_SOURCES, add_options, expect_finite
from nexus_adapters.errors import InvalidArgument, expect, warn_caller


@dataclass(frozen=True)
class ImageSource:
    """A photo to extract the structure map from."""

    file: str
    extractor: ExtractorOptions
    option = "--image"


@dataclass(frozen=True)
class MapSource:
    """A structure map, and the options for reading it (`--option`)."""

    file: str
    reading: ExtractorOptions = field(default_factory=ExtractorOptions)
    option = "--map"


@dataclass(frozen=True)
class ControlRequest:
    """One control: the source of its structure map, and how it acts.

    Attributes:
        given: the map, or the photo to extract it from.
        condition_name: the extractor's name, which is also the map's condition.
        adapter: the adapter's source, as the user wrote it.
        scale, start, end, level_scales, noise_exponent: as in `Control`.
        policy: None for the default, or if `balance` decides it.
        balance: sets the policy and the level scales.
        mask: path of the mask's file.
        invert: whether to invert the map; None inverts a given map that has dark lines on white.
        resize_mode: how to fit a map or photo whose aspect ratio differs from the image's.
        max_megapixels: larger files are rejected.
    """

    given: ImageSource | MapSource
    condition_name: str = CONDITION
    adapter: str = ADAPTER
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    policy: Policy | None = None
    balance: Balance | None = None
    level_scales: tuple[float, ...] | None = None
    noise_exponent: float | None = None
    mask: str | None = None
    invert: bool | None = None
    resize_mode: ResizeMode | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `Control` other than adapter, condition and mask."""
        settings: dict[str, Any] = {
            "scale": self.scale,
            "start": self.start,
            "end": self.end,
            "noise_exponent": self.noise_exponent,
            "resize_mode": self.resize_mode,
        }
        if self.balance is not None:
            from nexus_adapters.injection import balance

            return settings | balance(self.balance)
        return settings | {"policy": self.policy or DEFAULT_POLICY, "level_scales": self.level_scales}


# Options of a control, given once for all controls or once for each. `ACTING` says how the control acts.
ACTING = ("scale", "start", "end", "policy", "balance", "level_scales", "noise_exponent", "mask")
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
        (ImageSource.option, "a photo to extract the structure map from"),
        (MapSource.option, "a structure map"),
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
    return key in MAP_OPTIONS[extractor.kind] if option == MapSource.option else extractor.takes(key)


def _control(option: str, file: str, extractor: ExtractorOptions, values: dict[str, Any]) -> ControlRequest:
    """Build one control from the values of its options. `InvalidArgument` names the option."""
    condition_name = values.pop("condition", CONDITION)
    level_scales = values.pop("level_scales", None)
    if level_scales is not None:
        values["level_scales"] = _numbers(level_scales)
    given: ImageSource | MapSource = ImageSource(file, extractor)
    if option == MapSource.option:
        given = MapSource(file, extractor)
        _check_map_options(extractor.values(condition_name), condition_name)
    control = ControlRequest(given, condition_name, **values)
    for name in ("scale", "start", "end"):
        expect_finite(_option(name), getattr(control, name))
    if control.scale < 0:
        warn_caller("--scale: a negative scale subtracts the adapter's features; 0 turns the adapter off")
    expect(0 <= control.start <= 1, "--start", "a number from 0 to 1", control.start)
    is_interval = control.start <= control.end <= 1
    expect(is_interval, "--end", f"a number from --start, {control.start}, to 1", control.end)
    if control.noise_exponent is not None:
        expect_finite("--noise-exponent", control.noise_exponent)
        expect(control.noise_exponent >= 0, "--noise-exponent", "at least 0", control.noise_exponent)
    for name in ("policy", "level_scales"):
        is_alone = control.balance is None or getattr(control, name) is None
        together = f"'{control.balance}' and {_option(name)}"
        expect(is_alone, "--balance", f"no {_option(name)} in addition", together)
    return control


def _check_map_options(options: dict[str, Any], condition_name: str) -> None:
    """Raise `InvalidArgument` for options that do not describe a map's values, as `unit` does for depth."""
    if not options:
        return
    from nexus_adapters.conditions import EXTRACTORS
    from nexus_adapters.conditions.maps import MAP_OPTIONS

    if condition_name not in EXTRACTORS:  # rejected later
        return
    extractor = EXTRACTORS[condition_name]
    known = [name for name in MAP_OPTIONS[extractor.kind] if name != "invert"]
    for name, value in options.items():
        option = f"--{name}" if name in ("low", "high") else f"--option {name}"
        if name == "invert":
            raise InvalidArgument(option, "--invert or --no-invert", repr(value))
        hint = "It is an option of the extractor; use it with --image" if extractor.takes(name) else ""
        expected = f"an option for {condition_name} maps ({', '.join(known) or 'there are none'})"
        expect(name in known, option, expected, repr(value), hint)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "numbers separated by commas, as in 0.5,1,1,1"
        raise InvalidArgument("--level-scales", expected, f"'{text}'") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
