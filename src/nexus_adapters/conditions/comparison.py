"""How two maps of a condition are compared: metrics of the map that was found against the one wanted.

Each `compare_...` takes (found map, wanted map), RGB of one size, and gives metric -> value, under names of
`nexus_adapters.metrics.METRICS`. Each `..._agreement` takes the same and gives one number in [0, 1], higher
for better, to judge a training run by. Comparisons of depth, labels and sketches need the extra `eval`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.metrics.edges import edge_f1
from nexus_adapters.metrics.normals import normal_angle_deg

_MOST_CLASSES = 512


def compare_lines(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """F1 of the pixels above half brightness, within one pixel."""
    return {"edge_f1": lines_agreement(found, wanted)}


def compare_sketches(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """MS-SSIM of the soft lines, and F1 of their pixels."""
    from nexus_adapters.metrics.structure import luminance, ms_ssim

    return {"sketch_ms_ssim": ms_ssim(luminance(found), luminance(wanted))} | compare_lines(found, wanted)


def compare_depths(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Error and rank correlation of the pixels' brightness."""
    from nexus_adapters.metrics.structure import depth_rmse, luminance, rank_correlation

    first, second = luminance(found)[0], luminance(wanted)[0]
    return {
        "depth_rmse": depth_rmse(first, second),
        "depth_rank_correlation": rank_correlation(first, second),
    }


def compare_labels(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """Mean IoU, where each color is a class.

    Raises:
        InvalidArgument: for more than 512 colors: such maps have no classes.
    """
    import torch

    from nexus_adapters.metrics.structure import mean_iou

    first, second = np.asarray(found.convert("RGB")), np.asarray(wanted.convert("RGB"))
    pixels = np.concatenate([first.reshape(-1, 3), second.reshape(-1, 3)])
    colors, labels = np.unique(pixels, axis=0, return_inverse=True)
    if len(colors) > _MOST_CLASSES:
        raise InvalidArgument(
            "condition", f"segmentation maps of at most {_MOST_CLASSES} colors", len(colors)
        )
    one, other = torch.from_numpy(labels.reshape(2, *first.shape[:2]))
    return {"mean_iou": mean_iou(one, other, len(colors))}


def compare_normals(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
    """The mean angle between the surface normals."""
    return {"normal_angle": _normal_angle(found, wanted)}


def lines_agreement(found: Image.Image, wanted: Image.Image) -> float:
    """F1 of the pixels above half brightness, within one pixel."""
    first, second = (np.asarray(each.convert("L")) > 127 for each in (found, wanted))
    return float(edge_f1(first, second))


def brightness_agreement(found: Image.Image, wanted: Image.Image) -> float:
    """1 less the mean absolute difference of brightness, where white is 1."""
    first, second = (np.asarray(each.convert("L")) for each in (found, wanted))
    return 1.0 - float(np.abs(first.astype(float) - second).mean()) / 255


def normals_agreement(found: Image.Image, wanted: Image.Image) -> float:
    """1 for equal normals, 0 for opposite ones: 1 less the mean angle over 180 degrees."""
    return 1.0 - _normal_angle(found, wanted) / 180


def _normal_angle(found: Image.Image, wanted: Image.Image) -> float:
    return normal_angle_deg(*(np.asarray(each.convert("RGB")) for each in (found, wanted)))
