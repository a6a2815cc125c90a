"""Sketches: pen-like lines, from filters without weights or from an edge detection model."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float
from PIL import Image

from nexus_adapters.conditions.images import to_rgb
from nexus_adapters.errors import InvalidArgument, one_line

Plane = Float[np.ndarray, "h w"]

_LONGEST_PX = 32766  # limit of cv2.remap
_RATIO = 1.6  # wider to narrower Gaussian; at this ratio their difference is close to a Laplacian
_SOFTNESS = 10.0  # how steeply ink rises above the threshold
_TENSOR_SIGMA = 3.0  # pixels over which the direction of lines is averaged
_KEPT = 2  # ONNX networks in memory
_MULTIPLE = 32  # the sides of an ONNX network's input are multiples of this; most networks halve five times


def sketch(
    image: Image.Image, sigma: float = 1.2, threshold: float = 0.08, coherence: float = 3.0, model: str = ""
) -> Image.Image:
    """Extract the lines of `image`, white on black, with soft ends.

    An extended difference of Gaussians (Winnemoeller, Kyprianidis and Olsen 2012) along the flow of the
    image: a DoG with tau = 1, so that flat areas give no ink whatever their tone; an average along the lines'
    direction, which joins broken lines and removes specks; then the soft threshold of eq. 2. In color, the
    channel with the most ink counts, so there is a line between two colors of equal brightness.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        sigma: sigma of the narrower Gaussian in pixels, 0.1 to 20; larger gives thicker and fewer lines.
        threshold: contrast below which there is no line, 0 to 0.99 of full contrast.
        coherence: sigma of the average along the lines in pixels, 0 to 50; 0 for no average.
        model: an edge detection model to use instead, see `learned_edges`; "" for none. The other options
            must then have their defaults.

    Returns:
        RGB, same size as `image`, gray.

    Raises:
        InvalidArgument: for options out of range, an image with a side above 32,766 pixels (OpenCV's limit),
            or a model that cannot be used.
    """
    _check("sigma", sigma, 0.1, 20)
    _check("threshold", threshold, 0, 0.99)
    _check("coherence", coherence, 0, 50)
    if model:
        if (sigma, threshold, coherence) != (1.2, 0.08, 3.0):
            received = f"{model!r} with sigma={sigma}, threshold={threshold} and coherence={coherence}"
            raise InvalidArgument(
                "model", "a model with sigma, threshold and coherence at their defaults", received
            )
        return learned_edges(image, model)
    if max(image.size) > _LONGEST_PX:
        expected = f"sides of at most {_LONGEST_PX} pixels for a sketch"
        raise InvalidArgument("image", expected, f"{image.width}x{image.height}")
    pixels = np.asarray(to_rgb(image), np.float32) / 255
    response = cv2.GaussianBlur(pixels, (0, 0), sigma) - cv2.GaussianBlur(pixels, (0, 0), _RATIO * sigma)
    response = np.minimum.reduce(cv2.split(response))  # the channel with the most ink
    if coherence > 0:
        response = _along_lines(response, _tangents(pixels), coherence)
    # Ink goes on the dark side of an edge, like a pen that outlines dark objects. A step of height h has a
    # response of about h / 10, so the threshold applies to contrast.
    ink = np.tanh(_SOFTNESS * np.maximum(0, 10 * -response - threshold))
    return Image.fromarray(np.rint(255 * ink).astype(np.uint8)).convert("RGB")


def _tangents(pixels: Float[np.ndarray, "h w 3"]) -> tuple[Plane, Plane]:
    """Return the unit direction (x, y) of lines at each pixel: the structure tensor's minor axis."""
    dx, dy = cv2.Sobel(pixels, -1, 1, 0), cv2.Sobel(pixels, -1, 0, 1)
    products = [np.einsum("hwc,hwc->hw", *pair) for pair in ((dx, dx), (dx, dy), (dy, dy))]
    xx, xy, yy = (cv2.GaussianBlur(product, (0, 0), _TENSOR_SIGMA) for product in products)
    angle = 0.5 * np.arctan2(2 * xy, xx - yy) + np.float32(math.pi / 2)
    return np.cos(angle), np.sin(angle)


def _along_lines(response: Plane, tangents: tuple[Plane, Plane], sigma: float) -> Plane:
    """Return the Gaussian mean of the response along the tangents, in both directions, in 1-pixel steps."""
    height, width = response.shape
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    total, weights = response.copy(), 1.0
    for sign in (1, -1):
        x, y, dx, dy = columns, rows, sign * tangents[0], sign * tangents[1]
        for step in range(1, math.ceil(2 * sigma) + 1):
            x, y = x + dx, y + dy
            weight = math.exp(-0.5 * (step / sigma) ** 2)
            total += np.float32(weight) * _at(response, x, y, cv2.INTER_LINEAR)
            weights += weight
            there_x, there_y = (_at(tangent, x, y, cv2.INTER_NEAREST) for tangent in tangents)
            # A tangent has no sign: choose the one that continues the path.
            turn = np.copysign(np.float32(1), there_x * dx + there_y * dy)
            dx, dy = turn * there_x, turn * there_y
    return np.asarray(total / np.float32(weights))


def _at(values: Plane, x: Plane, y: Plane, interpolation: int) -> Plane:
    return np.asarray(cv2.remap(values, x, y, interpolation, borderMode=cv2.BORDER_REPLICATE))


def _check(argument: str, value: object, low: float, high: float) -> None:
    if not (isinstance(value, Real) and low <= float(value) <= high):
        raise InvalidArgument(argument, f"a number from {low} to {high}", repr(value))


def learned_edges(image: Image.Image, model: str) -> Image.Image:
    """Extract edges with an edge detection model, white on black.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        model: an .onnx file, run with OpenCV, that takes (1, 3, H, W), RGB in [0, 1], for any H and W, and
            whose last output has H x W values. Otherwise the folder or Hub id of a segmentation model of
            `transformers` with one class. Outputs outside [0, 1] are treated as logits.

    Returns:
        RGB, same size as `image`, gray.

    Raises:
        InvalidArgument: for a model that does not exist or does not detect edges.
    """
    rgb = to_rgb(image)
    edges = _by_onnx(rgb, model) if model.endswith(".onnx") else _by_transformers(rgb, model)
    if not np.isfinite(edges).all():
        raise InvalidArgument("model", "a model that returns finite values", f"'{model}'")
    if edges.min() < 0 or edges.max() > 1:
        edges = 1 / (1 + np.exp(-edges.astype(np.float64)))
    return Image.fromarray(np.rint(255 * edges).astype(np.uint8)).convert("RGB")


def _by_onnx(image: Image.Image, model: str) -> Float[np.ndarray, "h w"]:
    network = _load_onnx(model)
    right, bottom = -image.width % _MULTIPLE, -image.height % _MULTIPLE
    padded = np.pad(np.asarray(image, np.float32) / 255, ((0, bottom), (0, right), (0, 0)), mode="edge")
    expected = f"a network that returns {padded.shape[1]}x{padded.shape[0]} values"
    try:
        network.setInput(np.ascontiguousarray(padded.transpose(2, 0, 1)[None]))
        found = np.asarray(network.forward(network.getUnconnectedOutLayersNames())[-1])
    except cv2.error as error:
        reason = one_line(error)
        raise InvalidArgument("model", expected, f"'{model}' ({reason})") from error
    if found.size != padded.shape[0] * padded.shape[1]:
        raise InvalidArgument("model", expected, f"'{model}', which returns {tuple(found.shape)}")
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

    from nexus_adapters.conditions.transformers_models import load_model, names_the_model

    loaded = load_model("segmentation", model)
    classes = int(loaded.network.config.num_labels)
    if classes != 1:
        raise InvalidArgument("model", "a model with one class, edges", f"'{model}' with {classes}")
    with names_the_model("segmentation", model):
        logits = loaded.run([image]).logits.float()
    size = (image.height, image.width)
    resized = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    return resized[0, 0].sigmoid().cpu().numpy()
