"""A study's report: tables, plots of metrics and cost, and generated images side by side."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from PIL import Image
from torch import nn

from nexus_adapters.bases.loading import load_base
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.evaluation.provenance import choose_dtype
from nexus_adapters.evaluation.report import head, in_order
from nexus_adapters.evaluation.run import BASE_ALONE, generate_cases, open_evaluation
from nexus_adapters.files import replacing, write_text
from nexus_adapters.methods import load_adapter
from nexus_adapters.metrics import METRICS, find_metric
from nexus_adapters.progress import progress
from nexus_adapters.study.cells import adapter_sha256
from nexus_adapters.study.plan import OWN, Cell, Study
from nexus_adapters.study.results import Results, results_of
from nexus_adapters.study.tables import Row, losses_csv, rows_of, study_csv, study_markdown
from nexus_adapters.training.run_folder import ADAPTER

_DPI = 120
_QUALITY = 75  # of image sheets, which are several times larger if lossless
_LOGARITHMIC = 2.5  # an axis whose largest value is this many times its smallest
# Cost of a method -> its unit in a panel, and its label.
_COSTS = {"parameters": (1e6, "trained parameters, millions"), "gmacs": (1.0, "GMACs per image")}
_PANELS = ("binding_color", "binding_material", "edge_f1", "frechet")

# Inches: an image with its margin, a row with its title and notes, the title of a row, the heads of columns.
_SIDE, _ROW, _TITLE, _HEAD = 1.45, 2.05, 0.25, 0.45
_LETTERS = 24  # of a row's title, per column
_HEAD_LETTERS = 16  # of a column's head at full size


def write_study(study: Study, out: Path, images: int = 0) -> list[Path]:
    """Write the study's report into a folder. The names of its files begin with the plan's name.

    The report is PLAN.csv and PLAN.json; for a study with images also PLAN.md, PLAN-metrics.webp and
    PLAN-cost.webp.

    Args:
        study: the study.
        out: the folder.
        images: if above 0, also write PLAN-images-CONDITION.webp with this many of the best, median and worst
            samples each, generated again by the methods whose runs exist.

    Returns:
        The files.

    Raises:
        InvalidArgument: if no cell has a result or, with `images`, if an adapter is missing.
    """
    results, name = results_of(study), study.path.stem
    if not results:
        raise InvalidArgument("PLAN", "at least one cell with a result", f"'{study.path}', which has none")
    facts: dict[str, Any] = {
        "cells": {cell.name: {"facts": result.facts, **result.made_with} for cell, result in results.items()},
        "missing": [cell.name for cell in study.cells() if cell not in results],
    }
    texts = {"json": json.dumps(facts, indent=2) + "\n"}
    if not study.views():
        texts["csv"] = losses_csv(results)
    else:
        texts |= {"csv": study_csv(results), "md": study_markdown(study, results)}
    written = []
    for suffix, text in texts.items():
        written.append(out / f"{name}.{suffix}")
        write_text(written[-1], text)
    if study.views():
        # A method that uses another's adapters has the same cost; the other one represents both.
        trained = {cell: study.trained_cell(cell) for cell in results}
        own = {
            cell: r for cell, r in results.items() if trained[cell] == cell or trained[cell] not in results
        }
        for kind, figure in (("metrics", metrics_figure(results)), ("cost", cost_figure(own))):
            written.append(_save(figure, out / f"{name}-{kind}.webp", {"lossless": True}))
    for condition in dict.fromkeys(cell.condition for cell in results) if images and study.views() else ():
        figure = images_figure(study, results, condition, images)
        written.append(_save(figure, out / f"{name}-images-{condition}.webp", {"quality": _QUALITY}))
    return sorted(written)


def _save(figure: Any, path: Path, options: Mapping[str, Any]) -> Path:
    with replacing(path) as stream:
        figure.savefig(stream, format="webp", dpi=_DPI, pil_kwargs=dict(options))
    return path


def metrics_figure(results: Results) -> Figure:
    """Return a figure with a panel for each condition and metric: all methods' values with intervals."""
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
            _plot_intervals(panel, rows, metric)
            panel.set_title(f"{condition}: {head(metric)}", fontsize=9)
            if metric != shown[0]:
                panel.set_yticklabels([])
    return figure


