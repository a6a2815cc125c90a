"""An adapter's config in words, and well-known bases by the numbers of the adapters that fit them."""

from collections.abc import Mapping
from typing import Any

from nexus_adapters.adapter.arguments import FORMAT, FORMAT_VERSION, variant_of

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
