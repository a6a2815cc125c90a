"""The arguments of a `NexusAdapter`: named configurations, checks, and values derived from a base.

Nothing here imports torch: commands that only read a config start fast.
"""

import reprlib
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any

from nexus_adapters.errors import InvalidArgument, expect

if TYPE_CHECKING:
    from nexus_adapters.bases.base import Base

# The named configurations. `groups` is the number of groups of the 3x3 convolutions: 1 is the plain
# convolution of Prime, 2 or more the heterogeneous convolution of Slim. The paper (arXiv 2602.14514) has no
# residual connection around the attention.
VARIANTS: dict[str, dict[str, Any]] = {
    "prime": {"groups": 1, "residual": True},
    "slim": {"groups": 2, "residual": True},
    "prime-paper": {"groups": 1, "residual": False},
    "slim-paper": {"groups": 2, "residual": False},
}

# All arguments of `NexusAdapter`; they are the keys of its config.
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
    "block",
    "block_options",
)

# The defaults: the paper's Prime on RGB maps. A config without one of them was saved before that argument
# existed and has its default.
OPTIONAL_ARGUMENTS: dict[str, Any] = {
    "in_channels": 3,
    "groups": 1,
    "residual": False,
    "zero_init": False,
    "noise_exponent": 0.0,
    "block": "paper",
    "block_options": {},
}

# Keys that diffusers writes into a config, in addition to those that start with an underscore.
DIFFUSERS_KEYS = ("auto_map", "quantization_config")

FORMAT = "format_version"  # the key in config.json, and in a single file's metadata
FORMAT_VERSION = 1
"""Format of saved adapters. It increases when older versions of this package would misread newer files."""

_JSON = "a dict of JSON values"
_MOST_POOLS = 16  # per stage: 65,536 pixels per side become one
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 8, 24, 24, 24
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


# Named configurations


def variant_of(groups: int, residual: bool) -> str:
    """Return a configuration's name: "prime", "slim" (2 or more groups), "prime-paper" or "slim-paper"."""
    name = "prime" if groups == 1 else "slim"
    return name if residual else f"{name}-paper"


