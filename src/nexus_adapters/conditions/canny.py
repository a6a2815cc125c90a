"""Canny edges, extracted with OpenCV."""

from __future__ import annotations

import math
from numbers import Real

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nexus_adapters.conditions.images import to_rgb
from nexus_adapters.errors import InvalidArgument

_LOW, _HIGH = 100, 200


def canny(image: Image.Image, low: float = _LOW, high: float = _HIGH, auto: bool = False) -> Image.Image:
    """Extract the edges of `image`: white lines, one pixel wide, on black.

    Edges are detected in color: at each pixel, the channel with the steepest gradient counts, so there is an
    edge between two colors of equal brightness. A gradient is |dx| + |dy| of 3x3 Sobel filters on 8-bit
    values: 0 to 1530.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        low: an edge continues as long as its gradient is above this.
        high: an edge must exceed this somewhere.
        auto: choose both thresholds with `auto_thresholds`, which also finds the edges of pale and dark
            images. `low` and `high` must then have their defaults.

    Returns:
        RGB, same size as `image`, every pixel (0, 0, 0) or (255, 255, 255).

    Raises:
        InvalidArgument: unless 0 <= low <= high, both finite; if thresholds are combined with `auto`; and for
            an image without pixels.
    """
    if not (_is_finite(low) and low >= 0):
        raise InvalidArgument("low", "a finite threshold of at least 0", repr(low))
    if not (_is_finite(high) and high >= low):
        # OpenCV would silently swap the two.
        raise InvalidArgument("high", f"a finite threshold of at least low, {low}", repr(high))
    pixels = np.asarray(to_rgb(image))
    if auto:
        if (low, high) != (_LOW, _HIGH):
            raise InvalidArgument(
                "auto", "False if low or high is given", f"True with low={low} and high={high}"
            )
        low, high = auto_thresholds(pixels)
    edges = np.asarray(cv2.Canny(pixels, low, high))
    return Image.fromarray(edges).convert("RGB")


def auto_thresholds(pixels: UInt8[np.ndarray, "h w 3"]) -> tuple[float, float]:
    """Return `low` and `high` for an image: half of Otsu's threshold of its gradients, and the threshold.

    Otsu (1979) splits a histogram so that both parts vary least: here into flat areas and edges. The
    gradients are those of `canny`. `high` is at least 1, so that flat areas never count as edges.
    """
    dx, dy = (cv2.Sobel(pixels, cv2.CV_16S, *order) for order in ((1, 0), (0, 1)))
    gradients = (np.abs(dx) + np.abs(dy)).max(axis=2).astype(np.uint16)
    found, _ = cv2.threshold(gradients, 0, 1, cv2.THRESH_OTSU)
    high = max(1.0, float(found))
    return high / 2, high


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
