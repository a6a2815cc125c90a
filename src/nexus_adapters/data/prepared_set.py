"""The folder of a prepared set, as `nexus prepare` writes it and as training reads it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.listing import OUTSIDE_HINT, leaves_folder
from nexus_adapters.data.samples import BadSample, Sample, file_stamp
from nexus_adapters.data.tar_index import CAPTIONS
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument
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
_VERIFIED = "verified.jsonl"  # stamps of shards that have the SHA-256 of their index


@dataclass(frozen=True)
class SetFolder:
    """A set's folder while the set is made. Whatever is not part of the set is in `.unfinished`."""

    path: Path

    @property
    def unfinished(self) -> Path:
        """The folder of what is deleted when the set is finished."""
        return self.path / _UNFINISHED

    @property
    def settings(self) -> Path:
        """The settings that the set is made with."""
        return self.unfinished / _SETTINGS

    @property
    def duplicates(self) -> Path:
        """For each sample of the source, the earlier one that it nearly duplicates, or -1."""
        return self.unfinished / "near_duplicates.npy"

    def shard(self, number: int) -> Path:
        """The path of a shard."""
        return self.path / f"{number:05d}.tar"

    def is_written(self, number: int) -> bool:
        """Whether the shard is finished."""
        return self._record(number).exists()

    def is_surveyed(self, number: int) -> bool:
        """Whether the shard's images have been hashed."""
        return self._hashes(number).exists()

    def write_record(self, number: int, record: Mapping[str, Any]) -> None:
        """Record that a shard is finished. Its tar must exist."""
        write_json(self._record(number), record)

    def records(self, shards: int) -> Iterator[dict[str, Any]]:
        """The records of all shards, in order."""
        for number in range(shards):
            yield json.loads(self._record(number).read_text(encoding="utf-8"))

    def write_hashes(self, number: int, hashes: Mapping[int, int], indices: range) -> None:
        """Write the hashes of a shard's images, by index; images that other filters leave out have none."""
        rows = np.zeros(len(indices), [("hash", np.uint64), ("has_hash", np.bool_)])
        for index, value in hashes.items():
            rows[index - indices.start] = value, True
        _write_array(self._hashes(number), rows)

    def read_hashes(
        self, shards: int, samples: int
    ) -> tuple[UInt64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """The hashes of all samples, and which samples have one."""
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
        """Read them from the file when they are used, without memory for all."""
        return np.asarray(np.load(self.duplicates, mmap_mode="r"))

    def publish(self, name: str, text: str) -> None:
        """Write a text file of the set, whole or not at all."""
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

    What was cut away follows from that size by `Geometry`, which also fitted the images of the set.
    """

    def content_hash(self, index: int) -> str:
        """SHA-256 over image, structure map, captions and original size. BadSample."""
        made_of = [super().content_hash(index), self._original_size(index)]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def stamp(self, index: int) -> str:
        """As of any tar, but for other hashes."""
        return json.dumps(["prepared", super().stamp(index)])

    def load(self, index: int) -> Sample:
        """Decode a sample. BadSample."""
        return replace(super().load(index), original_size=self._original_size(index))

    def _original_size(self, index: int) -> tuple[int, int] | None:
        """None where it is not stated, as by sets whose JSON another program has written."""
        try:
            width, height = json.loads(self._read(index, CAPTIONS))["original_size"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None  # damaged JSON, too, which `load` refuses
        is_size = all(isinstance(side, int) and side > 0 for side in (width, height))
        return (width, height) if is_size else None

    def warn_of_lost_sizes(self) -> None:
        """Warn where the first sample does not state its size: nor will the others."""
        try:
            size = self._original_size(0)
        except BadSample:  # which is reported when it is read
            return
        if size is None:
            warnings.warn(
                f"data.path: '{self.key(0)}' does not state its original_size; SDXL is trained as if images "
                "had not been resized or cropped. Prepare the set again to keep the sizes",
                stacklevel=3,
            )


def open_prepared(
    folder: str | os.PathLike[str],
    condition_name: str,
    index_folder: str | os.PathLike[str],
    *,
    allow_outside: bool = False,
) -> PreparedSource:
    """The samples of a prepared set with one of its maps.

    Args:
        folder: of the set.
        condition_name: of the extractor that made the map.
        index_folder: where `TarSource` keeps its indices; and a list of the shards whose hash is known to be
            that of the index.
        allow_outside: whether the index may name shards outside the folder.

    Raises:
        InvalidArgument: for a folder without an index (an unfinished set, or something else), a map that the
            set does not have, and shards that are missing or outside, or whose size or SHA-256 differs from
            the index.
    """
    path = Path(folder)
    index = _read_index(path)
    conditions, shards = index["conditions"], index["shards"]
    if condition_name not in conditions:
        raise InvalidArgument(
            "condition_name", f"one of {', '.join(conditions)}, as '{folder}' has", f"'{condition_name}'"
        )
    files = [path / shard["file"] for shard in shards]
    for shard, file in zip(shards, files, strict=True):
        size = shard["bytes"]
        if leaves_folder(shard["file"]) and not allow_outside:
            raise InvalidArgument(
                "folder", "shards in the folder", f"'{shard['file']}' in {INDEX}", OUTSIDE_HINT
            )
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise InvalidArgument("folder", f"'{file}' of {size} bytes", found)
    _check_hashes(dict(zip(files, (shard["sha256"] for shard in shards), strict=True)), Path(index_folder))
    source = PreparedSource(
        [str(file) for file in files],
        image_column=index["image_format"],
        condition_column=f"{condition_name}.png",
        caption_column="json:captions",
        index_folder=index_folder,
        extracted=True,
    )
    source.warn_of_lost_sizes()
    return source


def _check_hashes(expected: Mapping[Path, str], kept: Path) -> None:
    """InvalidArgument for a shard whose SHA-256 is another; each is read once, until it changes."""
    verified = set(read_json_lines(kept / _VERIFIED, str))
    stamps = {file: json.dumps([*file_stamp(file), sha256]) for file, sha256 in expected.items()}
    unknown = [file for file, stamp in stamps.items() if stamp not in verified]
    for file in progress(unknown, what="checking shards", unit="shard", delay=2):
        if (found := file_sha256(file)) != expected[file]:
            raise InvalidArgument(
                "folder", f"'{file}' of SHA-256 {expected[file]}", found, "It has changed or is damaged"
            )
        append_json_lines(kept / _VERIFIED, [stamps[file]])


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder has the index file that `open_prepared` reads; its content is not checked."""
    return (Path(folder) / INDEX).is_file()


def options_of(folder: str | os.PathLike[str], condition_name: str) -> dict[str, Any]:
    """The options that a set's maps were extracted with. InvalidArgument as `open_prepared`."""
    options: dict[str, Any] = _read_index(Path(folder))["settings"]["conditions"][condition_name]
    return options


def geometry_of(folder: str | os.PathLike[str]) -> Geometry | None:
    """What a set's images were fitted to; None where they kept their own sizes.

    InvalidArgument as `open_prepared`, and for sizes that `nexus prepare` cannot have written.
    """
    found = _read_index(Path(folder))["settings"].get("geometry")
    if found is None:
        return None
    try:
        return Geometry(found["width"], found["height"], tuple((w, h) for w, h in found["buckets"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            "folder", f"an {INDEX} written by nexus prepare", f"'{Path(folder) / INDEX}' ({error})"
        ) from error


def _read_index(path: Path) -> dict[str, Any]:
    if not is_prepared(path):
        is_begun = (path / _UNFINISHED).exists()
        raise InvalidArgument(
            "folder",
            "a finished set of nexus prepare",
            f"'{path}', which is not finished" if is_begun else f"'{path}', which has no {INDEX}",
            "Run the same nexus prepare command again to finish it" if is_begun else "",
        )
    try:
        index: dict[str, Any] = json.loads(read_regular(path / INDEX))
        for key in ("conditions", "image_format", "shards", "settings"):
            index[key]
        for shard in index["shards"]:
            if not (isinstance(shard["file"], str) and isinstance(shard["sha256"], str)):
                raise TypeError(f"a shard is {json.dumps(shard)[:100]}")
            shard["bytes"]
        if not all(isinstance(name, str) for name in (*index["conditions"], index["image_format"])):
            raise TypeError("names that are no strings")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
        raise InvalidArgument(
            "folder", f"an {INDEX} written by nexus prepare", f"'{path / INDEX}' ({reason})"
        ) from error
    return index
