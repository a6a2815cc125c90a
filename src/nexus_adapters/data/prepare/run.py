"""Making a prepared set, or going on where a run was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock, Timeout
from tqdm import tqdm

from nexus_adapters.data.prepare.folder import INDEX, PREVIEW, SKIPPED, SetFolder, as_json, write_json
from nexus_adapters.data.prepare.near_duplicates import find_near_duplicates
from nexus_adapters.data.prepare.plan import Plan
from nexus_adapters.data.prepare.preview import preview_page


@runtime_checkable
class Engine(Protocol):
    """What does the work of many shards, as `local.run_local`."""

    def __call__(
        self, plan: Plan, folder: SetFolder, step: str, shards: Iterable[int], progress: Callable[[int], None]
    ) -> None:
        """Do a step of `Worker` for these shards."""
        ...


@dataclass(frozen=True)
class Result:
    """What is in a set.

    Attributes:
        samples: in it.
        skipped: left out, by kind of reason.
        was_finished: whether there was nothing left to do.
    """

    samples: int
    skipped: Counter[str] = field(default_factory=Counter)
    was_finished: bool = False


def prepare(plan: Plan, out: Path, engine: Engine) -> Result:
    """Make the set in the folder `out`, or go on with it; a finished one is left as it is.

    However often it is stopped and by whatever engine it is made, equal settings give an equal set, byte for
    byte: numbered tars, index.json (counts, sizes, SHA-256, settings), skipped.jsonl (what was left out and
    why) and preview.html.

    Raises:
        ValueError: for a folder of other settings or with other files, one that another run is at work in, a
            map that cannot be drawn at all, and where no sample is left.
        OSError: where a worker was ended from outside; what is done is kept.
    """
    folder = SetFolder(out)
    settings = plan.settings()
    if (out / INDEX).exists():
        return _finished(folder, settings)
    plan.try_extractors()
    _check_place(folder)
    folder.unfinished.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.unfinished / "lock", timeout=0):
            if (out / INDEX).exists():  # which another run has finished meanwhile
                return _finished(folder, settings)
            _begin(folder, settings)
            if plan.filters.near_duplicates is not None and not folder.duplicates.exists():
                _search_duplicates(plan, folder, engine, plan.filters.near_duplicates)
            _do("write", plan, folder, engine, folder.is_written)
            result = _finish(plan, folder, settings)
            folder.clear()
            return result
    except Timeout as error:
        raise ValueError(
            f"out: expected a folder that no other run is at work in; received '{out}'"
        ) from error


def _check_place(folder: SetFolder) -> None:
    """ValueError for a file, and for a folder with files of something else."""
    if folder.settings.exists():
        return
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"out: expected a folder; received '{folder.path}', which is a file")
    ours = (folder.unfinished, folder.path / SKIPPED)  # the latter of a run that found nothing usable
    if folder.path.exists() and any(path not in ours for path in folder.path.iterdir()):
        raise ValueError(
            f"out: expected a new or empty folder; received '{folder.path}', which has other files"
        )


def _begin(folder: SetFolder, settings: dict[str, Any]) -> None:
    """Note the settings, or check that they are those by which it was begun. The folder must be locked."""
    if folder.settings.exists():
        _check_same(json.loads(folder.settings.read_text(encoding="utf-8")), settings, folder.path)
    else:
        write_json(folder.settings, settings)


def _finished(folder: SetFolder, settings: dict[str, Any]) -> Result:
    try:
        index = json.loads((folder.path / INDEX).read_text(encoding="utf-8"))
        begun, samples, counts = index["settings"], index["samples"], Counter(index["skipped"])
        version = begun["version"]
    except (ValueError, KeyError, TypeError) as error:
        received = f"'{folder.path}', which has another's {INDEX}"
        raise ValueError(f"out: expected a new or empty folder; received {received}") from error
    _check_same(begun, settings | {"version": version}, folder.path)
    folder.clear()  # which a stop at the very end may have left
    return Result(samples, counts, was_finished=True)


def _check_same(begun: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ValueError for the first setting that differs."""
    for name in now:
        if begun.get(name) != now[name]:
            expected = json.dumps(begun.get(name), ensure_ascii=False)
            received = json.dumps(now[name], ensure_ascii=False)
            raise ValueError(f"{name}: expected {expected}, by which '{path}' was begun; received {received}")


def _search_duplicates(plan: Plan, folder: SetFolder, engine: Engine, distance: int) -> None:
    _do("survey", plan, folder, engine, folder.is_surveyed)
    hashes, has_hash = folder.read_hashes(plan.shards, len(plan))
    folder.write_duplicates(find_near_duplicates(hashes, has_hash, distance))


def _do(step: str, plan: Plan, folder: SetFolder, engine: Engine, is_done: Callable[[int], bool]) -> None:
    """A step for all shards that are not done, with a bar over their samples."""
    done = sum(len(plan.indices(shard)) for shard in range(plan.shards) if is_done(shard))
    open_shards = (shard for shard in range(plan.shards) if not is_done(shard))
    title = {"survey": "hashing images", "write": "preparing"}[step]
    with tqdm(total=len(plan), initial=done, desc=title, unit="sample", delay=1, disable=None) as bar:
        engine(plan, folder, step, open_shards, bar.update)


def _finish(plan: Plan, folder: SetFolder, settings: dict[str, Any]) -> Result:
    """Write what is told of the whole; the index last, since it says that all is there."""
    shards, counts = [], Counter[str]()
    part = folder.unfinished / SKIPPED
    with part.open("w", encoding="utf-8", newline="\n") as lines:
        for record in folder.records(plan.shards):
            for skipped in record.pop("skipped"):
                counts[skipped["kind"]] += 1
                lines.write(json.dumps(skipped, ensure_ascii=False) + "\n")
            if record["samples"]:
                shards.append(record)
    part.replace(folder.path / SKIPPED)
    samples = sum(shard["samples"] for shard in shards)
    if not samples:
        folder.clear()  # so that a mended source is read anew
        raise ValueError(
            f"SOURCE: expected a usable sample; received none of {len(plan)} ({_shown(counts)}; "
            f"{folder.path / SKIPPED})"
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
    folder.publish(INDEX, as_json(index))
    return Result(samples, counts)


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
