"""How metrics are shown: in which order, and under which names."""

from __future__ import annotations

from collections.abc import Iterable

from nexus_adapters.metrics import METRICS, find_metric

_ARROWS = {"higher": " ↑", "lower": " ↓", "unknown": ""}


def in_order(metrics: Iterable[str]) -> list[str]:
    """Each once: those of `METRICS` in its order, then the others as they come."""
    names = dict.fromkeys(metrics)
    return [name for name in METRICS if name in names] + [name for name in names if name not in METRICS]


def head(metric: str) -> str:
    """A metric's label, with an arrow that points to where it is better, as far as that is known."""
    found = find_metric(metric)
    return f"{found.label}{_ARROWS[found.better]}"
