"""How close an image is to another, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8

from nexus_adapters.errors import InvalidArgument


def psnr_db(
    # `| np.ndarray`: under pytest, too, misshapen input is to meet the errors below.
    image: UInt8[np.ndarray, "h w c"] | np.ndarray,
    reference: UInt8[np.ndarray, "h w c"] | np.ndarray,
) -> float:
    """The peak signal-to-noise ratio in dB, at a peak of 255; infinite for equal images.

    Args:
        image: 8-bit, (H, W, C).
        reference: the same, of the same size.

    Raises:
        InvalidArgument: for other dtypes, or images of different shape.
    """
    for name, pixels in (("image", image), ("reference", reference)):
        if pixels.dtype != np.uint8:
            raise InvalidArgument(name, "uint8", pixels.dtype)
    if image.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {image.shape}, as image", reference.shape)
    squared = float(np.square(image.astype(np.float64) - reference).mean())
    return math.inf if squared == 0 else 10 * math.log10(255**2 / squared)
