"""Make a prepared set, or resume an interrupted run of the same command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nexus_adapters.data.prepared_set import INDEX, PREVIEW, SKIPPED, SetFolder
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import lock, replacing, write_json
from nexus_adapters.prepare.filters import find_near_duplicates
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.preview import preview_page
from nexus_adapters.progress import progress


@runtime_checkable
class Engine(Protocol):
    """Runs the workers, as `engines.run_local` does."""

    def __call__(
        self, plan: Plan, folder: SetFolder, step: str, shards: Iterable[int], progress: Callable[[int], None]
    ) -> None:
        """Run a step of `Worker` for these shards."""
        ...


@dataclass(frozen=True)
class Result:
    """The content of a set.

    Attributes:
        samples: number of samples.
        skipped: number of dropped samples, by kind of reason.
        was_finished: whether the set was already finished.
    """

    samples: int
    skipped: Counter[str] = field(default_factory=Counter)
    was_finished: bool = False

    @property
    def left_out(self) -> str:
        """The number of dropped samples as text, with the kinds of reasons."""
        total = self.skipped.total()
        return f"{total} sample{'' if total == 1 else 's'} ({_shown(self.skipped)})"


def prepare(plan: Plan, out: Path, engine: Engine) -> Result:
    """Make the set in the folder `out`, or resume an interrupted run. A finished set is not changed.

    The set consists of numbered tars, index.json (counts, sizes, SHA-256, settings), skipped.jsonl (dropped
    samples with reasons) and preview.html. With equal settings it is the same, byte for byte, with any engine
    and however often it is interrupted.

    Raises:
        InvalidArgument: for a folder with other settings or other files, a finished set with a missing shard
            or one of another size, a folder that another run is using, a map that can never be extracted, or
            if no sample is left.
        OSError: if a worker was killed; finished shards are kept.
    """
    folder = SetFolder(out)
    settings = plan.settings()
    if (out / INDEX).exists():
        return _finished(folder, settings)
    plan.try_extractors()
    _check_place(folder)
    with lock(folder.unfinished / "lock", wait=False) as is_ours:
        if not is_ours:
            raise InvalidArgument("out", "a folder that no other run is using", f"'{out}'")
        if (out / INDEX).exists():  # another run has finished it in the meantime
            return _finished(folder, settings)
        _begin(folder, settings)
        if plan.filters.near_duplicates is not None and not folder.duplicates.exists():
            _search_duplicates(plan, folder, engine, plan.filters.near_duplicates)
        _do("write", plan, folder, engine, folder.is_written)
        result = _finish(plan, folder, settings)
        folder.clear()
        return result


def check_out(folder: SetFolder, settings: dict[str, Any]) -> None:
    """Raise `InvalidArgument` if `prepare` could not start or resume this set here. Writes nothing."""
    if (folder.path / INDEX).exists():
        _read_finished(folder, settings)
        return
    _check_place(folder)
    if folder.settings.exists():
        _check_same(_read_settings(folder), settings, folder.path)


def _check_place(folder: SetFolder) -> None:
    """Raise `InvalidArgument` for a file, and for a folder with other files."""
    if folder.settings.exists():
        return
    if folder.path.exists() and not folder.path.is_dir():
        raise InvalidArgument("out", "a folder", f"'{folder.path}', which is a file")
    ours = (folder.unfinished, folder.path / SKIPPED)  # the latter from a run without any usable sample
    if folder.path.exists() and any(path not in ours for path in folder.path.iterdir()):
        raise InvalidArgument("out", "a new or empty folder", f"'{folder.path}', which contains other files")


def _begin(folder: SetFolder, settings: dict[str, Any]) -> None:
    """Write the settings, or check that the set was started with them. The folder must be locked."""
    if folder.settings.exists():
        _check_same(_read_settings(folder), settings, folder.path)
    else:
        write_json(folder.settings, settings)


def _read_settings(folder: SetFolder) -> dict[str, Any]:
    """The settings that a set was started with."""
    found: dict[str, Any] = json.loads(folder.settings.read_text(encoding="utf-8"))
    return found


def _finished(folder: SetFolder, settings: dict[str, Any]) -> Result:
    result = _read_finished(folder, settings)
    folder.clear()  # it remains if a run was interrupted after the index was written
    return result


def _read_finished(folder: SetFolder, settings: dict[str, Any]) -> Result:
    """The content of a finished set. Raises `InvalidArgument` for other settings or a missing shard."""
    try:
        index = json.loads((folder.path / INDEX).read_text(encoding="utf-8"))
        begun, samples, counts = index["settings"], index["samples"], Counter(index["skipped"])
        version = begun["version"]
        sizes = {folder.path / shard["file"]: shard["bytes"] for shard in index["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(
            "out", "a new or empty folder", f"'{folder.path}', which has an {INDEX} of something else"
        ) from error
    _check_same(begun, settings | {"version": version}, folder.path)
    for file, size in sizes.items():
        found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
        if found != f"{size} bytes":
            hint = f"To make the set again, delete '{folder.path}' and rerun the command"
            raise InvalidArgument("out", f"'{file}' with {size} bytes, as in {INDEX}", found, hint)
    return Result(samples, counts, was_finished=True)


def _check_same(begun: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise `InvalidArgument` for a setting that differs, such as `captions` or `filters.min_side`."""
    before, after = dict(_flat(begun)), dict(_flat(now))
    differing = [name for name in before | after if before.get(name) != after.get(name)]
    if not differing:
        return
    name = min(differing, key=_is_derived)  # prefer settings of the user to derived ones
    old, new = _value(before.get(name)), _value(after.get(name))
    hint = "Choose a new folder to make another set"
    if name in ("format", "version"):
        raise InvalidArgument(
            "out", f"a set started with {name} {new} of nexus-adapters", f"'{path}', started with {old}", hint
        )
    if name == "source.samples":
        raise InvalidArgument("source", f"{old} samples as in '{path}'", f"{new} samples", hint)
    if name.startswith("source.") and _is_derived(name):
        raise InvalidArgument("source", f"the samples that '{path}' was started with", "other samples", hint)
    if name.startswith("models."):
        model = f"conditions.{name.removeprefix('models.')}.model"
        raise InvalidArgument(model, f"the weights that '{path}' was started with", "other weights", hint)
    raise InvalidArgument(name, f"{old} as in '{path}'", new, hint)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each setting; those in a group are named `group.name`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if name == "conditions":
                yield name, ", ".join(value)
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_derived(name: str) -> bool:
    """Whether a setting is computed from the source or a model instead of set by the user."""
    return name.endswith("sha256") or name == "source.samples" or name.startswith("models.")


