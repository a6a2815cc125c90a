"""A study's results: one file of raw scores from which all tables and plots are made.

The file is a NumPy archive (.npz) that `numpy.load` reads without pickle. For each cell and view it contains
`CELL/VIEW/scores`, float32 (metric, image), and `CELL/VIEW/distances`, float64 (metric, 1 + replicates), with
the value of the whole set in the first column. The array `cells` is JSON in UTF-8 with each cell's settings,
facts, names of metrics and provenance. The same results give the same bytes, regardless of the order in which
they were added.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.evaluation.store import UNREADABLE_ARCHIVE
from nexus_adapters.files import replacing
from nexus_adapters.study.plan import Cell, Study
from nexus_adapters.training.run_identity import flat, identity, identity_with_defaults


@dataclass(frozen=True)
class CellResult:
    """The measurements of one cell.

    Attributes:
        settings: all that determines the numbers; a cell with different settings is measured again.
        facts: numbers of the whole cell, if known: `parameters`, `gmacs` (10^9 per image), `val_loss`,
            `val_loss_as_trained`, and `step_s`, `draw_s` and `score_s` in seconds.
        views: name -> scores and distances.
        made_with: versions, machine and precision.
    """

    settings: Mapping[str, Any]
    facts: Mapping[str, float]
    views: Mapping[str, Measured]
    made_with: Mapping[str, Any]


Results = Mapping[Cell, CellResult]
_CELLS = "cells"


def results_of(study: Study) -> Results:
    """Return the cells that have a result for the current plan, in the plan's order.

    A cell that generates with another cell's adapter is included only if its result has the same weights as
    the other's, or the other has no result.
    """
    loaded = load_results(study.results)
    found = {
        cell: loaded[cell.name]
        for cell in study.cells()
        if cell.name in loaded and is_planned(study, cell, loaded[cell.name])
    }

    def weights(cell: Cell) -> Any:
        return found[cell].settings.get("adapter_sha256")

    trained = {cell: study.trained_cell(cell) for cell in found}
    return {
        cell: result
        for cell, result in found.items()
        if trained[cell] not in found or weights(trained[cell]) == weights(cell)
    }


def load_result(path: Path, cell: Cell) -> CellResult | None:
    """Return one cell's result from a result file; None if there is none."""
    return load_results(path).get(cell.name)


def load_results(path: Path) -> Mapping[str, CellResult]:
    """Return cell name -> result; empty if there is no file.

    If there is no file, results are read from the folder with the same name without suffix, in which earlier
    versions kept two files per cell.

    Raises:
        InvalidArgument: named "results", if the file was not written by `save_result`.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return _load_folder(path.with_suffix(""))
    return _load_file(path, (found.st_ino, found.st_size, found.st_mtime_ns))


def save_result(path: Path, cell: Cell, result: CellResult) -> None:
    """Add or replace a cell's result in a result file. The file is written atomically.

    Callers must hold a lock if several processes write to the same file.
    """
    results = {**load_results(path), cell.name: result}
    arrays: dict[str, np.ndarray] = {}
    cells: dict[str, Any] = {}
    for name, each in sorted(results.items()):
        metrics: dict[str, Any] = {}
        for view, measured in each.views.items():
            metrics[view] = {"scores": list(measured.scores), "distances": list(measured.distances)}
            # Single precision is far finer than the intervals and takes half the space.
            arrays[f"{name}/{view}/scores"] = np.array(list(measured.scores.values()), np.float32)
            arrays[f"{name}/{view}/distances"] = np.array(
                [[value, *replicates] for value, replicates in measured.distances.values()]
            )
        cells[name] = {
            "settings": each.settings,
            "facts": each.facts,
            "metrics": metrics,
            "made_with": each.made_with,
        }
    text = json.dumps(cells, allow_nan=False)
    with replacing(path) as stream:
        contents = {_CELLS: np.frombuffer(text.encode(), np.uint8), **arrays}
        np.savez_compressed(stream, **contents)  # type: ignore[arg-type]


@lru_cache(maxsize=4)  # a study requests its cells one by one
def _load_file(path: Path, stamp: tuple[int, ...]) -> Mapping[str, CellResult]:
    try:
        if not is_zipfile(path):  # NumPy would treat it as a pickle and advise loading it as one
            raise ValueError("it is not a NumPy archive")
        with np.load(path) as arrays:
            cells = json.loads(bytes(arrays[_CELLS]))
            return {name: _cell_result(about, arrays, f"{name}/") for name, about in cells.items()}
    except (*UNREADABLE_ARCHIVE, TypeError, AttributeError, IndexError) as error:
        hint = "Restore a copy, or move the file away to measure its cells again"
        expected = "a result file written by a study"
        raise InvalidArgument("results", expected, f"'{path}' ({one_line(error)})", hint) from error


def _load_folder(folder: Path) -> dict[str, CellResult]:
    """The results that earlier versions kept as CELL.json and CELL.npz, if both exist."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        numbers = file.with_suffix(".npz")
        try:
            about = json.loads(file.read_bytes())
            if "metrics" in about and numbers.is_file():  # even earlier versions had no names of metrics
                with np.load(numbers) as arrays:
                    found[file.stem] = _cell_result(about, arrays, "")
        except (*UNREADABLE_ARCHIVE, TypeError, AttributeError, IndexError) as error:
            warnings.warn(
                f"'{file}' is unreadable ({one_line(error)}); its cell will be measured again", stacklevel=2
            )
    return found


