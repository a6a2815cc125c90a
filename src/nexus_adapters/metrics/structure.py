"""How well an image agrees with another, or its structure with the map that it was to follow."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

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


# Wang, Simoncelli and Bovik 2003, finest scale first.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11


def luminance(image: Image.Image) -> Float[Tensor, "1 h w"]:
    """An image's brightness in [0, 1], as the metrics here take it."""
    return torch.from_numpy(np.array(image.convert("L")))[None].float() / 255


def depth_rmse(
    # `| Tensor`: under pytest, too, misshapen input is to meet the errors below.
    depth: Float[Tensor, "h w"] | Tensor,
    reference: Float[Tensor, "h w"] | Tensor,
) -> float:
    """The root of the mean squared difference of two depth maps in [0, 1], in float64.

    Args:
        depth: (H, W).
        reference: of the same size.

    Raises:
        InvalidArgument: for other shapes, sizes that differ, or values outside [0, 1].
    """
    a, b = _planes("depth", depth, reference)
    return float((a - b).square().mean().sqrt())


def rank_correlation(depth: Float[Tensor, "h w"] | Tensor, reference: Float[Tensor, "h w"] | Tensor) -> float:
    """Spearman's correlation of two depth maps' pixels, by scipy, -1 to 1: whether what is near is near.

    Equal pixels share their mean rank. A map without any depth orders nothing: 0.

    Args:
        depth: (H, W), in [0, 1].
        reference: of the same size.

    Raises:
        InvalidArgument: as `depth_rmse`.
    """
    from scipy import stats

    a, b = _planes("depth", depth, reference)
    if a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(stats.spearmanr(a.flatten().cpu().numpy(), b.flatten().cpu().numpy()).statistic)


def mean_iou(
    labels: Int[Tensor, "h w"] | Tensor, reference: Int[Tensor, "h w"] | Tensor, classes: int
) -> float:
    """The mean over classes of intersection over union, by torchmetrics; classes in neither map do not count.

    Args:
        labels: (H, W), 0 to classes - 1.
        reference: of the same size.
        classes: how many there are.

    Raises:
        InvalidArgument: for other shapes or types, sizes that differ, or labels out of range.
    """
    from torchmetrics.functional.classification import multiclass_jaccard_index

    for name, plane in (("labels", labels), ("reference", reference)):
        if plane.ndim != 2 or plane.is_floating_point() or plane.numel() == 0:
            raise InvalidArgument(name, "integers of shape (H, W)", f"{plane.dtype} {tuple(plane.shape)}")
        if plane.min() < 0 or plane.max() >= classes:
            received = f"{int(plane.min())} to {int(plane.max())}"
            raise InvalidArgument(name, f"labels from 0 to {classes - 1}", received)
    if labels.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {tuple(labels.shape)}", tuple(reference.shape))
    # At least two classes, or the library refuses; one that is in neither map does not count.
    found = multiclass_jaccard_index(
        labels[None].long(), reference[None].long(), max(2, classes), average="macro"
    )
    return float(found)


def ms_ssim(image: Float[Tensor, "c h w"] | Tensor, reference: Float[Tensor, "c h w"] | Tensor) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003) in [0, 1] or a little below 0.

    By torchmetrics, of images or sketches in [0, 1], with an 11x11 Gaussian window. Its five scales need
    sides of 176 pixels; smaller images have as many of the finest as fit, weighed so that they sum to 1.
    float32 is computed as such, in less time on a CPU, and within 1e-4 of float64 (tests/metrics).

    Args:
        image: (C, H, W).
        reference: of the same size.

    Raises:
        InvalidArgument: for other shapes, sides below 11 pixels, sizes that differ, or values outside [0, 1].
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = _planes("image", image, reference, dimensions=3)
    if image.dtype == reference.dtype == torch.float32:
        a, b = image, reference
    side = min(a.shape[1:])
    if side < _WINDOW:
        raise InvalidArgument("image", f"sides of at least {_WINDOW} pixels", tuple(a.shape[1:]))
    # The window must fit into the coarsest scale, and the library wants a little more for the last two.
    fits = [side // max(2**scale, scale**2) >= _WINDOW for scale in range(len(_MS_SSIM_WEIGHTS))]
    scales = sum(fits)
    weights = _MS_SSIM_WEIGHTS[:scales]
    found = multiscale_structural_similarity_index_measure(
        a[None],
        b[None],
        kernel_size=_WINDOW,
        data_range=1.0,
        betas=tuple(weight / sum(weights) for weight in weights),
        normalize="relu",
    )
    assert isinstance(found, torch.Tensor)
    return float(found)


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


def _planes(name: str, values: Tensor, reference: Tensor, dimensions: int = 2) -> tuple[Tensor, Tensor]:
    for argument, plane in ((name, values), ("reference", reference)):
        if plane.ndim != dimensions or not plane.is_floating_point() or plane.numel() == 0:
            received = f"{plane.dtype} {tuple(plane.shape)}"
            raise InvalidArgument(argument, f"floats of {dimensions} dimensions", received)
        if not bool(((plane >= 0) & (plane <= 1)).all()):
            raise InvalidArgument(
                argument, "values in [0, 1]", f"{float(plane.min()):g} to {float(plane.max()):g}"
            )
    if values.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {tuple(values.shape)}", tuple(reference.shape))
    return values.double(), reference.double()
