"""The arguments of a `NexusAdapter`: named configurations, checks, and those that follow from a base.

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

# All arguments of `NexusAdapter`, which are the keys of its config.
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

# The defaults, which are the paper's Prime on RGB maps. A config without one of them was saved before that
# argument existed, and means the default.
OPTIONAL_ARGUMENTS: dict[str, Any] = {
    "in_channels": 3,
    "groups": 1,
    "residual": False,
    "zero_init": False,
    "noise_exponent": 0.0,
    "block": "paper",
    "block_options": {},
}

# Keys that diffusers writes into a config, in addition to those that begin with an underscore.
DIFFUSERS_KEYS = ("auto_map", "quantization_config")

FORMAT = "format_version"  # the key in config.json, and in a single file's metadata
FORMAT_VERSION = 1
"""Of saved adapters; raised when an older version of this package would misread what a newer one writes."""

_JSON = "a dict of JSON values"
_MOST_POOLS = 16  # of one stage: 65,536 pixels become one
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 8, 24, 24, 24
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


# Named configurations


def variant_of(groups: int, residual: bool) -> str:
    """The name of a configuration: "prime", "slim" (2 groups and more), "prime-paper" or "slim-paper"."""
    name = "prime" if groups == 1 else "slim"
    return name if residual else f"{name}-paper"


def variant_arguments(variant: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`groups` and `residual` of the configuration `variant`, with those among `overrides` in their place.

    An override must agree with the name: any number of groups from 2 is a Slim, and "prime" or "slim" may be
    built without the residual connection, which makes it the paper's.

    Raises:
        InvalidArgument: for an unknown name, and for an override that contradicts it.
    """
    # As text: a value that has no hash gets the same message.
    expect(str(variant) in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}", shown(variant))
    named = VARIANTS[variant]
    found = named | {name: value for name, value in (overrides or {}).items() if name in named}
    check_positive("groups", found["groups"])
    _check_bool("residual", found["residual"])
    expect(
        (found["groups"] == 1) == (named["groups"] == 1),
        "groups",
        f"{'1' if named['groups'] == 1 else '2 or more'}, as variant {variant!r} has it",
        found["groups"],
        "1 group is Prime, 2 or more are Slim",
    )
    expect(
        named["residual"] or not found["residual"],
        "residual",
        f"False, as variant {variant!r} has it",
        True,
        f"Variant {variant.removesuffix('-paper')!r} has the residual connection",
    )
    return found


def attention_heads(channels: Sequence[int]) -> tuple[int, int]:
    """(heads, head_width) for stages of these channels; the same in every stage (arXiv 2602.14514).

    The inner width is half the widest level, in heads of 64 where that divides it, else of 32, else one head.
    """
    inner_width = max(channels) // 2
    for head_width in (64, 32):
        if inner_width > 0 and inner_width % head_width == 0:
            return inner_width // head_width, head_width
    return 1, inner_width


# Checks