def _plot_intervals(panel: Any, rows: Sequence[Row], metric: str) -> None:
    for place, row in enumerate(reversed(rows)):
        if metric not in row.measured.metrics:
            continue
        estimate = row.measured.estimate(metric)
        color = "0.6" if row.method == BASE_ALONE else "C0"
        if estimate.interval:
            panel.plot(estimate.interval, [place, place], color=color, lw=2)
        panel.plot(estimate.value, place, "o", color=color, markersize=5)
    panel.set_yticks(range(len(rows)), [row.method for row in reversed(rows)], fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", alpha=0.3)


def cost_figure(results: Results) -> Figure:
    """Return a figure with a panel for each condition and cost: color binding, else structure, over cost.

    Conditions are rows, and costs are columns. Small dots are single seeds.
    """
    conditions = list(dict.fromkeys(cell.condition for cell in results))
    views = [result.views[OWN] for result in results.values() if OWN in result.views]
    metric = next(name for name in (*_PANELS, "ms_ssim") if all(name in view.metrics for view in views))
    methods = dict.fromkeys(cell.method for cell, result in results.items() if "parameters" in result.facts)
    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colors = {method: palette[number % len(palette)] for number, method in enumerate(methods)}
    width = 3.2 * len(_COSTS)
    in_a_row = int(width // 2)  # names per line of the legend
    height = 1.8 * len(conditions) + 0.4 + 0.2 * math.ceil(len(methods) / in_a_row)
    figure = Figure(figsize=(width, height), layout="constrained")
    # A narrow figure: in a document, it is shown at its own size, in which its letters can be read.
    panels: Any = figure.subplots(len(conditions), len(_COSTS), squeeze=False, sharey="row", sharex="col")
    for line, condition in zip(panels, conditions, strict=True):
        for panel, (fact, (unit, _)) in zip(line, _COSTS.items(), strict=True):
            for cell, result in results.items():
                if cell.condition == condition and fact in result.facts:
                    value = result.views[OWN].value(metric)
                    color = colors[cell.method]
                    panel.plot(result.facts[fact] / unit, value, ".", color=color, markersize=4, alpha=0.6)
            for row in rows_of(results, condition, OWN):
                cost = getattr(row, fact) / unit
                if cost:
                    panel.plot(cost, row.measured.value(metric), "o", color=colors[row.method])
            panel.tick_params(labelsize=8)
        line[0].set_ylabel(f"{condition}: {head(metric)}", fontsize=9)
    for panel, (_, label) in zip(panels[-1], _COSTS.values(), strict=True):
        _number_axis(panel)
        panel.set_xlabel(label, fontsize=9)
    dots = [Line2D([], [], marker="o", ls="", color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=dots, loc="outside lower center", ncols=in_a_row, fontsize=8, frameon=False)
    return figure


def _number_axis(panel: Any) -> None:
    """Plain numbers, on a logarithmic axis if the values are far apart."""
    low, high = panel.get_xlim()
    if high > _LOGARITHMIC * max(low, 1e-9):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())


def images_figure(study: Study, results: Results, condition_name: str, count: int) -> Figure:
    """Return a figure with a row per sample, for `count` of the best, median and worst samples each.

    A row shows the map, the original, and each method's image.

    Raises:
        InvalidArgument: named "images", if a run's adapter is not the one that was measured, if no run
            exists, or if fewer than three samples were measured.
    """
    cells = cells_to_show(study, results, condition_name)
    for cell in cells.values():
        _check_measured(study, cell, results[cell].settings["adapter_sha256"])
    measured = {method: results[cell].views[OWN] for method, cell in cells.items()}
    chosen = choose(measured, study.plan.compare_to, count)
    _, cases = open_evaluation(study.evaluation_config(next(iter(cells.values())), OWN))
    generated = generate_chosen(study, cells, chosen)
    columns = ["map", "original", *cells]
    width, height = _SIDE * len(columns), _ROW * len(chosen) + _HEAD
    figure = Figure(figsize=(width, height))
    for column, name in enumerate(columns):
        place = ((column + 0.5) * _SIDE / width, 1 - 0.6 * _HEAD / height)
        figure.text(*place, name, fontsize=9 * min(1, _HEAD_LETTERS / len(name)), ha="center")
    for number, each in enumerate(chosen):
        case, top = cases[each.place], height - _HEAD - number * _ROW
        title = textwrap.shorten(f"{each.why}: {case.prompt}", _LETTERS * len(columns), placeholder=" ...")
        figure.text(0.04 / width, (top - _TITLE) / height, title, fontsize=8)
        row = [case.condition, case.original, *(images[number] for images in generated.values())]
        notes = ["", "", *(_note(measured[method], each.place) for method in cells)]
        for column, (image, note) in enumerate(zip(row, notes, strict=True)):
            left, side = (column + 0.03) * _SIDE, 0.94 * _SIDE
            bottom = top - _TITLE - 0.08 - side
            panel = figure.add_axes((left / width, bottom / height, side / width, side / height))
            panel.imshow(image, interpolation="nearest")
            panel.set_axis_off()
            middle = (column + 0.5) * _SIDE / width
            below = (bottom - 0.05) / height
            figure.text(middle, below, note, fontsize=7, color="0.3", ha="center", va="top", linespacing=1.1)
    return figure


def cells_to_show(study: Study, results: Results, condition_name: str) -> dict[str, Cell]:
    """Return method -> its cell, for the base and for the seed with the most runs in the study's folder.

    Raises:
        InvalidArgument: named "images", if no run exists.
    """
    measured = [cell for cell, r in results.items() if cell.condition == condition_name and OWN in r.views]
    trained = [cell for cell in measured if cell.method != BASE_ALONE and study.run_folder(cell).is_dir()]
    if not trained and any(cell.method != BASE_ALONE for cell in measured):
        raise InvalidArgument(
            "images", f"runs of {condition_name}", f"'{study.folder / 'runs'}', which has none"
        )
    counts = Counter(cell.seed for cell in trained)
    seed = min(counts, key=lambda each: (-counts[each], each), default=0)
    return {c.method: c for c in measured if c.method == BASE_ALONE or (c in trained and c.seed == seed)}


def _check_measured(study: Study, cell: Cell, sha256: str) -> None:
    try:
        found = adapter_sha256(study, cell)
    except OSError:
        found = "none"
    if found != sha256:
        raise InvalidArgument(
            "images",
            f"the adapter that {cell.name} was measured with, sha256 {sha256[:8]}",
            f"{found[:8]} in '{study.run_folder(cell)}'",
        )


@dataclass(frozen=True)
class Chosen:
    """A sample on the sheet: `place` is its index in the evaluation, `why` what it is an example of."""

    place: int
    why: str


def choose(measured: Mapping[str, Measured], compare_to: str, count: int) -> list[Chosen]:
    """Return the `count` best, median and worst samples of the best adapter, compared to another method.

    The best adapter is the one with the highest mean merit, except for `compare_to` and the base. Samples are
    ordered by its merit minus that of `compare_to`. Merit is the mean of the metrics with `is_merit`, or
    MS-SSIM if none of them was measured.

    Raises:
        InvalidArgument: named "images", if fewer than three samples were measured.
    """
    merit = {method: _merit(each) for method, each in measured.items()}
    adapters = [method for method in merit if method not in (BASE_ALONE, compare_to)] or list(merit)
    subject = max(adapters, key=lambda method: float(np.nanmean(merit[method])))
    other = merit[compare_to] if compare_to in merit and compare_to != subject else 0.0
    difference = merit[subject] - other
    order = [int(place) for place in np.argsort(-difference, kind="stable") if np.isfinite(difference[place])]
    if len(order) < 3:
        raise InvalidArgument("images", "at least 3 measured samples", len(order))
    count = min(count, len(order) // 3)
    middle = (len(order) - count) // 2
    versus = f" vs. {compare_to}" if compare_to in merit else ""
    kinds = {
        f"{subject} best{versus}": order[:count],
        f"{subject} median{versus}": order[middle : middle + count],
        f"{subject} worst{versus}": order[len(order) - count :],
    }
    return [Chosen(place, why) for why, places in kinds.items() for place in places]


def generate_chosen(
    study: Study, cells: Mapping[str, Cell], chosen: Sequence[Chosen]
) -> dict[str, list[Image.Image]]:
    """Return method -> its images of the chosen samples, from the noise of the evaluation.

    The evaluation generated them in batches, so the images differ from its images only by rounding.
    """
    config = study.evaluation_config(next(iter(cells.values())), OWN)
    _, cases = open_evaluation(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(config.dtype, device)
    base = load_base(config.base.source, dtype=dtype, safety_checker=None).to(device)
    generated: dict[str, list[Image.Image]] = {}
    for method, cell in progress(list(cells.items()), what="generating", unit="method", leave=False):
        adapter = None
        if cell.method != BASE_ALONE:
            loaded: Any = load_adapter(study.run_folder(cell) / ADAPTER)
            # diffusers' own `to` warns about parts that should stay in float32, but there are none here.
            adapter = nn.Module.to(loaded, device, dtype)
        own = study.evaluation_config(cell, OWN)
        generated[method] = [
            generate_cases(own, each.place, [cases[each.place]], base, adapter)[0] for each in chosen
        ]
    return generated


def _merits(measured: Measured) -> list[str]:
    merits = [name for name, metric in METRICS.items() if metric.is_merit and name in measured.scores]
    return merits or ["ms_ssim"]


def _merit(measured: Measured) -> Float[np.ndarray, " n"]:
    merit: np.ndarray = np.mean([measured.scores[name] for name in _merits(measured)], axis=0)
    return merit


def _note(measured: Measured, place: int) -> str:
    scores = ", ".join(
        f"{find_metric(name).short} {measured.scores[name][place]:.2f}" for name in _merits(measured)
    )
    return "\n".join(textwrap.wrap(scores, _LETTERS))
