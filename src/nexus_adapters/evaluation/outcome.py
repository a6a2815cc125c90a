"""What comes out of an evaluation: its methods' numbers, put together of their batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexus_adapters.evaluation.cases import Cases
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.estimates import Measured, distances
from nexus_adapters.evaluation.provenance import machine, versions
from nexus_adapters.evaluation.scoring import FEATURES
from nexus_adapters.evaluation.store import Store
from nexus_adapters.methods.method import parameter_count
from nexus_adapters.training.public import data_without_secrets

REFERENCE = "reference"  # the data's own pictures, scored as a method's are


@dataclass(frozen=True)
class Method:
    """One way to draw, and what it cost. Times are of all processes together."""

    name: str
    source: str
    sha256: str
    parameters: int
    measured: Measured
    draw_s: float = 0.0
    score_s: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        config: what was asked for.
        settings: what decided the pictures, as `claim` keeps it.
        methods: in order; `REFERENCE` first.
        cases: what was drawn.
        folder: where it lies.
    """

    config: EvaluationConfig
    settings: Mapping[str, Any]
    methods: Mapping[str, Method]
    cases: Cases
    folder: Path


def batches(count: int, size: int) -> list[range]:
    """The places of each batch."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def result_json(found: Evaluation) -> dict[str, Any]:
    """Everything that a reader needs beside the pictures: settings, versions, machine, and every estimate."""
    return {
        "settings": found.settings,
        "asked_for": _asked_for(found.config),
        "methods": {
            name: {
                "adapter": method.source,
                "sha256": method.sha256,
                "parameters": method.parameters,
                "draw_s": round(method.draw_s, 2),
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
) -> dict[str, Method]:
    """Put the batches' scores together, and compare sets.

    Args:
        cases: what was drawn.
        batch_size: by which.
        stores: name -> where a method's batches lie, all drawn and scored.
        sources: name -> what users called it.
        hashes: name -> of an adapter.
        adapters: name -> adapter, None for the base.
    """
    whole_set = batches(len(cases), batch_size)
    found: dict[str, Method] = {}
    reference: np.ndarray | None = None
    for name, store in stores.items():
        parts = [store.scores(places) for places in whole_set]
        whole = [part for part in parts if part is not None]
        assert len(whole) == len(parts)
        columns = {key: np.concatenate([part[key] for part in whole]) for key in whole[0] if key != "score_s"}
        features = columns.pop(FEATURES, None)
        if name == REFERENCE:
            reference = features
        apart = {}
        if features is not None and reference is not None and name != REFERENCE:
            apart = distances(features, reference)
        draw_s = 0.0
        if name != REFERENCE:
            draw_s = sum(store.draw_s(places) for places in whole_set)
        found[name] = Method(
            name,
            sources.get(name, ""),
            hashes.get(name, ""),
            0 if adapters.get(name) is None else parameter_count(adapters[name]),
            Measured(columns, apart),
            draw_s,
            float(sum(part["score_s"] for part in whole)),
        )
    return found
