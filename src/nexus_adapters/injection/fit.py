"""Does this adapter fit this UNet? Asked before the first step: diffusers drops some misfits silently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nexus_adapters.adapter.geometry import adapter_geometry, latent_strides, unet_config


@dataclass(frozen=True)
class Traits:
    """What injection must know of an adapter. `text_width` is None where it does not read the prompt."""

    in_channels: int
    channels: tuple[int, ...]
    unshuffle: int
    pools: tuple[int, ...] | None
    text_width: int | None


def traits(adapter: nn.Module | Any) -> Traits:
    """The traits of a `NexusAdapter` or of diffusers' `T2IAdapter`; ValueError for anything else."""
    config = getattr(adapter, "config", None)
    config = config if isinstance(config, Mapping) else {}
    unshuffle = config.get("unshuffle", config.get("downscale_factor"))
    if unshuffle is None or not {"in_channels", "channels"} <= set(config):
        raise ValueError(
            f"adapter: expected a NexusAdapter or a T2IAdapter; received a {type(adapter).__name__}"
        )
    pools = config.get("pools")
    return Traits(
        in_channels=config["in_channels"],
        channels=tuple(config["channels"]),
        unshuffle=unshuffle,
        pools=None if pools is None else tuple(int(pool) for pool in pools),
        text_width=config.get("text_width"),
    )


def check_fit(adapter: nn.Module | Any, unet: nn.Module | Any) -> None:
    """Raise a ValueError, with both numbers, unless the adapter's features fit the UNet's places for them."""
    found, needed = traits(adapter), adapter_geometry(unet_config(unet), vae_scale_factor=1)
    _compare("number of features", len(found.channels), len(needed["channels"]))
    _compare("channels", found.channels, needed["channels"])
    if found.pools is not None:
        _compare("pools", found.pools, tuple(int(pool) for pool in needed["pools"]))
    if found.text_width is not None:
        _compare("text_width", found.text_width, needed["text_width"])
    if found.unshuffle % needed["unshuffle"]:
        raise ValueError(
            f"adapter: expected an unshuffle that is a multiple of {needed['unshuffle']}, the stride at "
            f"which the UNet takes the first feature; received {found.unshuffle}"
        )


def _compare(name: str, found: object, needed: object) -> None:
    if found != needed:
        raise ValueError(f"adapter: expected {name} {needed}, as the UNet takes them; received {found}")


def pixels_per_latent(adapter: nn.Module | Any, unet: nn.Module | Any) -> int:
    """The VAE's factor, from the adapter's stem: no VAE is needed to tell the image's size."""
    return traits(adapter).unshuffle // latent_strides(unet_config(unet))[0]


def check_pixels(adapter: nn.Module | Any, unet: nn.Module | Any, vae_scale_factor: int | None) -> None:
    """ValueError, with both numbers, where the adapter's stem is made for another VAE. None: not known."""
    found = pixels_per_latent(adapter, unet)
    if vae_scale_factor is not None and found != vae_scale_factor:
        raise ValueError(
            f"adapter: expected {vae_scale_factor} pixels of the condition per latent, as the pipeline's VAE "
            f"has; received {found}, from unshuffle {traits(adapter).unshuffle}"
        )


def place_sizes(config: Mapping[str, Any], height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of every place in the UNet that takes a feature, for latents of `height` x `width`.

    Each downsampler is a 3x3 convolution of stride 2: with padding 1 it rounds up; with padding 0 diffusers
    pads one row and column at the end, and so it rounds down.
    """
    padding = config.get("downsample_padding", 1)

    def size(side: int, stride: int) -> int:
        for _ in range(stride.bit_length() - 1):
            side = (side + (2 * padding or 1) - 3) // 2 + 1
        return side

    return [(size(height, stride), size(width, stride)) for stride in latent_strides(config)]


def match_places(
    features: Sequence[Tensor], unet: nn.Module, rows: int, height: int, width: int
) -> list[Tensor]:
    """The features in exactly the shapes that the UNet adds, for latents of `height` x `width`.

    Poolings round up and a UNet may round down: one surplus row or column at the end, which covers no latent,
    is cut. Any other difference is a ValueError: in the middle block diffusers would drop it silently.
    """
    config = unet_config(unet)
    channels = adapter_geometry(config, vae_scale_factor=1)["channels"]
    sizes = place_sizes(config, height, width)
    _compare("number of features", len(features), len(sizes))
    matched = []
    for level, (feature, width_c, (h, w)) in enumerate(zip(features, channels, sizes, strict=True), start=1):
        surplus = (feature.shape[-2] - h, feature.shape[-1] - w) if feature.ndim == 4 else (-1, -1)
        if feature.shape[:2] != (rows, width_c) or not all(0 <= extra <= 1 for extra in surplus):
            raise ValueError(
                f"adapter: expected feature {level} of shape {(rows, width_c, h, w)}, as the UNet takes it "
                f"for latents of {height}x{width}; received {tuple(feature.shape)}"
            )
        matched.append(feature[:, :, :h, :w])
    return matched
