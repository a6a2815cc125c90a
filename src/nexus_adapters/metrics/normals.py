"""How well two maps of surface normals agree."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from nexus_adapters.errors import InvalidArgument


def normal_angle_deg(
    # `| np.ndarray`: under pytest, too, misshapen input is to meet the errors below.
    normals: UInt8[np.ndarray, "h w 3"] | np.ndarray,
    reference: UInt8[np.ndarray, "h w 3"] | np.ndarray,
) -> float:
    """The mean angle between the normals of two maps, in degrees, 0 to 180, in float64.

    A pixel's normal is its color scaled from 0..255 to -1..1 and brought to length 1, as maps store it.
    Which axis a channel holds does not matter as long as both maps agree. The mean angular error is the usual
    measure of normal estimation (Eigen and Fergus 2015).

    Args:
        normals: 8-bit, (H, W, 3).
        reference: of the same size.

    Raises:
        InvalidArgument: for other dtypes or shapes, or maps of different size.
    """
    for name, colors in (("normals", normals), ("reference", reference)):
        if colors.dtype != np.uint8 or colors.ndim != 3 or colors.shape[2] != 3 or colors.size == 0:
            raise InvalidArgument(name, "uint8 of shape (H, W, 3)", f"{colors.dtype} {colors.shape}")
    if normals.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {normals.shape}, as normals", reference.shape)
    first, second = (_directions(colors) for colors in (normals, reference))
    # By atan2 and not by arccos, which is inexact where the angle is small.
    crossed = np.linalg.norm(np.cross(first, second), axis=2)
    return float(np.degrees(np.arctan2(crossed, (first * second).sum(axis=2))).mean())


def _directions(colors: np.ndarray) -> np.ndarray:
    vectors = colors / 127.5 - 1  # never zero: no 8-bit value lies at 127.5
    return np.asarray(vectors / np.linalg.norm(vectors, axis=2, keepdims=True))