def _cell_result(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str) -> CellResult:
    views = {}
    for view, names in about["metrics"].items():
        scores = arrays[f"{prefix}{view}/scores"].astype(np.float64)
        distances = arrays[f"{prefix}{view}/distances"]
        views[view] = Measured(
            dict(zip(names["scores"], scores, strict=True)),
            {name: (float(row[0]), row[1:]) for name, row in zip(names["distances"], distances, strict=True)},
        )
    return CellResult(about["settings"], about["facts"], views, about["made_with"])


def planned_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Return the settings of a cell in the plan, as JSON types."""
    config = study.train_config(cell)
    asked = {
        "train": {} if config is None else identity(config),
        "views": {view: asdict(study.evaluation_config(cell, view)) for view in study.views()},
    }
    settings: dict[str, Any] = json.loads(json.dumps(_with_tildes(asked)))
    return settings


def is_planned(study: Study, cell: Cell, result: CellResult) -> bool:
    """Return whether a result belongs to the current plan and data."""
    now = {**result.settings, **planned_settings(study, cell)}
    return has_same_data(study, cell, result) and completed(result.settings) == completed(now)


def has_same_data(study: Study, cell: Cell, result: CellResult) -> bool:
    """Return whether a result has data with the same contents as now, as far as both are known."""
    before, now = result.settings.get("data", {}), study.data_sha256(cell)
    return all(before[name] == now[name] for name in before.keys() & now.keys() if before[name] and now[name])


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults of newer options, and with the home folder as `~`.

    The hashes of the data are removed, since `has_same_data` compares them.
    """
    defaults = flat(asdict(EvaluationConfig()))
    train = settings["train"] and identity_with_defaults(settings["train"])
    views = {name: {**defaults, **flat(view)} for name, view in settings["views"].items()}
    whole = _with_tildes({**settings, "train": train, "views": views})
    found: dict[str, Any] = json.loads(json.dumps(whole))
    found.pop("data", None)
    return found


def _with_tildes(content: Any) -> Any:
    """The content with the user's home folder as `~`, since its location does not affect the numbers."""
    return _replace_home(content, f"{Path.home()}{os.sep}")


def _replace_home(content: Any, home: str) -> Any:
    if isinstance(content, dict):
        return {key: _replace_home(value, home) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_home(value, home) for value in content]
    is_below = isinstance(content, str) and content.startswith(home)
    return f"~/{content.removeprefix(home)}" if is_below else content
