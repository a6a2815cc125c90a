"""Run a study: each cell is trained, evaluated in every view, and saved. An interrupted study resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nexus_adapters.bases.loading import open_base
from nexus_adapters.errors import InvalidArgument, renamed
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.estimates import REFERENCE, Measured
from nexus_adapters.evaluation.provenance import choose_dtype, machine, versions
from nexus_adapters.evaluation.run import (
    BASE_ALONE,
    SCORING_FIELDS,
    SCORING_PACKAGES,
    evaluate,
    open_evaluation,
)
from nexus_adapters.evaluation.scoring import Scorer
from nexus_adapters.files import WEIGHTS, file_sha256, lock, read_json_lines
from nexus_adapters.methods import load_adapter, method_of
from nexus_adapters.methods.cost import parameter_count
from nexus_adapters.packages import check_packages
from nexus_adapters.study.plan import OWN, Cell, Study
from nexus_adapters.study.results import (
    CellResult,
    completed,
    has_same_data,
    is_planned,
    load_result,
    planned_settings,
    save_result,
)
from nexus_adapters.training.checks import check_place, check_recipe
from nexus_adapters.training.config import LossOptions, TrainConfig
from nexus_adapters.training.data_identity import check_same_data
from nexus_adapters.training.loss import timesteps_at
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.run import train_adapter
from nexus_adapters.training.run_folder import ADAPTER, LOG, finished_steps
from nexus_adapters.training.run_identity import flat

_DRAWS = 100_000  # evenly spaced samples to estimate how often training visits each timestep


def run_study(study: Study) -> list[Cell]:
    """Run the unfinished cells in the plan's order, and save the result of each as soon as it is finished.

    Returns:
        The cells that were skipped because another process is running them.

    Raises:
        Stopped: after Ctrl-C or SIGTERM during training, with the last step saved.
        InvalidArgument: if a training or an evaluation rejects its input; the name includes the cell.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidArgument(
            "study",
            "one process, or several that are started separately",
            f"{os.environ['WORLD_SIZE']} processes that were launched together",
        )
    if study.views():
        check_packages("eval", *SCORING_PACKAGES)  # not only when the first adapter is trained
    _run_cells(study)
    # A second pass evaluates cells again that were retrained because another one uses their adapter.
    return _run_cells(study)


def _run_cells(study: Study) -> list[Cell]:
    cells, left = study.cells(), []
    for number, cell in enumerate(cells, 1):
        with alone(study, cell) as is_ours:
            if not is_ours:
                left.append(cell)
                continue
            if not is_done(study, cell):
                print(f"[{number}/{len(cells)}] {cell.name}", file=sys.stderr, flush=True)
                with _naming(cell):
                    with deterministic():
                        result = _run(study, cell)
                    with lock(study.folder / "locks" / "results.lock"):
                        save_result(study.results, cell, result)
    return left


@contextmanager
def alone(study: Study, cell: Cell) -> Iterator[bool]:
    """Hold the lock of a cell and of all that share its training; yields False if another process has it."""
    name = cell.name if cell.method == BASE_ALONE else study.run_folder(cell).name
    with lock(study.folder / "locks" / f"{name}.lock", wait=False) as is_ours:
        yield is_ours


def is_done(study: Study, cell: Cell) -> bool:
    """Return whether a cell has a result with the plan's settings and, if it has a run, its weights."""
    found = load_result(study.results, cell)
    if found is None:
        return False
    config = study.train_config(cell)
    if config is not None and not Path(config.output_dir).exists():
        return is_planned(study, cell, found) and found.settings["versions"] == versions()
    if config is not None and not _is_trained(config):
        return False
    is_same = completed(found.settings) == completed(_settings(study, cell))
    return is_same and has_same_data(study, cell, found)


def _is_trained(config: TrainConfig) -> bool:
    return finished_steps(Path(config.output_dir), config.training.max_train_steps) is not None


def described(study: Study) -> str:
    """Return one line per cell with its name and state: done, trained, or to train.

    Raises `InvalidArgument` as `run_study`, for all that can be checked without models.
    """
    lines = []
    for cell in study.cells():
        config = study.train_config(cell)
        is_trained = cell.method == BASE_ALONE or (config is not None and _is_trained(config))
        state = "done" if is_done(study, cell) else "trained" if is_trained else "to train"
        if state != "done":
            with _naming(cell):
                _check(study, cell)
        lines.append(f"{cell.name:40} {state}")
    return "\n".join(lines)


def _run(study: Study, cell: Cell) -> CellResult:
    config = study.train_config(cell)
    _check(study, cell)  # fail before the training, not after it
    for view in study.views():
        Scorer(study.evaluation_config(cell, view))
    adapters: dict[str, str] = {}
    facts: dict[str, float] = {}
    if config is not None:
        adapters[cell.method] = str(train_adapter(config))
        facts |= _facts_of_run(study, cell, Path(config.output_dir))
    views: dict[str, Measured] = {}
    for view in study.views():
        evaluation = study.evaluation_config(cell, view)
        out = _evaluation_folder(study, cell, view, evaluation)
        reference = study.folder / "evaluations" / REFERENCE
        found = evaluate(evaluation, adapters, out, with_base=config is None, reference=reference)
        assert found is not None  # None only in a second process of a distributed evaluation
        method = found.methods[cell.method]
        views[view] = method.measured
        # Result files contain these names and those of `precision_of`, so they must not change.
        for name, seconds in (("draw_s", method.generation_s), ("score_s", method.score_s)):
            facts[name] = round(facts.get(name, 0.0) + seconds, 2)
    made_with = {"versions": versions(), "machine": machine(), "precision": precision_of(study, cell)}
    return CellResult(_settings(study, cell), facts, views, made_with)


