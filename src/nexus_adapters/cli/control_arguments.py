"""The options of `nexus generate` that can be repeated: each control has its own, in the maps' order."""

import argparse
import copy
from typing import Any

from nexus_adapters.cli.checks import expect, expect_finite

POLICIES = ("positive", "per_branch", "cond_only")
BALANCES = ("balanced", "prompt", "control")

# Option -> its value where it is not given.
_DEFAULTS: dict[str, Any] = {
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
        "One for each --image or --map. The other options are given once for all, or once for each in the "
        "same order.",
    )
    for option, text in (
        ("image", "a photo, whose structure map is drawn first"),
        ("map", "a structure map"),
    ):
        group.add_argument(
            f"--{option}", metavar="FILE", action=AppendSource, default=argparse.SUPPRESS, help=text
        )

    def add(option: str, **settings: Any) -> None:
        group.add_argument(f"--{option}", action="append", **settings)

    add("condition", metavar="NAME", help="kind of map (default canny)")
    add(
        "adapter",
        metavar="PATH",
        help="Nexus or T2I-Adapter, a folder or Hub id, required with --base; without: prime (default) or "
        "slim, which are embedded",
    )
    add("scale", type=float, help="of the adapter; 0 is the base alone (default 1)")
    add("start", type=float, help="part of the schedule, 0 to 1, from which ...")
    add("end", type=float, help="... to which the adapter acts (default 0 and 1)")
    add("policy", choices=POLICIES, help="which text the adapter reads (default positive)")
    add("balance", choices=BALANCES, help="what comes first, in place of --policy and --level-scales")
    add("level-scales", metavar="N,N,...", help="a factor for each feature of the adapter, finest first")
    add(
        "noise-exponent",
        type=float,
        metavar="P",
        help="how features fade with the noise: times its share of the variance to this power (default: as "
        "the adapter was trained)",
    )
    add("mask", metavar="FILE", help="an image, white where the control acts")


def split_controls(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each control, with all others beside them. ValueError names the argument."""
    sources = args.sources or []
    expect(len(sources) > 0, "--image, --map", "at least one of them", "none")
    controls = []
    for place, (option, file) in enumerate(sources):
        control = copy.copy(args)
        control.image, control.map = (file, None) if option == "image" else (None, file)
        for name, default in _DEFAULTS.items():
            given = getattr(args, name)
            option_name = f"--{name.replace('_', '-')}"
            fits = given is None or len(given) in (1, len(sources))
            expect(fits, option_name, f"1 or {len(sources)}, as many as maps", given and len(given))
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
    is_alone = control.balance is None or (control.policy is None and control.level_scales is None)
    expect(
        is_alone, "--balance", "no --policy and no --level-scales beside it", f"'{control.balance}' with them"
    )
    if control.level_scales is not None:
        control.level_scales = _numbers(control.level_scales)
    return control


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        expect(False, "--level-scales", "numbers with commas between them, as in 0.5,1,1,1", f"'{text}'")
        raise AssertionError from None


def settings_of_control(control: argparse.Namespace) -> dict[str, Any]:
    """What a control's `Control` takes beside adapter, condition and mask."""
    names = ("scale", "start", "end", "noise_exponent")
    settings: dict[str, Any] = {name: getattr(control, name) for name in names}
    if control.balance is not None:
        from nexus_adapters.injection import balance

        return settings | balance(control.balance)
    return settings | {"policy": control.policy or POLICIES[0], "level_scales": control.level_scales}
