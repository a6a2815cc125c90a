"""Learned edge detectors that users name: an ONNX file, or a model of `transformers` with one class."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float
from PIL import Image

from nexus_adapters.conditions.learned import load_model, names_the_model
from nexus_adapters.conditions.rgb import to_rgb
from nexus_adapters.errors import InvalidArgument, one_line

_KEPT = 2
_MULTIPLE = 32  # of the sides that an ONNX network is given; most shrink the image five times


def learned_edges(image: Image.Image, model: str) -> Image.Image:
    """Draw the edges that a learned model finds, white on black.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        model: a file that ends in .onnx, which OpenCV runs: it takes (1, 3, H, W), RGB in [0, 1], of any H
            and W, and its last output has H x W values. Otherwise a folder or Hub id of a segmentation model
            of `transformers` with one class. Values outside [0, 1] are taken for logits.

    Returns:
        RGB, same size as `image`, grey.

    Raises:
        InvalidArgument: for a model that does not exist or detects no edges.
    """
    rgb = to_rgb(image)
    edges = _by_onnx(rgb, model) if model.endswith(".onnx") else _by_transformers(rgb, model)
    if not np.isfinite(edges).all():
        raise InvalidArgument("model", "a model that gives finite values", f"'{model}'")
    if edges.min() < 0 or edges.max() > 1:
        edges = 1 / (1 + np.exp(-edges.astype(np.float64)))
    return Image.fromarray(np.rint(255 * edges).astype(np.uint8)).convert("RGB")


def _by_onnx(image: Image.Image, model: str) -> Float[np.ndarray, "h w"]:
    network = _load_onnx(model)
    right, bottom = -image.width % _MULTIPLE, -image.height % _MULTIPLE
    padded = np.pad(np.asarray(image, np.float32) / 255, ((0, bottom), (0, right), (0, 0)), mode="edge")
    expected = f"a network that gives {padded.shape[1]}x{padded.shape[0]} values"
    try:
        network.setInput(np.ascontiguousarray(padded.transpose(2, 0, 1)[None]))
        found = np.asarray(network.forward(network.getUnconnectedOutLayersNames())[-1])
    except cv2.error as error:
        reason = one_line(error)
        raise InvalidArgument("model", expected, f"'{model}' ({reason})") from error
    if found.size != padded.shape[0] * padded.shape[1]:
        raise InvalidArgument("model", expected, f"'{model}', which gives {tuple(found.shape)}")
    return found.reshape(padded.shape[:2])[: image.height, : image.width]


@lru_cache(maxsize=_KEPT)
def _load_onnx(model: str) -> Any:
    if not Path(model).is_file():
        raise InvalidArgument("model", "an existing .onnx file", f"'{model}'")
    try:
        return cv2.dnn.readNetFromONNX(model)
    except cv2.error as error:
        reason = one_line(error)
        raise InvalidArgument("model", "an ONNX file", f"'{model}' ({reason})") from error


def _by_transformers(image: Image.Image, model: str) -> Float[np.ndarray, "h w"]:
    import torch

    loaded = load_model("segmentation", model)
    classes = int(loaded.network.config.num_labels)
    if classes != 1:
        raise InvalidArgument("model", "a model of one class, edges", f"'{model}' of {classes}")
    with names_the_model("segmentation", model):
        logits = loaded.run([image]).logits.float()
    size = (image.height, image.width)
    resized = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    return resized[0, 0].sigmoid().cpu().numpy()
