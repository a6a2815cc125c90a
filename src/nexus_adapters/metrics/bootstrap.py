"""How far a mean over samples could lie from the true one: bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nexus_adapters.errors import InvalidArgument


class MeanInterval(NamedTuple):
    """A mean, and the lower and upper end of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    # `| np.ndarray`: under pytest, too, misshapen input is to meet the errors below.
    values: Float[np.ndarray, " n"] | np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> MeanInterval:
    """The mean of `values` and its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Samples are drawn from `values` with replacement, as many as there are, `resamples` times; the interval
    holds the middle `confidence` of their means. For two methods measured on the same samples, pass the
    differences: what both have in common then widens the interval no more. The same arguments always give
    the same interval.

    Args:
        values: one finite number per independent sample, (N,).
        resamples: how many times to draw; at least 1.
        seed: of the draws.
        confidence: in (0, 1).

    Raises:
        InvalidArgument: for no values, another shape, values that are not finite, or arguments out of range.
    """
    if values.ndim != 1 or len(values) == 0:
        raise InvalidArgument("values", "shape (N,) with N of at least 1", values.shape)
    if not np.isfinite(values).all():
        raise InvalidArgument("values", "finite numbers", values[~np.isfinite(values)][0])
    if resamples < 1:
        raise InvalidArgument("resamples", "at least 1", resamples)
    if not 0 < confidence < 1:
        raise InvalidArgument("confidence", "a number between 0 and 1", confidence)
    rng = np.random.default_rng(seed)
    count = len(values)
    # One resample at a time: all indices at once would need resamples * count * 8 bytes.
    means = [values[rng.integers(count, size=count)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return MeanInterval(float(values.mean()), float(low), float(high))
