"""The plan of a study in TOML, and the recipe and evaluation of each of its cells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.config import EvaluationConfig, data_with_defaults
from nexus_adapters.evaluation.run import BASE_ALONE, check_names
from nexus_adapters.files import cache_folder
from nexus_adapters.training.config import DataOptions, NotNegative, TrainConfig
from nexus_adapters.training.data_identity import DataIdentity, identity_of_data
from nexus_adapters.training.parsing import SECTION, validated
from nexus_adapters.training.recipe import parse_config, read_toml

OWN = "own"  # the view that every study has: the evaluation without changes
# Fields of the evaluation that methods may change; samples and noise must stay the same.
_OF_METHODS = ("policy", "scale", "noise_exponent", "adapter_reads_prompt")
Some = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, config=SECTION)
class MethodPlan:
    """`[methods.NAME]`: one row in the tables."""

    train: dict[str, Any] = field(default_factory=dict)
    """Overrides for the recipe and `[train]`."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Overrides for `[evaluate]`: how the adapter is used, but not the samples."""
    trained_as: str = ""
    """Another method whose adapters this one uses in a different way, so nothing is trained for it."""


@dataclass(frozen=True, config=SECTION)
class CellGroup:
    """`[[cells]]`: all combinations of conditions, methods and seeds, in this order."""

    conditions: Some
    """Names of conditions, such as canny."""
    methods: Some
    """Names in `[methods]`, or "base" for the base without an adapter."""
    seeds: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (0,)
    """Seeds of the trainings; the base has one cell per condition."""


@dataclass(frozen=True, config=SECTION)
class StudyPlan:
    """A whole plan."""

    recipe: str
    """Path, relative to the plan, of the recipe for `nexus train` that all methods share."""
    methods: dict[str, MethodPlan]
    """Name -> how the method differs."""
    cells: Annotated[tuple[CellGroup, ...], Field(min_length=1)]
    """The cells to run, in this order; a cell that is listed twice runs once."""
    folder: str = ""
    """Folder for runs and generated images, relative to the working directory; empty for
    nexus-adapters/study/PLAN in the user's cache folder. Processes that share it run different cells."""
    results: str = ""
    """File for the raw scores of all cells (.npz), relative to the plan; empty for results.npz in `folder`.
    A cell counts as done if its scores are in the file, even without its run, so you can copy the file to
    share results or to continue a study on another machine. Processes that write to it must share
    `folder`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Overrides for the recipe, for all methods."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """The evaluation, with the fields of `EvaluationConfig`; empty for a study of training losses only."""
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> overrides for an additional evaluation of each cell, such as `prompts = "empty"`."""
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a condition -> overrides for its evaluation, such as the judge."""
    compare_to: str = ""
    """The method that all others are compared to, by paired differences."""

    def __post_init__(self) -> None:
        """Check values that depend on each other."""
        known = (BASE_ALONE, *self.methods)
        check_names(self.methods, "methods")
        check_names(self.views, "views")
        for name in self.methods:
            for key in self.methods[name].evaluate:
                if key not in _OF_METHODS:
                    raise InvalidArgument(
                        f"methods.{name}.evaluate",
                        f"some of {', '.join(_OF_METHODS)}, since all methods generate the same samples",
                        repr(key),
                    )
            other = self.methods[name].trained_as
            if other and (other not in self.methods or self.methods[other].trained_as):
                raise InvalidArgument(f"methods.{name}.trained_as", "a method that is trained", repr(other))
        for group in self.cells:
            for name in group.methods:
                if name not in known:
                    raise InvalidArgument("cells", f"one of the methods {', '.join(known)}", repr(name))
        if self.compare_to and self.compare_to not in known:
            raise InvalidArgument("compare_to", f"one of {', '.join(known)}", repr(self.compare_to))
        if OWN in self.views:
            raise InvalidArgument("views", f"names other than {OWN}, which every study has", repr(OWN))


class Cell(NamedTuple):
    """One training and the images generated with it."""

    condition: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder and its name in the result file."""
        return f"{self.condition}-{self.method}-{self.seed}"


