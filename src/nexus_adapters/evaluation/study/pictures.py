"""Successes and failures side by side: scenes chosen by a rule, drawn again by every method."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from nexus_adapters.bases.source import load_base
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.evaluation.loading import choose_dtype
from nexus_adapters.evaluation.run import BASE, draw_cases, open_evaluation
from nexus_adapters.evaluation.study.cells import adapter_sha256
from nexus_adapters.evaluation.study.plan import OWN, Cell, Study
from nexus_adapters.evaluation.study.tables import Results
from nexus_adapters.methods import load_adapter
from nexus_adapters.metrics import METRICS, find_metric
from nexus_adapters.training.output import ADAPTER

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
