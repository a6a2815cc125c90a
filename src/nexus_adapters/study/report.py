"""What a study found, written: tables, plots of metrics and cost, and images side by side."""

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
from tqdm import tqdm

from nexus_adapters.bases.loading import load_base
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.evaluation.provenance import choose_dtype
from nexus_adapters.evaluation.report import head, in_order
from nexus_adapters.evaluation.run import BASE, draw_cases, open_evaluation
from nexus_adapters.files import replacing, write_text
from nexus_adapters.methods import load_adapter
from nexus_adapters.metrics import METRICS, find_metric
from nexus_adapters.study.cells import adapter_sha256
from nexus_adapters.study.plan import OWN, Cell, Study
from nexus_adapters.study.results import is_planned, load_result
from nexus_adapters.study.tables import Results, Row, losses_csv, rows_of, study_csv, study_markdown
from nexus_adapters.training.run_folder import ADAPTER

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


# Inches: a picture with its margin, a row of them with the words above and below, and what is over all.
_SIDE, _ROW, _TITLE, _HEAD = 1.45, 2.05, 0.25, 0.45
_LETTERS = 24  # of a row's title, for each column
_HEAD_LETTERS = 16  # of a column's title at full size


@dataclass(frozen=True)
class Chosen:
    """A sample that is shown. `place`: its number in the evaluation; `why`: what it stands for."""

    place: int
    why: str


