"""The kinds of datasets that can be a source: detect the kind of a path, and open it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_adapters.choices import SourceKind
from nexus_adapters.data.coco import CocoSource
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.samples import Source
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import cache_folder, open_regular, read_regular

_NAMED = ("split", "config_name", "revision", "image_column", "caption_column")
_SCENES = "scenes"
_LONGEST_LINE = 2**20  # characters of a table's first line
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_LISTS = (".txt",)  # extensions of lists of URLs, besides tables


@dataclass(frozen=True)
class SourceOptions:
    """A dataset as the user specifies it.

    Attributes:
        path: a folder, tars, a dataset on the Hub, or "scenes".
        kind: kind of dataset; "auto" to detect it.
        split: split of a table or of COCO; "" for "train" or "train2017".
        config_name: configuration of a table that has several.
        revision: branch, tag or commit of a table on the Hub.
        image_column: name of the image column or tar member; "" for the kind's default.
        caption_column: name of the caption column or tar member, likewise.
        count: number of scenes.
        index_folder: where indices of tars are kept.
        with_captions: False ignores captions: every sample has the empty caption.
        allow_outside: allow the dataset to refer to files outside its folder.
    """

    path: str
    kind: SourceKind = "auto"
    split: str = ""
    config_name: str = ""
    revision: str = ""
    image_column: str = ""
    caption_column: str = ""
    count: int = 0
    index_folder: Path = field(default_factory=lambda: cache_folder() / "prepare")
    with_captions: bool = True
    allow_outside: bool = False


def open_source(options: SourceOptions) -> tuple[Source, str]:
    """Open a source. Returns it with the prefix of its keys that can be removed: its folder, or "".

    Raises:
        InvalidArgument: for a path of no known kind, such as a list of URLs, and for all that the source
            rejects.
    """
    kind = find_kind(options.path) if options.kind == "auto" else options.kind
    _check_options(options, kind)
    if kind != "scenes" and Path(options.path).exists():  # for workers with another working directory
        options = replace(options, path=os.path.abspath(options.path))
    opened: dict[str, Callable[[SourceOptions], tuple[Source, str]]] = {
        "folder": _open_folder,
        "coco": _open_coco,
        "table": _open_table,
        "tars": _open_tars,
        "scenes": lambda options: (SceneSource(options.count), ""),
    }
    return opened[kind](options)


def source_settings(options: SourceOptions, source: Source) -> dict[str, Any]:
    """Return what identifies a source's samples besides their names: columns, splits, a hash of its listing.

    The listing is a folder's metadata, COCO's annotations, a table's fingerprint, or the sizes of local tars.
    Images are not read.
    """
    kind = find_kind(options.path) if options.kind == "auto" else options.kind
    named = {name: getattr(options, name) for name in _NAMED if getattr(options, name)}
    return {
        "kind": kind,
        **named,
        "listing_sha256": hashlib.sha256(_listing(kind, options, source)).hexdigest(),
    }


def _listing(kind: SourceKind, options: SourceOptions, source: Source) -> bytes:
    place = Path(options.path)
    if isinstance(source, FolderSource):
        return b"".join(read_regular(file) for file in source.metadata)
    if kind == "coco":
        return read_regular(place / "annotations" / f"captions_{options.split or 'train2017'}.json")
    if kind == "table":
        return str(getattr(source, "fingerprint", "")).encode()
    if kind == "tars" and "://" not in options.path:
        files = sorted(place.glob("*.tar")) if place.is_dir() else [place] if place.is_file() else []
        return repr([(file.name, file.stat().st_size) for file in files]).encode()
    return b""


def find_kind(path: str) -> SourceKind:
    """Return the kind of dataset at a path. Raises `InvalidArgument` if there is none."""
    place = Path(path)
    if path == _SCENES:
        return "scenes"
    if place.is_dir():
        if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
            return "table"
        if any(place.glob("annotations/captions_*.json")):
            return "coco"
        has_tars = any(place.glob("*.tar"))
        has_parquet = any(place.rglob("*.parquet"))
        return "tars" if has_tars else "table" if has_parquet else "folder"
    if "://" in path or path.endswith(".tar"):
        return "tars"
    is_file = place.is_file()
    if is_file and place.suffix.lower() in _TABLES and not _lists_urls(place):
        return "table"
    if is_file and place.suffix.lower() in (*_LISTS, *_TABLES):
        raise InvalidArgument(
            "path",
            "images",
            f"'{path}', a list of URLs",
            "Download the images with img2dataset and use its tars",
        )
    if _HUB_ID.fullmatch(path):
        return "table"
    raise InvalidArgument(
        "path",
        "a folder of images, a COCO folder, tars, the file, folder or Hub id of a dataset, or scenes",
        f"'{path}'" + ("" if os.path.lexists(path) else ", which does not exist"),
    )


def tars_at(path: str) -> list[str]:
    """Return the shards at a path of kind "tars": those in a folder, or the path itself, maybe a pattern."""
    place = Path(path)
    if not place.is_dir():
        return [path]
    # Each by its own name, since the folder's name may look like a pattern.
    return [str(file) for file in sorted(place.glob("*.tar"))] or [str(place / "*.tar")]


def _lists_urls(table: Path) -> bool:
    """Whether a table has a column of URLs but none of images or paths."""
    columns = {name.lower() for name in _columns_of(table)}
    has_images = any(name in columns for name in ("image", "file_name", "image_path", "path", "jpg", "png"))
    return not has_images and any("url" in name for name in columns)


def _columns_of(table: Path) -> list[str]:
    """The columns of a table, from its beginning; [] if unknown."""
    with suppress(OSError, ValueError, RecursionError, csv.Error, ImportError):
        if table.suffix.lower() == ".parquet":
            from pyarrow.parquet import read_schema

            return list(read_schema(table).names)
        with io.TextIOWrapper(io.BufferedReader(open_regular(table)), "utf-8-sig") as text:
            line = text.readline(_LONGEST_LINE)
        if table.suffix.lower() in (".csv", ".tsv"):
            return next(csv.reader([line], delimiter="," if table.suffix.lower() == ".csv" else "\t"), [])
        row = json.loads(line)
        if isinstance(row, list):  # all rows are in one line
            row = row[0] if row else {}
        return list(row) if isinstance(row, dict) else []
    return []


def _check_options(options: SourceOptions, kind: SourceKind) -> None:
    """Raise `InvalidArgument` for an option that has no effect for this kind."""
    reads = {
        "folder": {"image_column", "caption_column"},
        "coco": {"split"},
        "table": {"split", "config_name", "revision", "image_column", "caption_column"},
        "tars": {"image_column", "caption_column"},
        "scenes": set[str](),
    }[kind]
    for name in _NAMED:
        if getattr(options, name) and name not in reads:
            raise InvalidArgument(
                name, f"no value for a source of kind {kind}", f"'{getattr(options, name)}'"
            )
    if options.caption_column and not options.with_captions:
        raise InvalidArgument(
            "caption_column", "no value, since captions are not read", f"'{options.caption_column}'"
        )
    if kind == "scenes" and not options.count:
        raise InvalidArgument("count", hint="Set it to the number of scenes to generate")


def _columns(options: SourceOptions) -> dict[str, Any]:
    named = {"image_column": options.image_column, "caption_column": options.caption_column}
    return {argument: column for argument, column in named.items() if column}


def _access(options: SourceOptions) -> dict[str, Any]:
    return {"with_captions": options.with_captions, "allow_outside": options.allow_outside}


def _open_folder(options: SourceOptions) -> tuple[Source, str]:
    source = FolderSource(options.path, **_columns(options), with_maps=False, **_access(options))
    return source, f"{Path(options.path)}/"


def _open_coco(options: SourceOptions) -> tuple[Source, str]:
    split, folder = options.split or "train2017", Path(options.path)
    files = sorted(folder.glob("annotations/captions_*.json"))
    splits = [file.stem.removeprefix("captions_") for file in files]
    if splits and split not in splits:
        raise InvalidArgument("split", f"a split of '{folder}' ({', '.join(splits)})", f"'{split}'")
    annotations = folder / "annotations" / f"captions_{split}.json"
    source = CocoSource(annotations, folder / split, **_access(options))
    return source, f"{folder}/"


def _open_table(options: SourceOptions) -> tuple[Source, str]:
    from nexus_adapters.data.table import TableSource

    source = TableSource(
        options.path,
        split=options.split or "train",
        config_name=options.config_name or None,
        revision=options.revision or None,
        **_columns(options),
        **_access(options),
    )
    root = "" if source.folder is None else f"{source.folder}/"
    return source, root


def _open_tars(options: SourceOptions) -> tuple[Source, str]:
    from nexus_adapters.data.tars import TarSource

    place = Path(options.path)
    source = TarSource(
        tars_at(options.path),
        index_folder=options.index_folder,
        with_captions=options.with_captions,
        **_columns(options),
    )
    is_local = "://" not in options.path
    return source, f"{place if place.is_dir() else place.parent}/" if is_local else ""