def _value(value: object) -> str:
    """A setting's value for a message."""
    if value is None:
        return "no value"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _search_duplicates(plan: Plan, folder: SetFolder, engine: Engine, distance: int) -> None:
    _do("survey", plan, folder, engine, folder.is_surveyed)
    hashes, has_hash = folder.read_hashes(plan.shards, len(plan))
    folder.write_duplicates(find_near_duplicates(hashes, has_hash, distance))


def _do(step: str, plan: Plan, folder: SetFolder, engine: Engine, is_done: Callable[[int], bool]) -> None:
    """Run a step for all shards that are not done, with a progress bar over their samples."""
    done = sum(len(plan.indices(shard)) for shard in range(plan.shards) if is_done(shard))
    open_shards = (shard for shard in range(plan.shards) if not is_done(shard))
    title = {"survey": "hashing images", "write": "preparing samples"}[step]
    with progress(what=title, unit="sample", total=len(plan), initial=done, delay=1) as bar:
        engine(plan, folder, step, open_shards, bar.update)


def _finish(plan: Plan, folder: SetFolder, settings: dict[str, Any]) -> Result:
    """Write the files about the whole set, the index last because it marks the set as finished."""
    shards, counts = [], Counter[str]()
    with replacing(folder.path / SKIPPED, folder.unfinished) as lines:
        for record in folder.records(plan.shards):
            for skipped in record.pop("skipped"):
                counts[skipped["kind"]] += 1
                lines.write(json.dumps(skipped, ensure_ascii=False).encode() + b"\n")
            if record["samples"]:
                shards.append(record)
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        folder.clear()  # so that the next run reads the source again
        raise InvalidArgument(
            "source",
            "at least one usable sample",
            f"{len(plan)} samples, all of them left out ({_shown(counts)})",
            f"'{folder.path / SKIPPED}' lists them with the reasons",
        )
    files = [(folder.path / shard["file"], shard["samples"]) for shard in shards]
    summary = f"Samples: {samples}. Shards: {len(shards)}. Left out: {_shown(counts)}."
    folder.publish(PREVIEW, preview_page(files, list(plan.conditions), plan.image_format, summary))
    index = {
        "samples": samples,
        "skipped": dict(sorted(counts.items())),
        "conditions": list(plan.conditions),
        "image_format": plan.image_format,
        "settings": settings,
        "shards": shards,
    }
    folder.publish(INDEX, json.dumps(index, ensure_ascii=False, indent=1) + "\n")
    return Result(samples, counts)


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
