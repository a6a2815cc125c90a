"""The numbers of an adapter: its variants, the heads rule, and the checks of its arguments.

Nothing here imports torch: commands that only read a config start fast.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

# Everything in which the variants differ. `groups` is the number of groups of the 3x3 convolutions:
# 1 is the plain convolution of Prime, 2 or more the heterogeneous convolution of Slim.
VARIANTS: dict[str, dict[str, int]] = {
    "prime": {"groups": 1},
    "slim": {"groups": 2},
}


# NexusAdapter's, all of which stand in its config.
ARGUMENTS = (
    "in_channels",
    "channels",
    "pools",
    "unshuffle",
    "groups",
    "text_width",
    "heads",
    "head_width",
    "residual",
    "zero_init",
    "noise_exponent",
)


# Those with a default: Prime as in the paper, on RGB maps.
OPTIONAL_ARGUMENTS: dict[str, Any] = {
    "in_channels": 3,
    "groups": 1,
    "residual": False,
    "zero_init": False,
    "noise_exponent": 0.0,
}

# What diffusers itself writes into a config, beside names that begin with an underscore.
DIFFUSERS_KEYS = ("auto_map", "quantization_config")


def variant_of(groups: int) -> str:
    """The variant that a number of groups makes: "prime" for 1, "slim" for 2 and more."""
    return "prime" if groups == 1 else "slim"


def attention_heads(channels: Sequence[int]) -> tuple[int, int]:
    """(heads, head_width) for stages of these channels; the same in every stage (arXiv 2602.14514).

    The inner width is half the widest level, in heads of 64 where that divides it, else of 32, else one head.
    """
    inner_width = max(channels) // 2
    for head_width in (64, 32):
        if inner_width > 0 and inner_width % head_width == 0:
            return inner_width // head_width, head_width
    return 1, inner_width


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the argument, what was expected and what came; return when all is well.

    `arguments` are all of `NexusAdapter`'s. Types are checked as well as values, since they may come from a
    hand-edited config.json.
    """
    for name in ("in_channels", "unshuffle", "groups", "text_width", "heads", "head_width"):
        check_positive(name, arguments[name])
    for name in ("residual", "zero_init"):
        _expect(isinstance(arguments[name], bool), name, "True or False", arguments[name])
    check_noise_exponent(arguments["noise_exponent"])
    _check_stages(arguments["channels"], arguments["pools"], arguments["groups"])
    if arguments["zero_init"] and not arguments["residual"]:
        raise ValueError(
            "zero_init: expected False where residual=False (all features, and the gradients of all layers "
            "before the output projection, would be zero); received zero_init=True, residual=False"
        )


def check_positive(name: str, value: Any) -> None:
    """ValueError, naming the argument `name`, unless the value is a positive integer."""
    _expect(_is_positive_int(value), name, "a positive integer", value)


def check_noise_exponent(value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number of at least 0."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    _expect(is_number and 0 <= value < math.inf, "noise_exponent", "a finite number of at least 0", value)
    return float(value)


def check_channels(channels: Any) -> None:
    """ValueError unless there is a positive width for every stage, and a stage."""
    _expect(
        isinstance(channels, (list, tuple)) and len(channels) > 0 and all(map(_is_positive_int, channels)),
        "channels",
        "one positive integer per stage",
        channels,
    )


def check_config(config: Mapping[str, Any], overridden: Collection[str] = ()) -> None:
    """Raise a ValueError unless `config` has an adapter's arguments, and beside them only diffusers' keys.

    `overridden` are arguments that the caller passes beside it. diffusers itself ignores unknown keys.
    """
    given = {*config, *overridden, *OPTIONAL_ARGUMENTS}
    missing = [name for name in ARGUMENTS if name not in given]
    unknown = [name for name in config if name not in {*ARGUMENTS, *DIFFUSERS_KEYS} and name[:1] != "_"]
    kind = config.get("_class_name", "NexusAdapter")
    if missing or unknown or kind != "NexusAdapter":
        hint = ". `nexus convert` reads T2I-Adapters and the public release's adapters"
        raise ValueError(
            f"config: expected a NexusAdapter's, with {', '.join(ARGUMENTS)}; received a {kind}'s "
            f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'})"
            + (hint if "downscale_factor" in config else "")
        )


def _check_stages(channels: Any, pools: Any, groups: int) -> None:
    check_channels(channels)
    _expect(
        isinstance(pools, (list, tuple)) and all(isinstance(pool, int) and pool >= 0 for pool in pools),
        "pools",
        "True, False or a number of 2x2 poolings per stage",
        pools,
    )
    _expect(
        len(pools) == len(channels), "pools", f"{len(channels)} entries, as many as channels", list(pools)
    )
    # Else `unshuffle` would not be the first feature's stride, on which every caller relies.
    _expect(not pools[0], "pools", "no pooling before the first stage (unshuffle sets its size)", list(pools))
    for width in channels:
        _expect(width % groups == 0, "groups", f"a divisor of every width in {tuple(channels)}", groups)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _expect(condition: bool, name: str, expected: str, received: Any) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}; received {received!r}")