def choose(measured: Mapping[str, Measured], compare_to: str, count: int) -> list[Chosen]:
    """The `count` best, middle and worst samples of the best adapter beside another.

    The best is that of the highest mean merit other than `compare_to`, whose merit is subtracted sample by
    sample. Merit is the mean of the metrics with `is_merit`, or MS-SSIM where none of them is measured.
    """
    merit = {method: _merit(each) for method, each in measured.items()}
    adapters = [method for method in merit if method not in (BASE, compare_to)] or list(merit)
    subject = max(adapters, key=lambda method: float(np.nanmean(merit[method])))
    other = merit[compare_to] if compare_to in merit and compare_to != subject else 0.0
    difference = merit[subject] - other
    order = [int(place) for place in np.argsort(-difference, kind="stable") if np.isfinite(difference[place])]
    if len(order) < 3:
        raise InvalidArgument("pictures", "at least 3 measured samples", len(order))
    count = min(count, len(order) // 3)
    middle = (len(order) - count) // 2
    beside = f" beside {compare_to}" if compare_to in merit else ""
    kinds = {
        f"{subject} best{beside}": order[:count],
        f"{subject} in the middle{beside}": order[middle : middle + count],
        f"{subject} worst{beside}": order[len(order) - count :],
    }
    return [Chosen(place, why) for why, places in kinds.items() for place in places]


def pictures_figure(study: Study, results: Results, condition: str, count: int) -> Figure:
    """`count` scenes each of the best, middle and worst, by the methods whose adapters are here.

    All of one seed: the first of those from which most methods' runs lie in the study's folder. From the
    noise that the evaluation had; what else a batch holds changes a picture by rounding alone.

    Raises:
        InvalidArgument: where a run's adapter is not the one that was measured, no run is here, or fewer than
            three samples were measured.
    """
    cells = _cells_to_draw(study, results, condition)
    for cell in cells.values():
        _check_measured(study, cell, results[cell].settings["adapter_sha256"])
    measured = {method: results[cell].views[OWN] for method, cell in cells.items()}
    chosen = choose(measured, study.plan.compare_to, count)
    config = study.evaluation_config(next(iter(cells.values())), OWN)
    _, cases = open_evaluation(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(config.dtype, device)
    base = load_base(config.base.source, dtype=dtype, safety_checker=None).to(device)
    drawn: dict[str, list[Image.Image]] = {}
    for method, cell in tqdm(cells.items(), f"drawing {condition}", unit="method", leave=False):
        adapter = _load(study, cell, device, dtype)
        drawing = study.evaluation_config(cell, OWN)
        drawn[method] = [
            draw_cases(drawing, each.place, [cases[each.place]], base, adapter)[0] for each in chosen
        ]
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
        images = [case.condition, case.picture, *(pictures[number] for pictures in drawn.values())]
        notes = ["", "", *(_note(measured[method], each.place) for method in cells)]
        for column, (image, note) in enumerate(zip(images, notes, strict=True)):
            left, side = (column + 0.03) * _SIDE, 0.94 * _SIDE
            bottom = top - _TITLE - 0.08 - side
            panel = figure.add_axes((left / width, bottom / height, side / width, side / height))
            panel.imshow(image, interpolation="nearest")
            panel.set_axis_off()
            middle = (column + 0.5) * _SIDE / width
            below = (bottom - 0.05) / height
            figure.text(middle, below, note, fontsize=7, color="0.3", ha="center", va="top", linespacing=1.1)
    return figure


def _cells_to_draw(study: Study, results: Results, condition: str) -> dict[str, Cell]:
    """Method -> its cell of the seed that most have here, in the order of the results; and the base."""
    measured = [cell for cell, r in results.items() if cell.condition == condition and OWN in r.views]
    trained = [cell for cell in measured if cell.method != BASE and study.run_folder(cell).is_dir()]
    if not trained and any(cell.method != BASE for cell in measured):
        raise InvalidArgument(
            "pictures", f"runs of {condition}", f"'{study.folder / 'runs'}', which has none"
        )
    counts = Counter(cell.seed for cell in trained)
    seed = min(counts, key=lambda each: (-counts[each], each), default=0)
    return {c.method: c for c in measured if c.method == BASE or (c in trained and c.seed == seed)}


def _merits(measured: Measured) -> list[str]:
    merits = [name for name, metric in METRICS.items() if metric.is_merit and name in measured.scores]
    return merits or ["ms_ssim"]


def _merit(measured: Measured) -> Float[np.ndarray, " n"]:
    merit: np.ndarray = np.mean([measured.scores[name] for name in _merits(measured)], axis=0)
    return merit


def _note(measured: Measured, place: int) -> str:
    told = ", ".join(
        f"{find_metric(name).short} {measured.scores[name][place]:.2f}" for name in _merits(measured)
    )
    return "\n".join(textwrap.wrap(told, _LETTERS))


def _check_measured(study: Study, cell: Cell, sha256: str) -> None:
    try:
        found = adapter_sha256(study, cell)
    except OSError:
        found = "none"
    if found != sha256:
        raise InvalidArgument(
            "pictures",
            f"the adapter that {cell.name} was measured with, sha256 {sha256[:8]}",
            f"{found[:8]} in '{study.run_folder(cell)}'",
        )


def _load(study: Study, cell: Cell, device: torch.device, dtype: torch.dtype) -> Any:
    if cell.method == BASE:
        return None
    adapter = load_adapter(study.run_folder(cell) / ADAPTER)
    # diffusers' own `to` warns of parts to keep in float32: here none.
    return nn.Module.to(adapter, device, dtype)


_DPI = 120
_QUALITY = 75  # of pictures, which as PNG take several times as much


def results_of(study: Study) -> Results:
    """The cells that have a result of the plan as it is now, in its order.

    Of a cell that draws with another's adapter only where the other's result is of the same weights, or there
    is none.
    """
    read = {cell: load_result(study.results, cell) for cell in study.cells()}
    found = {cell: r for cell, r in read.items() if r is not None and is_planned(study, cell, r)}

    def weights(cell: Cell) -> Any:
        return found[cell].settings.get("adapter_sha256")

    trained = {cell: study.trained_cell(cell) for cell in found}
    return {
        cell: result
        for cell, result in found.items()
        if trained[cell] not in found or weights(trained[cell]) == weights(cell)
    }


def write_study(study: Study, out: Path, pictures: int = 0) -> list[Path]:
    """Write NAME.csv, NAME.json, and of pictures NAME.md and two plots; NAME is the plan's.

    With `pictures`, so many scenes each of successes, middle and failures are drawn again by the methods
    whose trained adapters are here, and NAME-pictures-CONDITION.webp is written.

    Raises `InvalidArgument` where no cell has a result, or an adapter is missing.
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
        # What draws with another's adapters costs what that does, and is left out beside it.
        trained = {cell: study.trained_cell(cell) for cell in results}
        own = {
            cell: r for cell, r in results.items() if trained[cell] == cell or trained[cell] not in results
        }
        for kind, figure in (("metrics", metrics_figure(results)), ("cost", cost_figure(own))):
            written.append(_save(figure, out / f"{name}-{kind}.webp", {"lossless": True}))
    for condition in dict.fromkeys(cell.condition for cell in results) if pictures and study.views() else ():
        figure = pictures_figure(study, results, condition, pictures)
        written.append(_save(figure, out / f"{name}-pictures-{condition}.webp", {"quality": _QUALITY}))
    return sorted(written)


def _save(figure: Any, path: Path, options: Mapping[str, Any]) -> Path:
    with replacing(path) as stream:
        figure.savefig(stream, format="webp", dpi=_DPI, pil_kwargs=dict(options))
    return path
