"""How far a statistic of a whole set could lie from the true one: the grouped jackknife."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.metrics.bootstrap import MeanInterval

_NORMAL_95 = 1.959963984540054  # the standard normal's 97.5 % point


def jackknife_replicates(
    statistic: Callable[[Int[np.ndarray, " kept"]], float], count: int, groups: int = 20
) -> Float[np.ndarray, " groups"]:
    """The statistic without each group of samples in turn (Efron and Tibshirani 1993, chapter 11).

    For distances between sets, which the bootstrap judges badly: a resampled set holds samples twice, which
    moves the distance itself. Sample i is in group i modulo `groups`, so that two methods that are measured
    on the same samples leave out the same ones, and their replicates may be subtracted.

    Args:
        statistic: of the samples of these indices.
        count: of samples; at least twice as many as groups.
        groups: at least 2.

    Raises:
        InvalidArgument: for fewer groups or samples.
    """
    if groups < 2:
        raise InvalidArgument("groups", "at least 2", groups)
    if count < 2 * groups:
        raise InvalidArgument("count", f"at least {2 * groups} samples for {groups} groups", count)
    places = np.arange(count)
    return np.array([statistic(places[places % groups != group]) for group in range(groups)])


def jackknife_interval(value: float, replicates: Float[np.ndarray, " groups"] | np.ndarray) -> MeanInterval:
    """`value` with its 95 % interval, from the replicates' spread and a normal distribution.

    A bias that depends on the number of samples, as a Fréchet distance has, is left in `value`: the interval
    says how much other samples of the same number could change it.

    Raises InvalidArgument for fewer than two replicates, or numbers that are not finite.
    """
    if replicates.ndim != 1 or len(replicates) < 2:
        raise InvalidArgument("replicates", "at least 2", f"shape {replicates.shape}")
    wrong = [number for number in (value, *replicates) if not np.isfinite(number)]
    if wrong:
        raise InvalidArgument("replicates", "finite numbers", wrong[0])
    groups = len(replicates)
    error = np.sqrt((groups - 1) / groups * np.square(replicates - replicates.mean()).sum())
    return MeanInterval(float(value), float(value - _NORMAL_95 * error), float(value + _NORMAL_95 * error))
