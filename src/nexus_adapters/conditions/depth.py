"""Depth maps from any depth estimation model of `transformers`: near is bright."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt16
from PIL import Image

from nexus_adapters.conditions.images import to_rgb
from nexus_adapters.conditions.transformers_models import (
    LearnedModel,
    in_batches_of_a_size,
    load_model,
    names_the_model,
)
from nexus_adapters.errors import InvalidArgument

DEFAULT_DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"  # Apache-2.0, 24.8M parameters, 99 MB
PREDICTIONS = ("auto", "nearness", "distance")

# Architectures that predict distance. The others predict relative inverse depth, as MiDaS does.
_DISTANCE = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")
_SMALLEST_DISTANCE = 1e-3  # in the model's unit, usually meters


def depth(
    image: Image.Image, model: str = DEFAULT_DEPTH_MODEL, predicts: str = "auto", device: str = "auto"
) -> Image.Image:
    """Extract a depth map: the nearest pixel is white, the farthest black.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        model: folder or Hub id.
        predicts: what the model predicts, "nearness" or "distance"; "auto" decides by its architecture and
            its `depth_estimation_type`.
        device: as in `load_model`.

    Returns:
        RGB, same size as `image`, gray: `nearness` in 8 bits.

    Raises:
        InvalidArgument: for a wrong option, an unknown model, or an image that the model cannot process.
    """
    return depths([image], model, predicts, device)[0]


def depths(
    images: Sequence[Image.Image],
    model: str = DEFAULT_DEPTH_MODEL,
    predicts: str = "auto",
    device: str = "auto",
) -> list[Image.Image]:
    """Extract the depth maps of several images, see `depth`. Images of equal size are processed together."""
    colors = [to_rgb(image) for image in images]
    return in_batches_of_a_size(
        colors, lambda batch: [_as_image(found) for found in nearness(batch, model, predicts, device)]
    )


def nearness(
    images: Sequence[Image.Image],
    model: str = DEFAULT_DEPTH_MODEL,
    predicts: str = "auto",
    device: str = "auto",
) -> list[UInt16[np.ndarray, "h w"]]:
    """Return the 16-bit nearness of RGB images of one size.

    Nearness is inverse depth, scaled linearly per image so that its farthest pixel is 0 and its nearest
    65535; distances d become 1 / d first. An image of constant depth is 0 everywhere.

    Raises:
        InvalidArgument: as `depth`, and for a model whose predictions are not finite.
    """
    if predicts not in PREDICTIONS:
        raise InvalidArgument("predicts", f"one of {', '.join(PREDICTIONS)}", repr(predicts))
    loaded = load_model("depth estimation", model, device)
    grows = _predicts_distance(loaded) if predicts == "auto" else predicts == "distance"
    with names_the_model("depth estimation", model):
        sizes = [(image.height, image.width) for image in images]
        post_process = loaded.processor.post_process_depth_estimation
        pads = "source_sizes" in inspect.signature(post_process).parameters  # ZoeDepth crops its padding
        extra = {"source_sizes": sizes} if pads else {}
        found = post_process(loaded.run(images), target_sizes=sizes, **extra)
    return [_scaled(entry["predicted_depth"].float().cpu().numpy(), grows, model) for entry in found]


def _predicts_distance(model: LearnedModel) -> bool:
    config: Any = model.network.config
    is_metric = getattr(config, "depth_estimation_type", "relative") == "metric"
    return is_metric or model.kind in _DISTANCE


def _scaled(values: Float[np.ndarray, "h w"], grows: bool, model: str) -> UInt16[np.ndarray, "h w"]:
    if not np.isfinite(values).all():
        raise InvalidArgument("model", "a model that predicts finite depth", f"'{model}'")
    near = 1 / np.maximum(values, _SMALLEST_DISTANCE) if grows else values
    near = near.astype(np.float64)
    low, high = near.min(), near.max()
    if high == low:
        return np.zeros(near.shape, np.uint16)
    return np.asarray(np.rint((near - low) / (high - low) * 65535), np.uint16)


def _as_image(values: UInt16[np.ndarray, "h w"]) -> Image.Image:
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded as in to_rgb
    return Image.fromarray(grey).convert("RGB")
