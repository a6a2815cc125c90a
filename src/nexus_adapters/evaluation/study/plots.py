"""A study in pictures: how methods stand in a few metrics, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from nexus_adapters.evaluation.columns import COLUMNS, head
from nexus_adapters.evaluation.run import BASE
from nexus_adapters.evaluation.study.plan import OWN
from nexus_adapters.evaluation.study.tables import Results, Row, rows_of

_FAR_APART = 2.5  # the largest over the smallest
METRICS = ("binding_color", "binding_material", "edge_f1", "frechet")


def metrics_figure(results: Results) -> Figure:
    """A panel a condition and metric: each method's value with its interval."""
    conditions = list(dict.fromkeys(cell.condition for cell in results))
    tables = {condition: rows_of(results, condition, OWN) for condition in conditions}
    measured = {m for rows in tables.values() for row in rows for m in row.measured.metrics}
    shown = [m for m in METRICS if m in measured] or [m for m in COLUMNS if m in measured][: len(METRICS)]
    most = max(len(rows) for rows in tables.values())
    figure = Figure(figsize=(3.2 * len(shown), (0.32 * most + 0.9) * len(conditions)), layout="constrained")
    panels: Any = figure.subplots(len(conditions), len(shown), squeeze=False)
    for line, (condition, rows) in zip(panels, tables.items(), strict=True):
        for panel, metric in zip(line, shown, strict=True):
            _draw(panel, rows, metric)
            panel.set_title(f"{condition}: {head(metric)}", fontsize=9)
            if metric != shown[0]:
                panel.set_yticklabels([])
    return figure


def cost_figure(results: Results) -> Figure:
    """A panel a condition: binding, or without scenes structure, over the trained parameters.

    Small dots are single seeds.
    """
    conditions = list(dict.fromkeys(cell.condition for cell in results))
    views = [result.views[OWN] for result in results.values() if OWN in result.views]
    metric = next(name for name in (*METRICS, "ms_ssim") if all(name in view.metrics for view in views))
    figure = Figure(figsize=(3.4 * len(conditions), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(conditions), squeeze=False, sharey=True)
    for panel, condition in zip(panels[0], conditions, strict=True):
        for number, row in enumerate(row for row in rows_of(results, condition, OWN) if row.parameters):
            color = f"C{number % 10}"
            panel.plot(row.parameters / 1e6, row.measured.value(metric), "o", color=color, label=row.method)
            for cell, result in results.items():
                if (cell.condition, cell.method) == (condition, row.method) and OWN in result.views:
                    value = result.views[OWN].value(metric)
                    panel.plot(row.parameters / 1e6, value, ".", color=color, markersize=4, alpha=0.6)
        _number_axis(panel)
        panel.set_title(condition, fontsize=9)
        panel.set_xlabel("trained parameters, millions")
        panel.legend(fontsize=7, frameon=False)
    panels[0][0].set_ylabel(head(metric))
    return figure


def _number_axis(panel: Any) -> None:
    """Plain numbers; a logarithmic axis where they lie far apart."""
    low, high = panel.get_xlim()
    if high > _FAR_APART * max(low, 1e-9):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(labelsize=8)


def _draw(panel: Any, rows: Sequence[Row], metric: str) -> None:
    for place, row in enumerate(reversed(rows)):
        if metric not in row.measured.metrics:
            continue
        estimate = row.measured.estimate(metric)
        color = "0.6" if row.method == BASE else "C0"
        panel.plot([estimate.low, estimate.high], [place, place], color=color, lw=2)
        panel.plot(estimate.value, place, "o", color=color, markersize=5)
    panel.set_yticks(range(len(rows)), [row.method for row in reversed(rows)], fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", alpha=0.3)
