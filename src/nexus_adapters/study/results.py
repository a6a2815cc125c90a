"""What is known of a cell, kept in files of which all tables and plots are made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.files import replacing, write_json
from nexus_adapters.study.plan import Cell, Study
from nexus_adapters.training.run_folder import flat, identity, with_defaults


@dataclass(frozen=True)
class CellResult:
    """One cell's.

    Attributes:
        settings: all that decides the numbers; where they differ, the cell is measured anew.
        facts: numbers of the whole cell, as far as it has them: `parameters`, `gmacs` (10^9 a picture),
            `val_loss`, `val_loss_as_trained`, and in seconds `step_s`, `draw_s`, `score_s`.
        views: what was measured from each.
        made_with: versions, machine, and precision.
    """

    settings: Mapping[str, Any]
    facts: Mapping[str, float]
    views: Mapping[str, Measured]
    made_with: Mapping[str, Any]


def save_result(folder: Path, cell: Cell, result: CellResult) -> None:
    """Write it; the settings last, so that what is there is whole.

    NAME.npz has a table of each view's scores (metrics x pictures) and distances (metrics x the value and its
    replicates), and NAME.json the rest, with the metrics' names.
    """
    tables: dict[str, np.ndarray] = {}
    for view, measured in result.views.items():
        # In single precision, which is far finer than the intervals, and smaller.
        tables[f"{view}/scores"] = np.array(list(measured.scores.values()), np.float32)
        tables[f"{view}/distances"] = np.array(
            [[value, *replicates] for value, replicates in measured.distances.values()]
        )
    numbers, content = _files(folder, cell)
    with replacing(numbers) as stream:
        np.savez_compressed(stream, **tables)  # type: ignore[arg-type]
    metrics = {
        view: {"scores": list(measured.scores), "distances": list(measured.distances)}
        for view, measured in result.views.items()
    }
    rest = {
        "settings": result.settings,
        "facts": result.facts,
        "metrics": metrics,
        "made_with": result.made_with,
    }
    write_json(content, rest)


def planned_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """What the plan asks of a cell, as JSON gives it back."""
    config = study.train_config(cell)
    asked = {
        "train": {} if config is None else identity(config),
        "views": {view: asdict(study.evaluation_config(cell, view)) for view in study.views()},
    }
    settings: dict[str, Any] = json.loads(json.dumps(_with_tildes(asked)))
    return settings


def _with_tildes(content: Any) -> Any:
    """With the user's home as `~`: where that lies decides no number."""
    if isinstance(content, dict):
        return {key: _with_tildes(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_tildes(value) for value in content]
    home = f"{Path.home()}{os.sep}"
    is_below = isinstance(content, str) and content.startswith(home)
    return f"~/{content.removeprefix(home)}" if is_below else content


def is_planned(study: Study, cell: Cell, result: CellResult) -> bool:
    """Whether a result is of the plan as it is now."""
    return completed(result.settings) == completed({**result.settings, **planned_settings(study, cell)})


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the defaults of options that came after they were written, and with the home as `~`."""
    defaults = flat(asdict(EvaluationConfig()))
    train = settings["train"] and with_defaults(settings["train"])
    views = {name: {**defaults, **flat(view)} for name, view in settings["views"].items()}
    whole = _with_tildes({**settings, "train": train, "views": views})
    found: dict[str, Any] = json.loads(json.dumps(whole))
    return found


def load_result(folder: Path, cell: Cell) -> CellResult | None:
    """What `save_result` wrote; None where it did not, or wrote it in an earlier version's form."""
    numbers, content = _files(folder, cell)
    if not (numbers.is_file() and content.is_file()):
        return None
    told = json.loads(content.read_bytes())
    if "metrics" not in told:
        return None
    views = {}
    with np.load(numbers) as stored:
        for view, names in told["metrics"].items():
            scores = stored[f"{view}/scores"].astype(np.float64)
            distances = stored[f"{view}/distances"]
            views[view] = Measured(
                dict(zip(names["scores"], scores, strict=True)),
                {
                    name: (float(row[0]), row[1:])
                    for name, row in zip(names["distances"], distances, strict=True)
                },
            )
    return CellResult(told["settings"], told["facts"], views, told["made_with"])


def _files(folder: Path, cell: Cell) -> tuple[Path, Path]:
    return folder / f"{cell.name}.npz", folder / f"{cell.name}.json"
