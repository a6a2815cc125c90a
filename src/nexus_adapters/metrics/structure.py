"""Metrics of how well an image agrees with another, or its structure with a structure map."""

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
    # `| np.ndarray` lets input with a wrong shape reach the errors below, also under pytest.
    predicted: Bool[np.ndarray, "h w"] | np.ndarray,
    reference: Bool[np.ndarray, "h w"] | np.ndarray,
    tolerance_px: int = 1,
) -> float:
    """Return the F1 score of the edge pixels in two maps, in [0, 1]. It is symmetric.

    Precision is the fraction of predicted edge pixels with a reference edge pixel within `tolerance_px` in
    Chebyshev distance; recall is the reverse, and F1 their harmonic mean. Several edge pixels can match the
    same one. The score is 1.0 if both maps are empty and 0.0 if only one is.

    Args:
        predicted: True at edge pixels, (H, W).
        reference: True at edge pixels, (H, W).
        tolerance_px: distance in whole pixels, at least 0; with 0, only equal positions match.

    Raises:
        InvalidArgument: for other dtypes or shapes, maps of different sizes, or a negative tolerance.
    """
    for name, edges in (("predicted", predicted), ("reference", reference)):
        if edges.ndim != 2 or edges.dtype != np.bool_:
            raise InvalidArgument(name, "bool of shape (H, W)", f"{edges.dtype} {edges.shape}")
    if predicted.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {predicted.shape} as predicted", reference.shape)
    if tolerance_px < 0:
        raise InvalidArgument("tolerance_px", "at least 0", tolerance_px)
    if not predicted.any() or not reference.any():
        return float(predicted.any() == reference.any())
    precision = float(_grown(reference, tolerance_px)[predicted].mean())
    recall = float(_grown(predicted, tolerance_px)[reference].mean())
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _grown(edges: Bool[np.ndarray, "h w"], distance: int) -> Bool[np.ndarray, "h w"]:
    """A map that is True within `distance` of an edge pixel."""
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    return np.asarray(cv2.dilate(edges.astype(np.uint8), square), np.bool_)


def normal_angle_deg(
    # `| np.ndarray` lets input with a wrong shape reach the errors below, also under pytest.
    normals: UInt8[np.ndarray, "h w 3"] | np.ndarray,
    reference: UInt8[np.ndarray, "h w 3"] | np.ndarray,
) -> float:
    """Return the mean angle between the normals of two maps, in degrees, 0 to 180, computed in float64.

    A pixel's normal is its color scaled from 0..255 to -1..1 and normalized to length 1. The order of the
    axes does not matter as long as both maps use the same. The mean angular error is the usual measure of
    normal estimation (Eigen and Fergus 2015).

    Args:
        normals: 8-bit map, (H, W, 3).
        reference: 8-bit map with the same size.

    Raises:
        InvalidArgument: for other dtypes or shapes, or maps of different sizes.
    """
    for name, colors in (("normals", normals), ("reference", reference)):
        if colors.dtype != np.uint8 or colors.ndim != 3 or colors.shape[2] != 3 or colors.size == 0:
            raise InvalidArgument(name, "uint8 of shape (H, W, 3)", f"{colors.dtype} {colors.shape}")
    if normals.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {normals.shape} as normals", reference.shape)
    first, second = (_directions(colors) for colors in (normals, reference))
    # atan2 instead of arccos, which is inexact for small angles.
    crossed = np.linalg.norm(np.cross(first, second), axis=2)
    return float(np.degrees(np.arctan2(crossed, (first * second).sum(axis=2))).mean())


def _directions(colors: np.ndarray) -> np.ndarray:
    vectors = colors / 127.5 - 1  # never zero, since no 8-bit value is 127.5
    return np.asarray(vectors / np.linalg.norm(vectors, axis=2, keepdims=True))


# Wang, Simoncelli and Bovik 2003, finest scale first.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11


def luminance(image: Image.Image) -> Float[Tensor, "1 h w"]:
    """Return an image's luminance in [0, 1], as the metrics here expect it."""
    return torch.from_numpy(np.array(image.convert("L")))[None].float() / 255


