"""Check that an adapter fits a base before the first step: diffusers silently drops some wrong features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn

from nexus_adapters.bases.base import Base
from nexus_adapters.bases.unet import check_kind
from nexus_adapters.errors import InvalidArgument


@dataclass(frozen=True)
class AdapterGeometry:
    """The shapes of an adapter that must fit the base. `text_width` is None if it reads no prompt."""

    in_channels: int
    channels: tuple[int, ...]
    unshuffle: int
    pools: tuple[int, ...] | None
    text_width: int | None


def geometry_of(adapter: nn.Module | Any) -> AdapterGeometry:
    """Return the geometry of a `NexusAdapter` or diffusers' `T2IAdapter`; else raise `InvalidArgument`."""
    config = getattr(adapter, "config", None)
    found = geometry_of_config(config) if isinstance(config, Mapping) else None
    if found is None:
        raise InvalidArgument("adapter", "a NexusAdapter or a T2IAdapter", f"a {type(adapter).__name__}")
    return found


def geometry_of_config(config: Mapping[str, Any]) -> AdapterGeometry | None:
    """Return the geometry of a `NexusAdapter` or diffusers' `T2IAdapter` by its config; None for others."""
    unshuffle = config.get("unshuffle", config.get("downscale_factor"))
    channels, pools = config.get("channels"), config.get("pools")
    numbers = (unshuffle, config.get("in_channels"), *_listed(channels), *_listed(pools))
    text_width = config.get("text_width")
    if not channels or not all(isinstance(number, int) for number in (*numbers, text_width or 0)):
        return None
    if config.get("adapter_type") == "light_adapter":  # its last block repeats the previous width
        channels = [*channels, channels[-1]]
    return AdapterGeometry(
        in_channels=config["in_channels"],
        channels=tuple(channels),
        unshuffle=unshuffle,
        pools=None if pools is None else tuple(int(pool) for pool in pools),
        text_width=text_width,
    )


def _listed(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value, None)


def check_fit(adapter: nn.Module | Any, base: Base) -> None:
    """Raise `InvalidArgument`, with both numbers, unless the adapter's features fit the base's places."""
    check_geometry(geometry_of(adapter), base)


def check_geometry(found: AdapterGeometry, base: Base) -> None:
    """Raise `InvalidArgument`, as `check_fit`, for the geometry of an adapter that may not be loaded."""
    places = base.places()
    text_widths = (None, None) if found.text_width is None else (found.text_width, base.text_width)
    check_kind(base, _strides(found), text_widths, found.channels)
    _compare("number of features", len(found.channels), len(places))
    _compare("channels", found.channels, tuple(place.channels for place in places))
    if found.pools is not None:
        ratios = [after.stride // before.stride for before, after in pairwise(places)]
        _compare("pools", found.pools, (0, *(ratio.bit_length() - 1 for ratio in ratios)))
    if found.text_width is not None:
        _compare("text_width", found.text_width, base.text_width)
    if found.unshuffle % places[0].stride:
        raise InvalidArgument(
            "adapter",
            f"an unshuffle that is a multiple of {places[0].stride}, the stride of the base's first place",
            found.unshuffle,
        )


def _strides(found: AdapterGeometry) -> tuple[int, ...]:
    """Return the strides that the adapter was made for, with Stable Diffusion's VAE; () if unknown."""
    first = found.unshuffle // 8
    of_t2i: dict[int, tuple[int, ...]] = {1: (0, 1, 1, 1), 2: (0, 0, 1, 0)}  # all that diffusers has
    return tuple(first * 2**total for total in accumulate(found.pools or of_t2i.get(first, ())))


def _compare(name: str, found: object, needed: object) -> None:
    if found != needed:
        raise InvalidArgument("adapter", f"{name} {needed}, to fit the base", found)


def pixels_per_latent(adapter: nn.Module | Any, base: Base) -> int:
    """Return the VAE's scale factor by the adapter's stem, which works without a VAE."""
    return geometry_of(adapter).unshuffle // base.places()[0].stride


def check_pixels(adapter: nn.Module | Any, base: Base, vae_scale_factor: int | None) -> None:
    """Raise `InvalidArgument`, with both numbers, if the adapter is for another VAE.

    `vae_scale_factor` is None if it is not known.
    """
    found = pixels_per_latent(adapter, base)
    if vae_scale_factor is not None and found != vae_scale_factor:
        raise InvalidArgument(
            "adapter",
            f"{vae_scale_factor} pixels of the condition per latent pixel, to match the pipeline's VAE",
            f"{found}, from unshuffle {geometry_of(adapter).unshuffle}",
        )


def match_places(features: Sequence[Tensor], base: Base, rows: int, height: int, width: int) -> list[Tensor]:
    """Return the features in exactly the sizes that the denoiser adds, for latents of `height` x `width`.

    Poolings round up, and a denoiser may round down: an extra row or column at the end, which covers no
        latent
    pixel, is removed. Any other difference raises `InvalidArgument`: diffusers would silently drop the
    feature in the middle block.
    """
    places, sizes = base.places(), base.feature_sizes(height, width)
    _compare("number of features", len(features), len(sizes))
    matched = []
    for level, (feature, place, (h, w)) in enumerate(zip(features, places, sizes, strict=True), start=1):
        surplus = (feature.shape[-2] - h, feature.shape[-1] - w) if feature.ndim == 4 else (-1, -1)
        if feature.shape[:2] != (rows, place.channels) or not all(0 <= extra <= 1 for extra in surplus):
            raise InvalidArgument(
                "adapter",
                f"feature {level} of shape {(rows, place.channels, h, w)}, to fit the base's latents of "
                f"{height}x{width}",
                tuple(feature.shape),
            )
        matched.append(feature[:, :, :h, :w])
    return matched
