"""Confidence intervals: bootstrap for means, the grouped jackknife for statistics of a whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nexus_adapters.errors import InvalidArgument

_AT_ONCE = 2**20  # indices held in memory at a time: 8 MiB
_NORMAL_95 = 1.959963984540054  # the standard normal's 97.5 % point

_NORMAL_95 = 1.959963984540054  # the standard normal's 97.5 % point


class MeanInterval(NamedTuple):
    """A mean and the lower and upper ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    # `| np.ndarray` lets input with a wrong shape reach the errors below, also under pytest.
    values: Float[np.ndarray, " n"] | np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> MeanInterval:
    """Return the mean of `values` with its percentile bootstrap interval.

    The values are resampled with replacement `resamples` times; the interval contains the middle `confidence`
    of the means (Efron and Tibshirani 1993, chapter 13). To compare two methods measured on the same samples,
    pass the differences, so that variation between samples does not widen the interval. The same arguments
    always give the same interval.

    Args:
        values: one finite number per independent sample, (N,).
        resamples: number of resamples; at least 1.
        seed: seed of the resampling.
        confidence: confidence level, in (0, 1).

    Raises:
        InvalidArgument: for an empty array, another shape, values that are not finite, or arguments out of
            range.
    """
    if values.ndim != 1 or len(values) == 0:
        raise InvalidArgument("values", "shape (N,) with N of at least 1", values.shape)
    if not np.isfinite(values).all():
        raise InvalidArgument("values", "finite numbers", values[~np.isfinite(values)][0])
    if resamples < 1:
        raise InvalidArgument("resamples", "at least 1", resamples)
    if not 0 < confidence < 1:
        raise InvalidArgument("confidence", "a number between 0 and 1", confidence)
    count = len(values)
    parts = _kept_indices if resamples * count <= _AT_ONCE else _indices
    means = np.concatenate([values[part].mean(axis=1) for part in parts(count, resamples, seed)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return MeanInterval(float(values.mean()), float(low), float(high))


def _indices(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The indices of all resamples, in parts of limited size; the division does not change them."""
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // count)
    for first in range(0, resamples, rows):
        yield rng.integers(count, size=(min(rows, resamples - first), count))


@lru_cache(maxsize=2)  # a report computes many intervals with the same number of values
def _kept_indices(count: int, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(_indices(count, resamples, seed))


def jackknife_replicates(
    statistic: Callable[[Int[np.ndarray, " kept"]], float], count: int, groups: int = 20
) -> Float[np.ndarray, " groups"]:
    """Return the statistic computed without each group of samples (Efron and Tibshirani 1993, chapter 11).

    Use it for distances between sets, for which the bootstrap is unsuitable: a resampled set contains some
    samples twice, which changes the distance. Sample i is in group i modulo `groups`. So for two methods
    measured on the same samples, the same samples are omitted and replicates can be subtracted.

    Args:
        statistic: indices of samples -> the statistic of these samples.
        count: number of samples, at least twice the number of groups.
        groups: number of groups, at least 2.

    Raises:
        InvalidArgument: for too few groups or samples.
    """
    if groups < 2:
        raise InvalidArgument("groups", "at least 2", groups)
    if count < 2 * groups:
        raise InvalidArgument("count", f"at least {2 * groups} samples for {groups} groups", count)
    places = np.arange(count)
    return np.array([statistic(places[places % groups != group]) for group in range(groups)])


def jackknife_interval(value: float, replicates: Float[np.ndarray, " groups"] | np.ndarray) -> MeanInterval:
    """Return `value` with its 95 % interval, from the replicates' spread and a normal distribution.

    A bias that depends on the number of samples, such as that of a Fréchet distance, is not removed from
    `value`: the interval shows how much `value` could change with as many other samples.

    Raises:
        InvalidArgument: for fewer than two replicates, or numbers that are not finite.
    """
    if replicates.ndim != 1 or len(replicates) < 2:
        raise InvalidArgument("replicates", "at least 2", f"shape {replicates.shape}")
    wrong = [number for number in (value, *replicates) if not np.isfinite(number)]
    if wrong:
        raise InvalidArgument("replicates", "finite numbers", wrong[0])
    groups = len(replicates)
    error = np.sqrt((groups - 1) / groups * np.square(replicates - replicates.mean()).sum())
    return MeanInterval(float(value), float(value - _NORMAL_95 * error), float(value + _NORMAL_95 * error))