class Study:
    """A plan and the locations of its runs and results.

    Args:
        path: the plan.

    Raises:
        InvalidArgument: for a missing file, a file that is not TOML, or an invalid plan or recipe of a cell;
            the error names the key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = validated(StudyPlan, read_toml(path, "PLAN"))
        self._recipe = read_toml(path.parent / self.plan.recipe, "recipe")
        folder = self.plan.folder
        self.folder = Path(folder).expanduser() if folder else cache_folder() / "study" / path.stem
        results = self.plan.results
        file = path.parent / Path(results).expanduser() if results else self.folder / "results.npz"
        self.results = file if file.suffix == ".npz" else file.with_name(f"{file.name}.npz")
        self._identities: dict[str, DataIdentity | None] = {}
        names: dict[str, Cell] = {}
        for cell in self.cells():
            if (other := names.setdefault(cell.name.casefold(), cell)) != cell:
                raise InvalidArgument(
                    "cells",
                    "distinct combinations of condition and method names",
                    f"'{cell.name}' for both {cell} and {other}",
                )
        for cell in self.cells():
            self.train_config(cell)
            for view in self.views():
                self.evaluation_config(cell, view)

    def cells(self) -> list[Cell]:
        """All cells in the plan's order, without repetitions."""
        return list(dict.fromkeys(self._all_cells()))

    def views(self) -> tuple[str, ...]:
        """The names of the evaluations of each cell; empty for a study of training losses."""
        return (OWN, *self.plan.views) if self.plan.evaluate else ()

    def trained_cell(self, cell: Cell) -> Cell:
        """Return the cell whose adapter this one uses: itself, unless its method is `trained_as` another."""
        method = self.plan.methods.get(cell.method)  # the base alone is not one
        return cell._replace(method=method.trained_as or cell.method) if method else cell

    def run_folder(self, cell: Cell) -> Path:
        """Return the folder of the cell's training."""
        return self.folder / "runs" / self.trained_cell(cell).name

    def train_config(self, cell: Cell) -> TrainConfig | None:
        """Return the recipe of a cell; None for the base."""
        if cell.method == BASE_ALONE:
            return None
        method = self.plan.methods[cell.method]
        if method.trained_as:
            return self.train_config(self.trained_cell(cell))
        own = {
            "seed": cell.seed,
            "output_dir": str(self.run_folder(cell)),
            "data": {"condition": cell.condition},
        }
        return parse_config(_merged(self._recipe, self.plan.train, method.train, own))

    def evaluation_config(self, cell: Cell, view: str) -> EvaluationConfig:
        """Return the evaluation of a cell in a view."""
        parts = [self.plan.evaluate, self.plan.conditions.get(cell.condition, {})]
        parts.append(self.plan.views.get(view, {}))
        if cell.method != BASE_ALONE:
            parts.append(self.plan.methods[cell.method].evaluate)
        merged = _merged(*parts, {"data": {"condition": cell.condition}})
        if merged["data"].get("kind") == "scenes":
            merged["data"] = data_with_defaults(merged["data"])
        return validated(EvaluationConfig, _with_homes(merged))

    def data_sha256(self, cell: Cell) -> dict[str, str]:
        """Return the hashes of the data that a cell is trained on ("train") and evaluated on (by view).

        "" for data that `identity_of_data` does not identify, such as scenes and data on the Hub.
        """
        found = {"train": self.train_data(cell)} if self.train_config(cell) is not None else {}
        for view in self.views():
            evaluation = self.evaluation_config(cell, view)
            found[f"views.{view}"] = self._identity_of(evaluation.data, "", evaluation.first)
        return {name: "" if each is None else each.digest for name, each in found.items()}

    def train_data(self, cell: Cell) -> DataIdentity | None:
        """Return the data that a cell is trained on; None for the base and for data not available locally."""
        config = self.train_config(cell)
        return None if config is None else self._identity_of(config.data, config.cache.folder, 0)

    def _identity_of(self, data: DataOptions, folder: str, first: int) -> DataIdentity | None:
        """Computed once for all cells, with the data as they are when the study is opened or resumed."""
        key = json.dumps([dataclasses.asdict(data), first], default=str)
        if key not in self._identities:
            cache = Path(folder) if folder else cache_folder() / "training"
            self._identities[key] = identity_of_data(data, cache, first)
        return self._identities[key]

    def _all_cells(self) -> Iterator[Cell]:
        for group in self.plan.cells:
            for condition in group.conditions:
                for seed in group.seeds:
                    for method in group.methods:
                        yield Cell(condition, method, 0 if method == BASE_ALONE else seed)


def _merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables merged into one; later values override earlier ones."""
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = _merged(merged[key], value) if both else deepcopy(value)
    return merged


def _with_homes(content: Any) -> Any:
    """The content with `~/` expanded at the beginning of strings."""
    if isinstance(content, dict):
        return {key: _with_homes(value) for key, value in content.items()}
    is_path = isinstance(content, str) and content.startswith("~/")
    return str(Path(content).expanduser()) if is_path else content