def shown(value: object) -> str:
    """`repr` of a value that may be huge or deep, as in anyone's config, cut to what an error shows."""
    return _SHORT.repr(value)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument` for the first argument that cannot be used.

    `arguments` are all of `NexusAdapter`'s. Types are checked as well as values, since they may come from a
    hand-edited config.json. Whether the block is registered, and takes the options, is not checked here.
    """
    for name in ("in_channels", "unshuffle", "groups", "text_width", "heads", "head_width"):
        check_positive(name, arguments[name])
    for name in ("residual", "zero_init"):
        _check_bool(name, arguments[name])
    check_noise_exponent(arguments["noise_exponent"])
    _check_stages(arguments["channels"], arguments["pools"], arguments["groups"])
    # Else all features, and the gradients of all layers before the output projection, would be zero.
    expect(
        arguments["residual"] or not arguments["zero_init"],
        "zero_init",
        "False where residual=False",
        True,
        "Without the residual connection all features would be zero",
    )
    block, options = arguments["block"], arguments["block_options"]
    expect(isinstance(block, str) and block != "", "block", "the name of a registered block", shown(block))
    is_dict = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
    expect(is_dict, "block_options", _JSON, shown(options))


def check_positive(name: str, value: Any) -> None:
    """Raise `InvalidArgument` for the argument `name` unless the value is a positive integer."""
    expect(_is_positive_int(value), name, "a positive integer", shown(value))


def check_noise_exponent(value: Any) -> float:
    """The value as a float; `InvalidArgument` unless it is a finite number of at least 0."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    fits = is_number and 0 <= value <= sys.float_info.max
    expect(fits, "noise_exponent", "a finite number of at least 0", shown(value))
    return float(value)


def check_channels(channels: Any) -> None:
    """Raise `InvalidArgument` unless there is a positive width for every stage, and a stage."""
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
    """Raise `InvalidArgument` unless `config` has an adapter's arguments, and else only diffusers' keys.

    diffusers itself ignores unknown keys.

    Args:
        config: of an adapter, as in its config.json.
        overridden: arguments that the caller passes in addition to the config.
        classes: names of the classes whose configs are accepted, first that of the class being loaded.
        arguments: of that class.
        optional: those of them that have a default.
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
        hint = f"Load it by {str(kind)[:100]}.from_pretrained" if kind not in classes else ""
        if "downscale_factor" in config:
            hint = "`nexus convert` reads T2I-Adapters and the public release's adapters"
        raise InvalidArgument(
            "config",
            f"that of a {classes[0]}, with {', '.join(arguments)}",
            f"that of a {str(kind)[:100]}" + (f" ({found})" if found else ""),
            hint,
        )


def check_saved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments in the config of a saved `NexusAdapter`, with the defaults of those that it lacks.

    `InvalidArgument` for what `check_config` and `check_arguments` refuse, and for a quantized adapter, whose
    tensors are others.
    """
    check_config(config)
    quantized = config.get("quantization_config")
    hint = "Save the adapter before it is quantized"
    expect(quantized is None, "quantization_config", "none", shown(quantized), hint)
    arguments = {**OPTIONAL_ARGUMENTS, **config}
    check_arguments(arguments)
    options = arguments["block_options"]
    has_none = arguments["block"] != "paper" or not options
    expect(has_none, "block_options", "no options, as block 'paper' has none", shown(options))
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
        "It was saved by a newer version of nexus-adapters: upgrade this one to load it",
    )


def _check_stages(channels: Any, pools: Any, groups: int) -> None:
    check_channels(channels)
    fits = isinstance(pools, (list, tuple))
    fits = fits and all(isinstance(pool, int) and 0 <= pool <= _MOST_POOLS for pool in pools)
    expected = f"True, False or a number of 2x2 poolings per stage, at most {_MOST_POOLS}"
    expect(fits, "pools", expected, shown(pools))
    count = f"{len(channels)} entries, as many as channels"
    expect(len(pools) == len(channels), "pools", count, shown(list(pools)))
    # Else `unshuffle` would not be the first feature's stride, on which every caller relies.
    expect(
        not pools[0],
        "pools",
        "no pooling before the first stage (unshuffle sets its size)",
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
# (channels, pools, unshuffle, text_width) of the adapters for well-known bases.
_BASES: list[tuple[str, list[int], list[int], int, int]] = [
    ("Stable Diffusion 1.x", _SD_CHANNELS, [0, 1, 1, 1], 8, 768),
    ("Stable Diffusion 2.x", _SD_CHANNELS, [0, 1, 1, 1], 8, 1024),
    ("Stable Diffusion XL", _SD_CHANNELS, [0, 0, 1, 0], 16, 2048),
    ("the embedded Stable Diffusion", [96, 96, 96, 128], [0, 1, 1, 1], 8, 160),
]


def describe_base(config: Mapping[str, Any]) -> str:
    """Say which base an adapter of this config fits: by name where known, and by the numbers that count."""
    pools = [int(pool) for pool in config["pools"]]
    numbers_of_config = [list(config["channels"]), pools, config["unshuffle"], config["text_width"]]
    numbers = f"text width {config['text_width']}, channels {', '.join(map(str, config['channels']))}"
    for name, *numbers_of_base in _BASES:
        if numbers_of_base == numbers_of_config:
            return f"{name} ({numbers})"
    return f"{numbers}, condition pixels per feature pixel {config['unshuffle']}"


def describe_adapter(config: Mapping[str, Any]) -> dict[str, str]:
    """A Nexus adapter's `variant`, `block`, `base` and `format`. Its config has all arguments."""
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
    """`channels, pools, unshuffle, text_width` of the adapter that fits a base.

    Args:
        base: a denoiser's config is enough, if `pixels_per_latent` is given.
        pixels_per_latent: image pixels per latent pixel, per side; None for those of the base's autoencoder.

    Raises:
        InvalidArgument: where the denoiser takes no features, or reads no text of a single width.
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
    """`channels, pools, unshuffle, text_width` of the adapter whose features have these places.

    Args:
        channels: of the hidden states at each place, from the first to the last.
        strides: for every place, how many latent pixels one pixel of the hidden states spans, per side.
        text_width: of the prompt embeddings.
        pixels_per_latent: image pixels per latent pixel, per side.

    Raises:
        InvalidArgument: where a stride is no power of two times the one before.
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
        expected = "each a power of two (1, 2, 4, ...) times the one before"
        expect(fits, "strides", expected, f"{after} after {before}")
        halvings = ratio.bit_length() - 1
        pools.append(bool(halvings) if halvings < 2 else halvings)
    return {
        "channels": tuple(channels),
        "pools": tuple(pools),
        "unshuffle": pixels_per_latent * strides[0],
        "text_width": text_width,
    }
