"""Two sets of features, as distances between sets take them."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from nexus_adapters.errors import InvalidArgument


def check_sets(
    features: Tensor, reference: Tensor, least: int
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    """Both in float64. InvalidArgument unless they are finite (N, D) and (M, D) of at least `least` rows."""
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise InvalidArgument(name, "floats of shape (N, D)", f"{rows.dtype} {tuple(rows.shape)}")
        if len(rows) < least:
            raise InvalidArgument(name, f"at least {least} samples, for a distance", len(rows))
        if not rows.isfinite().all():
            raise InvalidArgument(name, "finite values", rows[~rows.isfinite()][0].item())
    if features.shape[1] != reference.shape[1]:
        raise InvalidArgument("reference", f"{features.shape[1]} columns, as features", reference.shape[1])
    return features.double(), reference.double()
