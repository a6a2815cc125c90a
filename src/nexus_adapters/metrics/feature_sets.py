"""Two sets of features, as distances between sets take them."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor


def check_sets(
    features: Tensor, reference: Tensor, least: int
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    """Both in float64; ValueError unless they are (N, D) and (M, D), finite, of at least `least` rows."""
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise ValueError(
                f"{name}: expected floats of shape (N, D); received {rows.dtype} {tuple(rows.shape)}"
            )
        if len(rows) < least:
            raise ValueError(
                f"{name}: expected at least {least} samples, for a distance; received {len(rows)}"
            )
        if not rows.isfinite().all():
            raise ValueError(f"{name}: expected finite values; received some that are not")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"reference: expected {features.shape[1]} columns, as features; received {reference.shape[1]}"
        )
    return features.double(), reference.double()
