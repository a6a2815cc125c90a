"""A study in pictures: how methods stand in a few metrics, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from nexus_adapters.evaluation.columns import head, in_order
from nexus_adapters.evaluation.run import BASE
from nexus_adapters.evaluation.study.plan import OWN
from nexus_adapters.evaluation.study.tables import Results, Row, rows_of

_FAR_APART = 2.5  # the largest over the smallest
# What a method costs: the unit in a panel, and its label.
_COSTS = {"parameters": (1e6, "trained parameters, millions"), "gmacs": (1.0, "GMACs for a picture")}
_PANELS = ("binding_color", "binding_material", "edge_f1", "frechet")


def metrics_figure(results: Results) -> Figure:
    """A panel a condition and metric: each method's value with its interval."""
    conditions = list(dict.fromkeys(cell.condition for cell in results))
    tables = {condition: rows_of(results, condition, OWN) for condition in conditions}
    measured = {m for rows in tables.values() for row in rows for m in row.measured.metrics}
    shown = [m for m in _PANELS if m in measured] or in_order(sorted(measured))[: len(_PANELS)]
    heights = [0.32 * len(rows) + 0.9 for rows in tables.values()]
    figure = Figure(figsize=(3.2 * len(shown), sum(heights)), layout="constrained")
    panels: Any = figure.subplots(
        len(conditions), len(shown), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, (condition, rows) in zip(panels, tables.items(), strict=True):
        for panel, metric in zip(line, shown, strict=True):
            _draw(panel, rows, metric)
            panel.set_title(f"{condition}: {head(metric)}", fontsize=9)
            if metric != shown[0]:
                panel.set_yticklabels([])
    return figure


def cost_figure(results: Results) -> Figure:
    """A panel a condition and cost: binding, or without scenes structure, over what a method costs.

    Small dots are single seeds.
    """
    conditions = list(dict.fromkeys(cell.condition for cell in results))
    views = [result.views[OWN] for result in results.values() if OWN in result.views]
    metric = next(name for name in (*_PANELS, "ms_ssim") if all(name in view.metrics for view in views))
    methods = dict.fromkeys(cell.method for cell, result in results.items() if "parameters" in result.facts)
    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colors = {method: palette[number % len(palette)] for number, method in enumerate(methods)}
    width = 3.2 * max(len(conditions), 2)
    in_a_row = int(width // 2)  # names in the legend
    height = 5.2 + 0.2 * math.ceil(len(methods) / in_a_row)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels: Any = figure.subplots(len(_COSTS), len(conditions), squeeze=False, sharey="col", sharex="row")
    for line, (fact, (unit, label)) in zip(panels, _COSTS.items(), strict=True):
        for panel, condition in zip(line, conditions, strict=True):
            for cell, result in results.items():
                if cell.condition == condition and fact in result.facts:
                    value = result.views[OWN].value(metric)
                    color = colors[cell.method]
                    panel.plot(result.facts[fact] / unit, value, ".", color=color, markersize=4, alpha=0.6)
            for row in rows_of(results, condition, OWN):
                cost = getattr(row, fact) / unit
                if cost:
                    panel.plot(cost, row.measured.value(metric), "o", color=colors[row.method])
            panel.set_title(condition, fontsize=9)
            panel.set_xlabel(label, fontsize=8)
        _number_axis(line[0])
        for panel in line:
            panel.tick_params(labelsize=8)
        line[0].set_ylabel(head(metric), fontsize=9)
    dots = [Line2D([], [], marker="o", ls="", color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=dots, loc="outside lower center", ncols=in_a_row, fontsize=8, frameon=False)
    return figure


def _number_axis(panel: Any) -> None:
    """Plain numbers; a logarithmic axis where they lie far apart."""
    low, high = panel.get_xlim()
    if high > _FAR_APART * max(low, 1e-9):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())


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