def variant_arguments(variant: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return `groups` and `residual` of the configuration `variant`, updated by `overrides`.

    An override must fit the name: Slim has any number of groups from 2. With `residual=False`, "prime" and
    "slim" become the paper's configurations.

    Raises:
        InvalidArgument: for an unknown name, or an override that contradicts it.
    """
    # Compared as text, so that an unhashable value gets the same message.
    expect(str(variant) in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}", shown(variant))
    named = VARIANTS[variant]
    found = named | {name: value for name, value in (overrides or {}).items() if name in named}
    check_positive("groups", found["groups"])
    _check_bool("residual", found["residual"])
    expect(
        (found["groups"] == 1) == (named["groups"] == 1),
        "groups",
        f"{'1' if named['groups'] == 1 else '2 or more'} for variant {variant!r}",
        found["groups"],
        "1 group is Prime, 2 or more are Slim",
    )
    expect(
        named["residual"] or not found["residual"],
        "residual",
        f"False for variant {variant!r}",
        True,
        f"Variant {variant.removesuffix('-paper')!r} has the residual connection",
    )
    return found


def attention_heads(channels: Sequence[int]) -> tuple[int, int]:
    """Return (heads, head_width), the same for every stage, for stages of these widths (arXiv 2602.14514).

    The attention's inner width is half the widest stage. Heads have 64 channels if that divides it, else 32;
    otherwise there is one head.
    """
    inner_width = max(channels) // 2
    for head_width in (64, 32):
        if inner_width > 0 and inner_width % head_width == 0:
            return inner_width // head_width, head_width
    return 1, inner_width


# Checks


def shown(value: object) -> str:
    """Return the `repr` of a value that may be huge or deeply nested, shortened for an error message."""
    return _SHORT.repr(value)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument` for the first argument that cannot be used.

    Types are checked as well as values, since the arguments may come from a hand-edited config.json. Whether
    the block is registered and takes the options is not checked here.

    Args:
        arguments: all arguments of `NexusAdapter`.
    """
    for name in ("in_channels", "unshuffle", "groups", "text_width", "heads", "head_width"):
        check_positive(name, arguments[name])
    for name in ("residual", "zero_init"):
        _check_bool(name, arguments[name])
    check_noise_exponent(arguments["noise_exponent"])
    _check_stages(arguments["channels"], arguments["pools"], arguments["groups"])
    # Otherwise all features, and the gradients of all layers before the output projection, would be zero.
    expect(
        arguments["residual"] or not arguments["zero_init"],
        "zero_init",
        "False if residual=False",
        True,
        "Without the residual connection all features would be zero",
    )
    block, options = arguments["block"], arguments["block_options"]
    expect(isinstance(block, str) and block != "", "block", "the name of a registered block", shown(block))
    is_dict = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
    expect(is_dict, "block_options", _JSON, shown(options))


def check_positive(name: str, value: Any) -> None:
    """Raise `InvalidArgument`, named `name`, unless the value is a positive integer."""
    expect(_is_positive_int(value), name, "a positive integer", shown(value))


def check_noise_exponent(value: Any) -> float:
    """Return the value as a float; raise `InvalidArgument` unless it is finite and at least 0."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    fits = is_number and 0 <= value <= sys.float_info.max
    expect(fits, "noise_exponent", "a finite number of at least 0", shown(value))
    return float(value)


def check_channels(channels: Any) -> None:
    """Raise `InvalidArgument` unless `channels` has at least one stage, each with a positive width."""
    fits = isinstance(channels, (list, tuple)) and len(channels) > 0 and all(map(_is_positive_int, channels))
    expect(fits, "channels", "one positive integer per stage", shown(channels))


def check_config(
    config: Mapping[str, Any],
    overridden: Collection[str] = (),
    *,
    classes: Sequence[str] = ("NexusAdapter",),
    arguments: Collection[str] = ARGUMENTS,
    optional: Collection[str] = tuple(OPTIONAL_ARGUMENTS),
) -> None:
    """Raise `InvalidArgument` unless `config` has all of an adapter's arguments and no unknown keys.

    diffusers itself ignores unknown keys.

    Args:
        config: of an adapter, as in its config.json.
        overridden: arguments that the caller passes in addition to the config.
        classes: names of the classes whose configs are accepted; the first is the class being loaded.
        arguments: the arguments of that class.
        optional: the arguments that have a default.
    """
    check_format_version(config)
    given = {*config, *overridden, *optional}
    missing = [name for name in arguments if name not in given]
    known = {*arguments, *DIFFUSERS_KEYS, FORMAT}
    unknown = [name for name in config if name not in known and name[:1] != "_"]
    kind = config.get("_class_name", classes[0])
    problems = {"missing": missing, "unknown": unknown}
    found = "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in problems.items() if names)
    if found or kind not in classes:
        hint = f"Load it with {str(kind)[:100]}.from_pretrained" if kind not in classes else ""
        if "downscale_factor" in config:
            hint = "`nexus convert` reads T2I-Adapters and the public release's adapters"
        raise InvalidArgument(
            "config",
            f"the config of a {classes[0]}, with {', '.join(arguments)}",
            f"the config of a {str(kind)[:100]}" + (f" ({found})" if found else ""),
            hint,
        )


def check_saved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments in the config of a saved `NexusAdapter`; missing ones get their default.

    Raises:
        InvalidArgument: as `check_config` and `check_arguments`, and for a quantized adapter, whose tensors
            are different.
    """
    check_config(config)
    quantized = config.get("quantization_config")
    hint = "Save the adapter before it is quantized"
    expect(quantized is None, "quantization_config", "none", shown(quantized), hint)
    arguments = {**OPTIONAL_ARGUMENTS, **config}
    check_arguments(arguments)
    options = arguments["block_options"]
    has_none = arguments["block"] != "paper" or not options
    expect(has_none, "block_options", "no options for block 'paper'", shown(options))
    return arguments


def check_format_version(config: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument` for a config of a newer format than this version of the package reads."""
    version = config.get(FORMAT, FORMAT_VERSION)
    check_positive(FORMAT, version)
    expect(
        version <= FORMAT_VERSION,
        FORMAT,
        f"at most {FORMAT_VERSION}",
        version,
        "It was saved by a newer version of nexus-adapters: upgrade the package to load it",
    )


def _check_stages(channels: Any, pools: Any, groups: int) -> None:
    check_channels(channels)
    fits = isinstance(pools, (list, tuple))
    fits = fits and all(isinstance(pool, int) and 0 <= pool <= _MOST_POOLS for pool in pools)
    expected = f"True, False or a number of 2x2 poolings per stage, at most {_MOST_POOLS}"
    expect(fits, "pools", expected, shown(pools))
    count = f"{len(channels)} entries, as many as channels"
    expect(len(pools) == len(channels), "pools", count, shown(list(pools)))
    # Callers rely on `unshuffle` being the stride of the first feature.
    expect(
        not pools[0],
        "pools",
        "no pooling before the first stage, whose size is set by unshuffle",
        shown(list(pools)),
    )
    divides = all(width % groups == 0 for width in channels)
    expect(divides, "groups", f"a divisor of every width in {shown(tuple(channels))}", shown(groups))


def _check_bool(name: str, value: Any) -> None:
    expect(isinstance(value, bool), name, "True or False", shown(value))


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# Which base an adapter fits

_SD_CHANNELS = [320, 640, 1280, 1280]
# (channels, pools, unshuffle, text_width) of adapters for well-known bases.
_BASES: list[tuple[str, list[int], list[int], int, int]] = [
    ("Stable Diffusion 1.x", _SD_CHANNELS, [0, 1, 1, 1], 8, 768),
    ("Stable Diffusion 2.x", _SD_CHANNELS, [0, 1, 1, 1], 8, 1024),
    ("Stable Diffusion XL", _SD_CHANNELS, [0, 0, 1, 0], 16, 2048),
    ("the embedded Stable Diffusion", [96, 96, 96, 128], [0, 1, 1, 1], 8, 160),
]


def describe_base(config: Mapping[str, Any]) -> str:
    """Describe the base that an adapter with this config fits: its name, if known, and its shapes."""
    pools = [int(pool) for pool in config["pools"]]
    numbers_of_config = [list(config["channels"]), pools, config["unshuffle"], config["text_width"]]
    numbers = f"text width {config['text_width']}, channels {', '.join(map(str, config['channels']))}"
    for name, *numbers_of_base in _BASES:
        if numbers_of_base == numbers_of_config:
            return f"{name} ({numbers})"
    return f"{numbers}, condition pixels per feature pixel {config['unshuffle']}"


def describe_adapter(config: Mapping[str, Any]) -> dict[str, str]:
    """Return descriptions of a Nexus adapter's `variant`, `block`, `base` and `format`.

    `config` has all arguments.
    """
    variant = variant_of(config["groups"], config["residual"])
    form = "residual connection" if config["residual"] else "no residual connection, as in the paper"
    exponent, options = config["noise_exponent"], config["block_options"]
    fades = f", fades with the noise (exponent {exponent:g})" if exponent else ""
    return {
        "variant": f"{variant} (groups {config['groups']}, {form}){fades}",
        "block": ", ".join([config["block"], *(f"{name} {value!r}" for name, value in options.items())]),
        "base": describe_base(config),
        "format": f"version {config.get(FORMAT, FORMAT_VERSION)}",
    }


def base_geometry(base: "Base", pixels_per_latent: int | None = None) -> dict[str, Any]:
    """Return `channels`, `pools`, `unshuffle` and `text_width` of the adapter that fits a base.

    Args:
        base: the base; one that only has a denoiser's config works if `pixels_per_latent` is given.
        pixels_per_latent: image pixels per latent pixel, per side; None for those of the base's autoencoder.

    Raises:
        InvalidArgument: if the denoiser accepts no features, or its prompt embeddings have no single width.
    """
    places = base.places()
    return geometry_from_places(
        [place.channels for place in places],
        [place.stride for place in places],
        base.text_width,
        base.pixels_per_latent if pixels_per_latent is None else pixels_per_latent,
    )


def geometry_from_places(
    channels: Sequence[int], strides: Sequence[int], text_width: int, pixels_per_latent: int
) -> dict[str, Any]:
    """Return `channels`, `pools`, `unshuffle` and `text_width` of the adapter for these places.

    Args:
        channels: width of the hidden states at each place, from the first to the last.
        strides: for every place, how many latent pixels one pixel of the hidden states spans, per side.
        text_width: width of the prompt embeddings.
        pixels_per_latent: image pixels per latent pixel, per side.

    Raises:
        InvalidArgument: if a stride is not a power of two times the previous one.
    """
    check_channels(channels)
    for stride in strides:
        check_positive("strides", stride)
    count = f"{len(channels)} strides, as many as channels"
    expect(len(strides) == len(channels), "strides", count, shown(list(strides)))
    check_positive("text_width", text_width)
    check_positive("pixels_per_latent", pixels_per_latent)
    pools: list[int] = [False]
    for before, after in pairwise(strides):
        ratio = after // before
        fits = ratio * before == after and ratio.bit_count() == 1
        expected = "each a power of two (1, 2, 4, ...) times the previous one"
        expect(fits, "strides", expected, f"{after} after {before}")
        halvings = ratio.bit_length() - 1
        pools.append(bool(halvings) if halvings < 2 else halvings)
    return {
        "channels": tuple(channels),
        "pools": tuple(pools),
        "unshuffle": pixels_per_latent * strides[0],
        "text_width": text_width,
    }
