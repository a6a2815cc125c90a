"""Compute the estimates of each method, means and distances with intervals, from the scores of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from nexus_adapters.evaluation.cases import Cases
from nexus_adapters.evaluation.config import LEAST_FOR_DISTANCES, LEAST_FOR_INTERVALS, EvaluationConfig
from nexus_adapters.evaluation.provenance import machine, versions
from nexus_adapters.evaluation.scoring import FEATURES
from nexus_adapters.evaluation.store import Store
from nexus_adapters.methods.cost import parameter_count
from nexus_adapters.metrics import METRICS, find_metric
from nexus_adapters.metrics.intervals import bootstrap_mean, jackknife_interval, jackknife_replicates
from nexus_adapters.training.redaction import data_without_secrets

REFERENCE = "reference"  # the original images, scored like those of a method
GROUPS = LEAST_FOR_DISTANCES // 2  # groups of the jackknife, with at least two samples each


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; its ends are None if there are too few images, `n`, for one."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end; None without an interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of a difference excludes zero; False without an interval."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Measured:
    """The measurements of one method.

    Attributes:
        scores: metric -> one number per image, in the order of the cases.
        distances: metric -> value of the whole set, and its jackknife replicates.
    """

    scores: Mapping[str, Float[np.ndarray, " n"]]
    distances: Mapping[str, tuple[float, Float[np.ndarray, " groups"]]] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that were measured."""
        return (*self.scores, *self.distances)

    def estimate(self, metric: str) -> Estimate:
        """Return the estimate of a metric: for a mean by bootstrap, for a distance by jackknife.

        A mean of fewer than `LEAST_FOR_INTERVALS` images has no interval.
        """
        if metric in self.scores:
            count = len(self.scores[metric])
            if count < LEAST_FOR_INTERVALS:
                return Estimate(self.value(metric), None, None, count)
            return Estimate(*bootstrap_mean(self.scores[metric]), count)
        count = len(next(iter(self.scores.values())))
        return Estimate(*jackknife_interval(*self.distances[metric]), count)

    def value(self, metric: str) -> float:
        """Return the value of a metric without its interval."""
        return float(self.scores[metric].mean()) if metric in self.scores else self.distances[metric][0]

    def estimates(self) -> dict[str, Estimate]:
        """Return the estimates of all metrics."""
        return {metric: self.estimate(metric) for metric in self.metrics}

    def minus(self, other: Measured) -> Measured:
        """Return the paired differences to a method measured on the same cases, for their common metrics."""
        scores = {n: values - other.scores[n] for n, values in self.scores.items() if n in other.scores}
        distances = {
            name: (value - other.distances[name][0], replicates - other.distances[name][1])
            for name, (value, replicates) in self.distances.items()
            if name in other.distances
        }
        return Measured(scores, distances)


def mean_of(measured: list[Measured]) -> Measured:
    """Combine several trainings of one method, measured on the same cases, by averaging each image's scores.

    The intervals cover the choice of images, not that of trainings.
    """
    first = measured[0]
    scores = {name: np.mean([each.scores[name] for each in measured], axis=0) for name in first.scores}
    distances = {
        name: (
            float(np.mean([each.distances[name][0] for each in measured])),
            np.mean([each.distances[name][1] for each in measured], axis=0),
        )
        for name in first.distances
    }
    return Measured(scores, distances)


def distances(
    features: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "n d"]
) -> dict[str, tuple[float, Float[np.ndarray, " groups"]]]:
    """Return each distance in `METRICS` of generated to original images; replicates omit whole pairs."""
    generated, original = torch.from_numpy(features).double(), torch.from_numpy(reference).double()
    found = {}
    measures = {name: metric.distance for name, metric in METRICS.items() if metric.distance is not None}
    for name, distance in measures.items():

        def of(kept: Int[np.ndarray, " kept"], distance: Any = distance) -> float:
            return float(distance(generated[kept], original[kept]))

        whole = float(distance(generated, original))
        found[name] = (whole, jackknife_replicates(of, len(generated), GROUPS))
    return found


