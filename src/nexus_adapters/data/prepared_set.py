"""The folder of a prepared set, which `nexus prepare` writes and training reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from nexus_adapters.choices import IMAGE_FORMATS
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.listing import OUTSIDE_HINT, leaves_folder
from nexus_adapters.data.samples import BadSample, Sample, file_stamp
from nexus_adapters.data.tar_index import CAPTIONS
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument, is_unicode, one_line
from nexus_adapters.files import (
    append_json_lines,
    file_sha256,
    read_json_lines,
    read_regular,
    replacing,
    write_json,
)
from nexus_adapters.progress import progress

INDEX, SKIPPED, PREVIEW = "index.json", "skipped.jsonl", "preview.html"
_UNFINISHED = ".unfinished"
_SETTINGS = "settings.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_VERIFIED = "verified.jsonl"  # stamps of shards whose SHA-256 was found to match their index


@dataclass(frozen=True)
class SetFolder:
    """A set's folder while the set is being made. Files that are not part of the set are in `.unfinished`."""

    path: Path

    @property
    def unfinished(self) -> Path:
        """The folder that is deleted when the set is finished."""
        return self.path / _UNFINISHED

    @property
    def settings(self) -> Path:
        """The file with the settings of the set."""
        return self.unfinished / _SETTINGS

    @property
    def duplicates(self) -> Path:
        """The file with, for each sample of the source, the earlier one that it nearly duplicates, or -1."""
        return self.unfinished / "near_duplicates.npy"

    def shard(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.path / f"{number:05d}.tar"

    def is_written(self, number: int) -> bool:
        """Return whether the shard is finished."""
        return self._record(number).exists()

    def is_surveyed(self, number: int) -> bool:
        """Return whether the shard's images have been hashed."""
        return self._hashes(number).exists()

    def write_record(self, number: int, record: Mapping[str, Any]) -> None:
        """Record that a shard is finished. Its tar must exist."""
        write_json(self._record(number), record)

    def records(self, shards: int) -> Iterator[dict[str, Any]]:
        """Yield the records of all shards, in order."""
        for number in range(shards):
            yield json.loads(self._record(number).read_text(encoding="utf-8"))

    def write_hashes(self, number: int, hashes: Mapping[int, int], indices: range) -> None:
        """Write the hashes of a shard's images by index; images that other filters drop have none."""
        rows = np.zeros(len(indices), [("hash", np.uint64), ("has_hash", np.bool_)])
        for index, value in hashes.items():
            rows[index - indices.start] = value, True
        _write_array(self._hashes(number), rows)

    def read_hashes(
        self, shards: int, samples: int
    ) -> tuple[UInt64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the hashes of all samples, and which samples have one."""
        hashes, has_hash, first = np.zeros(samples, np.uint64), np.zeros(samples, bool), 0
        for number in range(shards):
            rows = np.load(self._hashes(number))
            hashes[first : first + len(rows)] = rows["hash"]
            has_hash[first : first + len(rows)] = rows["has_hash"]
            first += len(rows)
        return hashes, has_hash

    def write_duplicates(self, nearest: Int[np.ndarray, " n"]) -> None:
        """Write what `find_near_duplicates` returned."""
        _write_array(self.duplicates, nearest)

    def read_duplicates(self) -> Int[np.ndarray, " n"]:
        """Return what `write_duplicates` wrote, memory-mapped."""
        return np.asarray(np.load(self.duplicates, mmap_mode="r"))

    def publish(self, name: str, text: str) -> None:
        """Write a text file of the set atomically."""
        with replacing(self.path / name, self.unfinished) as stream:
            stream.write(text.encode())

    def clear(self) -> None:
        """Delete the folder `unfinished`."""
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _record(self, number: int) -> Path:
        return self.unfinished / f"{number:05d}.json"

    def _hashes(self, number: int) -> Path:
        return self.unfinished / f"{number:05d}.npy"


def _write_array(file: Path, rows: np.ndarray) -> None:
    with replacing(file) as stream:
        np.save(stream, rows)


class PreparedSource(TarSource):
    """The samples of a prepared set, with the sizes that their images had before they were fitted to it.

    The crop follows from that size by `Geometry`, which also fitted the images of the set.
    """

    def content_hash(self, index: int) -> str:
        """Return the SHA-256 of image, structure map, captions and original size. Raises BadSample."""
        made_of = [super().content_hash(index), self._original_size(index)]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def stamp(self, index: int) -> str:
        """Return the stamp of the sample in its tar, marked because it stands for a different hash."""
        return json.dumps(["prepared", super().stamp(index)])

    def load(self, index: int) -> Sample:
        """Decode a sample. Raises BadSample."""
        return replace(super().load(index), original_size=self._original_size(index))

    def _original_size(self, index: int) -> tuple[int, int] | None:
        """(width, height); None if it is missing, as in sets whose JSON was written by another program."""
        try:
            width, height = json.loads(self._read(index, CAPTIONS))["original_size"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None  # also for damaged JSON, which `load` rejects
        is_size = all(isinstance(side, int) and side > 0 for side in (width, height))
        return (width, height) if is_size else None

    def warn_of_lost_sizes(self) -> None:
        """Warn if the first sample has no original size; the others then have none, either."""
        try:
            size = self._original_size(0)
        except BadSample:  # reported when it is read
            return
        if size is None:
            warnings.warn(
                f"data.path: '{self.key(0)}' has no original_size; SDXL is trained as if images had not been "
                "resized or cropped. Prepare the set again to record the sizes",
                stacklevel=3,
            )


def open_prepared(
    folder: str | os.PathLike[str],
    condition_name: str,
    index_folder: str | os.PathLike[str],
    *,
    allow_outside: bool = False,
) -> PreparedSource:
    """Open the samples of a prepared set with one of its maps.

    Args:
        folder: the set's folder.
        condition_name: the extractor that made the map.
        index_folder: where `TarSource` keeps its indices, next to a list of shards whose SHA-256 was
            verified.
        allow_outside: allow the index to name shards outside the folder.

    Raises:
        InvalidArgument: for a folder without an index (an unfinished set, or something else), a map that the
            set does not have, shards that are missing or outside the folder, and shards whose size or SHA-256
            differs from the index.
    """
    path = Path(folder)
    index = _read_index(path)
    index.check_has(condition_name, path)
    files = [path / shard.file for shard in index.shards]
    for shard, file in zip(index.shards, files, strict=True):
        if leaves_folder(shard.file) and not allow_outside:
            raise InvalidArgument(
                "folder", "shards in the folder", f"'{shard.file}' in {INDEX}", OUTSIDE_HINT
            )
        if not file.is_file() or file.stat().st_size != shard.size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise InvalidArgument("folder", f"'{file}' with {shard.size} bytes", found)
    _check_hashes(dict(zip(files, (shard.sha256 for shard in index.shards), strict=True)), Path(index_folder))
    source = PreparedSource(
        [str(file) for file in files],
        image_column=index.image_format,
        condition_column=f"{condition_name}.png",
        caption_column="json:captions",
        index_folder=index_folder,
        extracted=[f"{name}.png" for name in index.conditions],
    )
    source.warn_of_lost_sizes()
    return source


def _check_hashes(expected: Mapping[Path, str], kept: Path) -> None:
    """Raise `InvalidArgument` for a shard with another SHA-256. Each is read once, until it changes."""
    verified = set(read_json_lines(kept / _VERIFIED, str))
    stamps = {file: json.dumps([*file_stamp(file), sha256]) for file, sha256 in expected.items()}
    unknown = [file for file, stamp in stamps.items() if stamp not in verified]
    for file in progress(unknown, what="checking shards", unit="shard", delay=2):
        if (found := file_sha256(file)) != expected[file]:
            raise InvalidArgument(
                "folder", f"'{file}' with SHA-256 {expected[file]}", found, "It has changed or is damaged"
            )
        append_json_lines(kept / _VERIFIED, [stamps[file]])


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder has the index file that `open_prepared` reads. Its content is not checked."""
    return (Path(folder) / INDEX).is_file()


def options_of(folder: str | os.PathLike[str], condition_name: str) -> dict[str, Any]:
    """Return the options used to extract a set's maps. Raises `InvalidArgument` as `open_prepared`."""
    index = _read_index(Path(folder))
    index.check_has(condition_name, Path(folder))
    return dict(index.conditions[condition_name])


def geometry_of(folder: str | os.PathLike[str]) -> Geometry | None:
    """Return what a set's images were fitted to; None if they kept their own sizes.

    Raises `InvalidArgument` as `open_prepared`.
    """
    return _read_index(Path(folder)).geometry


@dataclass(frozen=True)
class _ShardEntry:
    """A shard in the index: its path in the folder, its size in bytes, and its SHA-256 in hex."""

    file: str
    size: int
    sha256: str

    @classmethod
    def of(cls, found: Any) -> _ShardEntry:
        """Parse JSON; raises the same errors as `_Index.of`."""
        file, size, sha256 = found["file"], found["bytes"], found["sha256"]
        is_name = isinstance(file, str) and file != "" and "\0" not in file
        _need(is_name and is_unicode(file), "the name of a shard", file)
        _need(_is_count(size), "a shard's size in bytes", size)
        is_hash = isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None
        _need(is_hash, "a shard's SHA-256", sha256)
        return cls(file, size, sha256)


@dataclass(frozen=True)
class _Index:
    """The content of a set's index.

    Attributes:
        conditions: name of each map -> the options that it was extracted with.
        image_format: the extension of the images.
        geometry: what the images were fitted to; None if they kept their own sizes.
        shards: the shards in order, at least one.
    """

    conditions: Mapping[str, Mapping[str, Any]]
    image_format: str
    geometry: Geometry | None
    shards: tuple[_ShardEntry, ...]

    @classmethod
    def of(cls, content: Any) -> _Index:
        """Parse JSON. Raises ValueError, KeyError or TypeError for what `nexus prepare` does not write."""
        names, settings, shards = content["conditions"], content["settings"], content["shards"]
        image_format = content["image_format"]
        _need(isinstance(names, list) and bool(names), "a list of conditions", names)
        _need(all(isinstance(name, str) and name != "" for name in names), "names of conditions", names)
        _need(
            image_format in IMAGE_FORMATS, f"image_format as one of {', '.join(IMAGE_FORMATS)}", image_format
        )
        _need(isinstance(settings, dict), "settings", settings)
        options = settings["conditions"]
        _need(isinstance(options, dict), "options of conditions", options)
        for name in names:
            _need(isinstance(options.get(name), dict), f"options of {name}", options.get(name))
        _need(isinstance(shards, list) and bool(shards), "a list of shards", shards)
        entries = tuple(map(_ShardEntry.of, shards))
        _need(len({entry.file for entry in entries}) == len(entries), "each shard once", shards)
        conditions = {name: options[name] for name in names}
        return cls(conditions, image_format, _geometry(settings.get("geometry")), entries)

    def check_has(self, condition_name: str, folder: Path) -> None:
        """Raise `InvalidArgument` for a map that the set does not have."""
        if condition_name not in self.conditions:
            names = ", ".join(self.conditions)
            raise InvalidArgument(
                "condition_name", f"one of the maps in '{folder}' ({names})", f"'{condition_name}'"
            )


def _geometry(found: Any) -> Geometry | None:
    if found is None:
        return None
    buckets = tuple((width, height) for width, height in found["buckets"])
    sides = [found["width"], found["height"], *(side for bucket in buckets for side in bucket)]
    _need(all(_is_count(side) and side > 0 for side in sides), "sizes in pixels", found)
    return Geometry(found["width"], found["height"], buckets)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _need(fits: bool, what: str, received: object) -> None:
    if not fits:
        raise ValueError(f"it needs {what} but has {json.dumps(received)[:100]}")


def _read_index(path: Path) -> _Index:
    if not is_prepared(path):
        is_begun = (path / _UNFINISHED).exists()
        raise InvalidArgument(
            "folder",
            "a finished set made by nexus prepare",
            f"'{path}', which is not finished" if is_begun else f"'{path}', which has no {INDEX}",
            "Run the same nexus prepare command again to finish it" if is_begun else "",
        )
    try:
        return _Index.of(json.loads(read_regular(path / INDEX)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise InvalidArgument(
            "folder", f"an {INDEX} written by nexus prepare", f"'{path / INDEX}' ({reason})"
        ) from error
