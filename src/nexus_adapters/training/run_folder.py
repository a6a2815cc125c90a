"""A run's folder: whether a recipe can use it, whether the run is finished, its checkpoints and its log."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from torch import nn

from nexus_adapters.adapter.saved import CHECKPOINT_FORMAT, RUN_RECORD, read_json, weights_in
from nexus_adapters.adapter.saved import CONFIG as ADAPTER_CONFIG
from nexus_adapters.adapter.weights import check_hash
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import append_json_lines, is_leftover, read_json_lines, write_json, write_text
from nexus_adapters.training.checkpoint import (
    Checkpoint,
    TrainState,
    checkpoint_folders,
    damage,
    latest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    step_of,
)
from nexus_adapters.training.config import CheckpointOptions, TrainConfig
from nexus_adapters.training.recipe import dump_config, load_run_recipe
from nexus_adapters.training.redaction import without_secrets
from nexus_adapters.training.run_identity import HELD_OUT, differing, identity, identity_with_defaults

CONFIG, CHECKPOINTS, LOG, ADAPTER = "config.toml", "checkpoints", "log.jsonl", "adapter"
FINISHED = RUN_RECORD  # in ADAPTER
PROGRESS = "progress.json"  # the last saved step, to notice when checkpoints are missing

_HASHES = {  # key of a hash -> what users call the thing that is hashed
    "data": "data",
    "encoders": "autoencoder and text encoder",
    "denoiser": "denoiser (UNet or transformer) or noise schedule",
}
_CONTENTS = {**_HASHES, HELD_OUT: "held-out samples"}
_OLD_DATA = "samples"  # the key in checkpoints of earlier versions, which hashed the samples' names


def check_run_folder(config: TrainConfig) -> None:
    """Raise `InvalidArgument` unless the output folder is new, empty, or belongs to the same run."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument("output_dir", "a folder", f"'{folder}', which is a file")
    start = config.adapter.start_from
    if start and Path(os.path.realpath(start)).is_relative_to(os.path.realpath(folder)):
        raise InvalidArgument(
            "adapter.start_from",
            "an adapter outside output_dir",
            f"'{start}' in '{folder}'",
            "Omit it to resume that run, or choose a new output_dir to start a new run from its adapter",
        )
    if (folder / CONFIG).is_file():
        _check_same(config, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are shown when the run resumes
            if finished_steps(folder, config.training.max_train_steps) is None:
                newest_checkpoint(folder)
    elif folder.is_dir() and (others := sorted(p.name for p in folder.iterdir() if not is_leftover(p.name))):
        raise InvalidArgument(
            "output_dir",
            "a new or empty folder, or the folder of a run",
            f"'{folder}', which contains {others[0]} but no {CONFIG}",
        )


def _check_same(config: TrainConfig, folder: Path) -> None:
    try:
        before = identity(load_run_recipe(folder / CONFIG))
    except InvalidArgument as error:
        reason = InvalidArgument(error.name, error.expected, error.received)
        raise InvalidArgument(
            "output_dir",
            "a run's folder",
            f"'{folder}', whose {CONFIG} cannot be read ({reason})",
            error.hint,
        ) from error
    now = identity(config)
    key = differing(before, now)
    if key is not None:
        raise InvalidArgument(
            "output_dir",
            f"a new folder for a run with {key}={identity_with_defaults(now).get(key)!r}",
            f"'{folder}', whose run has {identity_with_defaults(before).get(key)!r}",
            _continue_hint(folder),
        )


def _continue_hint(folder: Path) -> str:
    return f'To start from the weights of this run, set adapter.start_from = "{folder}" in that recipe'


def finished_steps(output_dir: Path, max_train_steps: int) -> int | None:
    """Return the steps of a finished run in the folder; None if there is none or it has steps left.

    A damaged adapter does not count as finished: with a warning, it is exported again from the last
    checkpoint.
    """
    adapter = output_dir / ADAPTER
    record = adapter / FINISHED
    if not record.is_file():
        return None
    try:
        found = json.loads(record.read_bytes())
        steps, is_whole = int(found["steps"]), bool(found["stopped_early"])
        read_json(adapter / ADAPTER_CONFIG)
        check_hash(weights_in(adapter), "adapter")
    except (InvalidArgument, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"output_dir: '{adapter}' is damaged and will be written again ({one_line(error)})",
            stacklevel=2,
        )
        return None
    return steps if is_whole or steps >= max_train_steps else None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return a run's newest undamaged checkpoint, or None before its first one.

    Warns about newer ones that are damaged or missing.

    Raises:
        InvalidArgument: named "output_dir", if the run has lost its checkpoints: it is not started over.
    """
    found = checkpoint_folders(folder / CHECKPOINTS)
    checkpoint, damaged = latest_checkpoint(folder / CHECKPOINTS), len(found)
    last_saved = _step_in(folder / PROGRESS, "saved_step") or 0
    if checkpoint is not None and last_saved > step_of(found[0]):
        warnings.warn(
            f"output_dir: the checkpoint of step {last_saved} in '{folder}' is missing; the run resumes from "
            f"step {checkpoint.step}",
            stacklevel=2,
        )
    if checkpoint is None and (damaged or (folder / PROGRESS).is_file() or (folder / ADAPTER).is_dir()):
        saved = _saved_step(folder)
        what = "only damaged checkpoints" if damaged else "no checkpoints"
        raise InvalidArgument(
            "output_dir",
            "a run with an undamaged checkpoint to resume from",
            f"'{folder}', which has {what}" + (f" although it was saved at step {saved}" if saved else ""),
            "Restore its checkpoints, or train in a new folder with this run in adapter.start_from",
        )
    return checkpoint


def _saved_step(folder: Path) -> int | None:
    """The step of the last saved checkpoint or, for a finished run of an old version, its last step."""
    return _step_in(folder / PROGRESS, "saved_step") or _step_in(folder / ADAPTER / FINISHED, "steps")


def _step_in(file: Path, key: str) -> int | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(file.read_bytes())[key])
    return None


def write_config(config: TrainConfig) -> None:
    """Write the whole recipe into the folder, so that the run can be repeated from any directory."""
    write_text(Path(config.output_dir) / CONFIG, dump_config(without_secrets(with_absolute_paths(config))))


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the recipe with absolute paths of local files; names, Hub ids and URLs are unchanged."""
    base, adapter = config.base, config.adapter
    bundle = BUNDLED.get(base.path)
    if bundle is None:
        base = dataclasses.replace(base, path=_absolute(base.path), config=_absolute(base.config))
    if bundle is None or not bundle.has_adapter(adapter.start_from):
        adapter = dataclasses.replace(adapter, start_from=_absolute(adapter.start_from))
    data = dataclasses.replace(config.data, path=_absolute(config.data.path))
    return dataclasses.replace(config, base=base, adapter=adapter, data=data)


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path and os.path.exists(path) else path


@runtime_checkable
class Observer(Protocol):
    """Monitors a run between its steps. Its state, as JSON types, is saved in every checkpoint."""

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is kept because it may be exported; None for none."""

    def after_step(self, step: int) -> dict[str, Any]:
        """Return what to log. Called on every process with the number of finished steps."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""


class RunFolder:
    """Checkpoints and log of one run. Only the main process writes."""

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        identity: Mapping[str, object],
        accelerator: Accelerator,
        checkpoints: CheckpointOptions,
        observer: Observer | None,
    ) -> None:
        self.folder = folder
        self.state = state
        self.identity = json.loads(json.dumps(identity))  # the same types as in a checkpoint
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.observer = observer
        self.saved_step = 0
        self._is_whole: dict[str, bool] = {}  # checkpoint -> whether it is undamaged, as found or written
        self._is_proven = False  # whether a step with a finite gradient has followed the newest checkpoint
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the newest undamaged checkpoint, if there is one. Returns the number of finished steps.

        Raises:
            InvalidArgument: if it belongs to another run, or if the run has lost its checkpoints.
        """
        with warnings.catch_warnings():
            if not self.accelerator.is_main_process:
                warnings.simplefilter("ignore")  # one process warns about damaged ones
            checkpoint = newest_checkpoint(self.folder)
        step = 0
        if checkpoint is not None:
            self._check_same_run(checkpoint)
            self.state.restore(checkpoint, checkpoint.state["train"])
            if self.observer is not None:
                self.observer.restore(checkpoint.state["observer"])
            self.saved_step = step = checkpoint.step
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _forget_rows_after(step, self.folder / LOG)
        return step

    def save(self, step: int) -> None:
        """Write a checkpoint unless this step has one. Older ones are kept until `remove_old`."""
        if step == self.saved_step:
            return
        if self.accelerator.is_main_process:
            observed = {} if self.observer is None else self.observer.state()
            state = {
                "format_version": CHECKPOINT_FORMAT,
                "train": self.state.scalars(),
                "observer": observed,
                "identity": self.identity,
                "adapter": _adapter_config(self.state.module),
            }
            saved = save_checkpoint(self.folder / CHECKPOINTS, step, self.state.tensors(), state)
            write_json(self.folder / PROGRESS, {"saved_step": step})
            self._is_whole[saved.name] = True
        self.saved_step, self._is_proven = step, False
        self.accelerator.wait_for_everyone()

    def remove_old(self) -> None:
        """Remove the checkpoints that the newest one replaces, once its weights have proved healthy."""
        if self._is_proven:
            return
        self._is_proven = True
        if self.accelerator.is_main_process:
            best = None if self.observer is None else self.observer.best_step
            options = self.checkpoints
            folder = self.folder / CHECKPOINTS
            remove_old_checkpoints(folder, options.keep, options.keep_every, best, self._whole)

    def last_healthy(self) -> Path | None:
        """Return the newest undamaged checkpoint that a step with a finite gradient has followed, or None."""
        found = filter(self._whole, checkpoint_folders(self.folder / CHECKPOINTS))
        return next(found if self._is_proven else islice(found, 1, None), None)

    def _whole(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is undamaged. Its files are read once, or never if this run wrote them."""
        if checkpoint.name not in self._is_whole:
            self._is_whole[checkpoint.name] = damage(checkpoint) is None
        return self._is_whole[checkpoint.name]

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log; values that are not finite become null."""
        if self.accelerator.is_main_process:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            append_json_lines(self.folder / LOG, [finite])
            numbers = {name: value for name, value in finite.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=row["step"])

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        before, now = dict(checkpoint.state["identity"]), dict(self.identity)
        if _OLD_DATA in before:  # hashes of names, which say nothing about the content
            warnings.warn(
                f"output_dir: '{self.folder}' was written by an earlier version that did not record its "
                "data, so they cannot be compared",
                stacklevel=4,
            )
            for name in (_OLD_DATA, *_HASHES):
                before.pop(name, None), now.pop(name, None)
        key = differing(before, now)
        if key is not None and key in _CONTENTS:
            what = _CONTENTS[key]
            raise InvalidArgument(
                "output_dir",
                f"the {what} that the run in '{self.folder}' was started with",
                f"different {what}",
                _continue_hint(self.folder),
            )
        if key is not None:
            raise InvalidArgument(
                "output_dir",
                f"{key} = {identity_with_defaults(before).get(key)!r} as in '{checkpoint.folder}'",
                repr(identity_with_defaults(now).get(key)),
                f"Resume with the same settings, or train in a new folder. {_continue_hint(self.folder)}",
            )


def _adapter_config(module: nn.Module | Any) -> dict[str, Any]:
    """A module's config as JSON types, so that a checkpoint can be loaded alone; {} if it has none."""
    to_json = getattr(module, "to_json_string", None)
    return {} if to_json is None else dict(json.loads(to_json()))


def _forget_rows_after(step: int, log: Path) -> None:
    """Remove the rows of steps after the last checkpoint, which the resumed run repeats."""
    if not log.exists():
        return
    rows = read_json_lines(log, dict)
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    if kept.encode() != log.read_bytes():
        write_text(log, kept)
