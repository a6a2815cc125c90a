"""Writing what a study found: tables and plots, of whatever cells are done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.study.pictures import pictures_figure
from nexus_adapters.evaluation.study.plan import Cell, Study
from nexus_adapters.evaluation.study.plots import cost_figure, metrics_figure
from nexus_adapters.evaluation.study.results import is_planned, load_result
from nexus_adapters.evaluation.study.tables import Results, losses_csv, study_csv, study_markdown
from nexus_adapters.files import replacing, write_text

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
