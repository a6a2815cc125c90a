"""How metrics are shown: in which order, and under which names."""

from __future__ import annotations

from collections.abc import Iterable

from nexus_adapters.evaluation.estimates import LOWER_IS_BETTER

COLUMNS = (
    "frechet", "mmd", "clip_score", "binding_color", "binding_material", "background", "edge_f1", "ms_ssim",
    "sketch_ms_ssim", "depth_rmse", "depth_rank_correlation", "mean_iou",
)  # fmt: skip
_NAMES = {
    "frechet": "Fréchet",
    "mmd": "MMD",
    "clip_score": "CLIP score",
    "edge_f1": "edge F1",
    "ms_ssim": "MS-SSIM",
    "sketch_ms_ssim": "sketch MS-SSIM",
    "depth_rmse": "depth RMSE",
    "depth_rank_correlation": "depth rank corr.",
    "mean_iou": "mIoU",
}


def in_order(metrics: Iterable[str]) -> list[str]:
    """Each once: those of `COLUMNS` first, others as they come."""
    names = dict.fromkeys(metrics)
    return [name for name in COLUMNS if name in names] + [name for name in names if name not in COLUMNS]


def head(metric: str) -> str:
    """A metric in words, with an arrow to where it is better."""
    name = _NAMES.get(metric, metric.replace("_", " "))
    return f"{name} {'↓' if metric in LOWER_IS_BETTER else '↑'}"