def best_beyond_doubt(
    measured: Mapping[str, Measured],
    metric: str,
    apart: Callable[[str, str], Measured | None] | None = None,
) -> str | None:
    """Return the best method, or None unless its paired differences to all others have intervals without 0.

    `apart` maps two names to the differences of the first to the second; None if they cannot be paired. By
    default it is computed from the measurements.
    """
    better = find_metric(metric).better
    if better == "unknown":
        return None
    sign = -1 if better == "lower" else 1
    values = {name: each.value(metric) for name, each in measured.items() if metric in each.metrics}
    if len(values) < 2:
        return None
    best = max(values, key=lambda name: sign * values[name])
    for name in values.keys() - {best}:
        difference = apart(best, name) if apart else measured[best].minus(measured[name])
        if difference is None:
            return None
        estimate = difference.estimate(metric)
        if not estimate.excludes_zero or sign * estimate.value < 0:
            return None
    return best


@dataclass(frozen=True)
class MethodResult:
    """The measurements and the cost of one method. Times are summed over all processes."""

    name: str
    source: str
    sha256: str
    parameters: int
    measured: Measured
    generation_s: float = 0.0
    score_s: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        config: the evaluation's config.
        settings: all that determines the images, as written by `claim`.
        methods: name -> result, with `REFERENCE` first.
        cases: the cases for which images were generated.
        folder: the folder of images and scores.
    """

    config: EvaluationConfig
    settings: Mapping[str, Any]
    methods: Mapping[str, MethodResult]
    cases: Cases
    folder: Path


def batches(count: int, size: int) -> list[range]:
    """Return the indices of each batch among `count` cases."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def result_json(found: Evaluation) -> dict[str, Any]:
    """Return all that readers need besides the images: settings, versions, machine, and all estimates."""
    return {
        "settings": found.settings,
        "asked_for": _asked_for(found.config),
        "methods": {
            name: {
                "adapter": method.source,
                "sha256": method.sha256,
                "parameters": method.parameters,
                "draw_s": round(method.generation_s, 2),
                "score_s": round(method.score_s, 2),
                "metrics": {
                    metric: dataclasses.asdict(estimate)
                    for metric, estimate in method.measured.estimates().items()
                },
            }
            for name, method in found.methods.items()
        },
        "versions": versions(),
        "machine": machine(),
    }


def _asked_for(config: EvaluationConfig) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(config, data=data_without_secrets(config.data)))


def collect(
    cases: Cases,
    batch_size: int,
    stores: Mapping[str, Store],
    sources: Mapping[str, str],
    hashes: Mapping[str, str],
    adapters: Mapping[str, Any],
) -> dict[str, MethodResult]:
    """Concatenate the scores of all batches, and compute the distances between sets.

    Args:
        cases: the cases for which images were generated.
        batch_size: size of the batches.
        stores: name -> the method's batches, all of them generated and scored.
        sources: name -> the adapter as specified by the user.
        hashes: name -> the adapter's SHA-256.
        adapters: name -> adapter; None for the base.
    """
    whole_set = batches(len(cases), batch_size)
    found: dict[str, MethodResult] = {}
    reference: np.ndarray | None = None
    for name, store in stores.items():
        parts = [store.scores(places) for places in whole_set]
        whole = [part for part in parts if part is not None]
        assert len(whole) == len(parts)
        scores = {key: np.concatenate([part[key] for part in whole]) for key in whole[0] if key != "score_s"}
        features = scores.pop(FEATURES, None)
        if name == REFERENCE:
            reference = features
        apart = {}
        if features is not None and reference is not None and name != REFERENCE:
            apart = distances(features, reference)
        generation_s = 0.0
        if name != REFERENCE:
            generation_s = sum(store.generation_s(places) or 0.0 for places in whole_set)
        found[name] = MethodResult(
            name,
            sources.get(name, ""),
            hashes.get(name, ""),
            0 if adapters.get(name) is None else parameter_count(adapters[name]),
            Measured(scores, apart),
            generation_s,
            float(sum(part["score_s"] for part in whole)),
        )
    return found
