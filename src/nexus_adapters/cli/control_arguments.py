"""The options of `nexus generate` that can be repeated: each control has its own, in the maps' order."""

import argparse
import copy
from typing import Any

from nexus_adapters.cli.checks import ADAPTER_HELP, expect_finite
from nexus_adapters.errors import InvalidArgument, expect

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