@contextmanager
def _naming(cell: Cell) -> Iterator[None]:
    """Add the cell's name to an `InvalidArgument` that passes through."""
    with renamed(lambda name: f"cell {cell.name}: {name}"):
        yield


def _check(study: Study, cell: Cell) -> None:
    """Raise `InvalidArgument` if the cell's training or evaluation would. Loads no model."""
    for view in study.views():
        open_evaluation(study.evaluation_config(cell, view))
    config = study.train_config(cell)
    if config is not None:
        _check_run(study, cell, Path(config.output_dir))
        check_place(config)
        if not _is_trained(config):
            check_recipe(config)


def _check_run(study: Study, cell: Cell, folder: Path) -> None:
    """Raise `InvalidArgument` for a run that was trained on data that have changed since."""
    now = study.train_data(cell)
    if now is not None:
        check_same_data(folder, now, "Set another folder in the plan, or delete the run")


@contextmanager
def deterministic() -> Iterator[None]:
    """Use torch's deterministic operations on a GPU while the context is open; on a CPU they always are.

    Operations without a deterministic implementation still run, with a warning from torch.
    CUBLAS_WORKSPACE_CONFIG is set permanently unless it has a value, since CUDA reads it at startup.
    """
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: Any = torch.utils.deterministic
    attention: Any = torch.backends.cuda
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filled = options.fill_uninitialized_memory
    had_cudnn_attention = attention.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    attention.enable_cudnn_sdp(False)  # its gradients are summed in any order, and torch would only warn
    options.fill_uninitialized_memory = False  # nothing here reads uninitialized memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        attention.enable_cudnn_sdp(had_cudnn_attention)
        options.fill_uninitialized_memory = was_filled


def precision_of(study: Study, cell: Cell) -> dict[str, str]:
    """Return the dtypes of training (`trained`) and generation (`drawn`), which depend on the device."""
    config = study.train_config(cell)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, torch.dtype] = {}
    if config is not None:
        trained_on = torch.device("cpu") if config.training.device == "cpu" else device
        found["trained"] = choose_precision(config.training.mixed_precision, trained_on).dtype
    if study.views():
        found["drawn"] = choose_dtype(study.evaluation_config(cell, OWN).dtype, device)
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}


def _evaluation_folder(study: Study, cell: Cell, view: str, config: EvaluationConfig) -> Path:
    """The folder for a cell's images; other settings, weights or versions have another folder."""
    defaults = flat(dataclasses.asdict(EvaluationConfig()))
    # Defaults are omitted, so that a new option does not change the names of folders.
    fields = {
        name: value
        for name, value in flat(dataclasses.asdict(config)).items()
        if name.split(".")[0] not in SCORING_FIELDS and value != defaults.get(name)
    }
    made_of = [fields, adapter_sha256(study, cell), versions()]
    if data := study.data_sha256(cell)[f"views.{view}"]:  # omitted if unknown, as before it was included
        made_of.append(data)
    identity = json.dumps(made_of, sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return study.folder / "evaluations" / f"{cell.name}@{view}-{key}"


def adapter_sha256(study: Study, cell: Cell) -> str:
    """Return the SHA-256 of the weights of a finished run; "" for the base."""
    if cell.method == BASE_ALONE:
        return ""
    return file_sha256(study.run_folder(cell) / ADAPTER / f"{WEIGHTS}.safetensors")


def _settings(study: Study, cell: Cell) -> dict[str, Any]:
    """The settings of a finished cell, as JSON types."""
    found = planned_settings(study, cell)
    made_with = {"adapter_sha256": adapter_sha256(study, cell), "versions": versions()}
    data = {name: sha256 for name, sha256 in study.data_sha256(cell).items() if sha256}
    return found | made_with | ({"data": data} if data else {})


def _facts_of_run(study: Study, cell: Cell, folder: Path) -> dict[str, float]:
    config = study.train_config(cell)
    assert config is not None
    adapter = load_adapter(folder / ADAPTER)
    facts: dict[str, float] = {"parameters": parameter_count(adapter)}
    if study.views():
        evaluation = study.evaluation_config(cell, study.views()[0])
        size, steps = evaluation.data.resolution, evaluation.num_inference_steps
        cost = method_of(adapter).cost(adapter, open_base(config.base.source), size, steps)
        facts["gmacs"] = cost.gmacs(steps)
    rows = read_json_lines(folder / LOG, dict)  # none for a short run without validation
    validated = [row for row in rows if "val_loss" in row]
    # A loss that is not finite is null in the log.
    is_finite = bool(validated) and None not in (
        value for name, value in validated[-1].items() if name.startswith("val_loss")
    )
    if is_finite:
        facts["val_loss"] = validated[-1]["val_loss"]
        facts["val_loss_as_trained"] = round(loss_as_trained(validated[-1], config.loss), 6)
    times = [row["step_s"] for row in rows if row.get("step_s") is not None]
    if times:
        facts["step_s"] = round(sum(times) / len(times), 3)
    return facts


def loss_as_trained(row: Mapping[str, Any], loss: LossOptions) -> float:
    """Return the validation loss, weighted by how often training samples each part of the schedule.

    Args:
        row: a row of a run's log, with one loss per part of the schedule: `val_loss_0000`, `val_loss_0100`,
            ...
        loss: how training samples timesteps.
    """
    places = sorted(key for key in row if key.startswith("val_loss_"))
    even = (torch.arange(_DRAWS, dtype=torch.float64) + 0.5) / _DRAWS
    timesteps = timesteps_at(even, loss.timesteps, _DRAWS, loss.band)
    shares = torch.histc(timesteps.double(), bins=len(places), min=0, max=_DRAWS) / _DRAWS
    return float((shares * torch.tensor([row[place] for place in places], dtype=torch.float64)).sum())
