"""How well two edge maps agree, up to a small displacement."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool

from nexus_adapters.errors import InvalidArgument


def edge_f1(
    # `| np.ndarray`: under pytest, too, misshapen input is to meet the errors below.
    predicted: Bool[np.ndarray, "h w"] | np.ndarray,
    reference: Bool[np.ndarray, "h w"] | np.ndarray,
    tolerance_px: int = 1,
) -> float:
    """F1 of the edge pixels of two maps, in [0, 1]; the same with the two exchanged.

    Precision is the share of predicted edge pixels with a reference edge pixel within `tolerance_px`, counted
    along rows, columns and diagonals alike (Chebyshev distance); recall is the reverse, and F1 their harmonic
    mean. Several edge pixels may match the same one. Two empty maps agree: 1.0. One empty map: 0.0.

    Args:
        predicted: True at edge pixels, (H, W).
        reference: the same, of the same size.
        tolerance_px: a whole number of at least 0; at 0 only equal places match.

    Raises:
        InvalidArgument: for other dtypes or shapes, maps of different size, or a negative tolerance.
    """
    for name, edges in (("predicted", predicted), ("reference", reference)):
        if edges.ndim != 2 or edges.dtype != np.bool_:
            raise InvalidArgument(name, "bool of shape (H, W)", f"{edges.dtype} {edges.shape}")
    if predicted.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {predicted.shape}, as predicted", reference.shape)
    if tolerance_px < 0:
        raise InvalidArgument("tolerance_px", "at least 0", tolerance_px)
    if not predicted.any() or not reference.any():
        return float(predicted.any() == reference.any())
    precision = float(_grown(reference, tolerance_px)[predicted].mean())
    recall = float(_grown(predicted, tolerance_px)[reference].mean())
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _grown(edges: Bool[np.ndarray, "h w"], distance: int) -> Bool[np.ndarray, "h w"]:
    """True within `distance` of an edge pixel."""
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    return np.asarray(cv2.dilate(edges.astype(np.uint8), square), np.bool_)
