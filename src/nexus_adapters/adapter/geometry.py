"""An adapter's channels, poolings and stem follow from the places of its features in the denoiser."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nexus_adapters.adapter.arguments import check_channels, check_positive
from nexus_adapters.bases.base import Base
from nexus_adapters.errors import expect


def base_geometry(base: Base, pixels_per_latent: int | None = None) -> dict[str, Any]:
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
    expect(len(strides) == len(channels), "strides", count, repr(list(strides)))
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
