"""Canny edges, by OpenCV."""

import math
from numbers import Real

import cv2
import numpy as np
from PIL import Image

from nexus_adapters.conditions.rgb import to_rgb


def canny(image: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Draw the edges of `image`: white lines, one pixel wide, on black.

    Edges are sought in color: at each pixel the channel with the steepest gradient counts, so two colors of
    equal brightness still have an edge between them. A gradient is |dx| + |dy| of 3x3 Sobel filters on 8-bit
    values: 0 to 1530.

    Args:
        image: a PIL image of any mode that `to_rgb` takes.
        low: an edge is followed as long as its gradient stays above this.
        high: an edge must exceed this somewhere.

    Returns:
        RGB, same size as `image`, every pixel (0, 0, 0) or (255, 255, 255).

    Raises:
        ValueError: unless 0 <= low <= high, both finite; or for an image without pixels.
    """
    if not (_is_finite(low) and low >= 0):
        raise ValueError(f"low: expected a finite threshold of at least 0; received {low!r}")
    if not (_is_finite(high) and high >= low):
        # OpenCV would exchange the two without a word.
        raise ValueError(f"high: expected a finite threshold of at least low, {low}; received {high!r}")
    pixels = np.asarray(to_rgb(image))
    edges = np.asarray(cv2.Canny(pixels, low, high))
    return Image.fromarray(edges).convert("RGB")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