def depth_rmse(
    # `| Tensor` lets input with a wrong shape reach the errors below, also under pytest.
    depth: Float[Tensor, "h w"] | Tensor,
    reference: Float[Tensor, "h w"] | Tensor,
) -> float:
    """Return the root mean squared difference of two depth maps in [0, 1], computed in float64.

    Args:
        depth: depth map, (H, W).
        reference: depth map with the same size.

    Raises:
        InvalidArgument: for other shapes, maps of different sizes, or values outside [0, 1].
    """
    a, b = _planes("depth", depth, reference)
    return float((a - b).square().mean().sqrt())


def rank_correlation(depth: Float[Tensor, "h w"] | Tensor, reference: Float[Tensor, "h w"] | Tensor) -> float:
    """Return Spearman's rank correlation of two depth maps' pixels, -1 to 1, computed by scipy.

    It measures whether pixels have the same order of depth. Equal pixels share their mean rank. The result is
    0 if all pixels of a map are equal.

    Args:
        depth: depth map, (H, W), in [0, 1].
        reference: depth map with the same size.

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
    """Return the mean intersection over union, computed by torchmetrics, over the classes in either map.

    Args:
        labels: labels from 0 to classes - 1, (H, W).
        reference: labels with the same size.
        classes: number of classes.

    Raises:
        InvalidArgument: for other shapes or dtypes, maps of different sizes, or labels out of range.
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
    # The library requires at least two classes; one that is in neither map is ignored.
    found = multiclass_jaccard_index(
        labels[None].long(), reference[None].long(), max(2, classes), average="macro"
    )
    return float(found)


def ms_ssim(image: Float[Tensor, "c h w"] | Tensor, reference: Float[Tensor, "c h w"] | Tensor) -> float:
    """Return the multi-scale structural similarity (Wang, Simoncelli and Bovik 2003), about 0 to 1.

    It is computed by torchmetrics with an 11x11 Gaussian window and can be slightly below 0. Its five scales
    require sides of 176 pixels; for smaller images, only the finest scales that fit are used, and their
    weights are rescaled to sum to 1. float32 input is computed in float32, which is faster on a CPU and
    within 1e-4 of float64.

    Args:
        image: image or sketch in [0, 1], (C, H, W).
        reference: image or sketch with the same size.

    Raises:
        InvalidArgument: for other shapes, sides below 11 pixels, different sizes, or values outside [0, 1].
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = _planes("image", image, reference, dimensions=3)
    if image.dtype == reference.dtype == torch.float32:
        a, b = image, reference
    side = min(a.shape[1:])
    if side < _WINDOW:
        raise InvalidArgument("image", f"sides of at least {_WINDOW} pixels", tuple(a.shape[1:]))
    # The window must fit into the coarsest scale; the library requires slightly more for the last two.
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
    # `| np.ndarray` lets input with a wrong shape reach the errors below, also under pytest.
    image: UInt8[np.ndarray, "h w c"] | np.ndarray,
    reference: UInt8[np.ndarray, "h w c"] | np.ndarray,
) -> float:
    """Return the peak signal-to-noise ratio in dB with a peak of 255; infinite for equal images.

    Args:
        image: 8-bit image, (H, W, C).
        reference: 8-bit image with the same shape.

    Raises:
        InvalidArgument: for other dtypes, or images with different shapes.
    """
    for name, pixels in (("image", image), ("reference", reference)):
        if pixels.dtype != np.uint8:
            raise InvalidArgument(name, "uint8", pixels.dtype)
    if image.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {image.shape} as image", reference.shape)
    squared = float(np.square(image.astype(np.float64) - reference).mean())
    return math.inf if squared == 0 else 10 * math.log10(255**2 / squared)


def _planes(name: str, values: Tensor, reference: Tensor, dimensions: int = 2) -> tuple[Tensor, Tensor]:
    for argument, plane in ((name, values), ("reference", reference)):
        if plane.ndim != dimensions or not plane.is_floating_point() or plane.numel() == 0:
            received = f"{plane.dtype} {tuple(plane.shape)}"
            raise InvalidArgument(argument, f"floats with {dimensions} dimensions", received)
        if not bool(((plane >= 0) & (plane <= 1)).all()):
            raise InvalidArgument(
                argument, "values in [0, 1]", f"{float(plane.min()):g} to {float(plane.max()):g}"
            )
    if values.shape != reference.shape:
        raise InvalidArgument("reference", f"shape {tuple(values.shape)}", tuple(reference.shape))
    return values.double(), reference.double()
