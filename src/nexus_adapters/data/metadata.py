"""Metadata files of image folders: metadata.jsonl and metadata.csv, with one row per image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nexus_adapters.data.listing import OUTSIDE_HINT, find_path, leaves_folder
from nexus_adapters.data.samples import captions_at, json_keys, no_column, separator_hint, split_column
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import read_regular

METADATA, METADATA_CSV = "metadata.jsonl", "metadata.csv"
_LONGEST_FIELD = 2**24  # characters of a CSV field; the csv module's default is far lower


@dataclass(frozen=True, slots=True)
class ListedSample:
    """A sample's files, relative to the folder.

    `captions` is None if the caption is in the file `text`; if that is None, too, there is no caption.
    """

    image: str
    condition: str | None
    captions: tuple[str, ...] | None
    text: str | None = None


@dataclass(frozen=True)
class Columns:
    """Names of columns. `condition` is None without maps; `caption` is None if captions are not read.

    `caption` can be COLUMN:KEY, for a key of the JSON objects in the column.
    """

    image: str
    condition: str | None
    caption: str | None


def read_metadata(
    file: Path, columns: Columns, root: Path, known: Collection[str] = (), allow_outside: bool = False
) -> tuple[list[ListedSample], set[str]]:
    """Read a metadata file.

    Args:
        file: the metadata file; its paths are relative to its own folder.
        columns: the columns to read.
        root: the folder of all samples, which contains the file.
        known: existing files, relative to `root`.
        allow_outside: allow paths to lead out of the folder.

    Returns:
        The samples in the order of the file, with paths relative to `root`, and the files in `known` that it
        mentions in any column. Whether the samples' files exist is not checked.

    Raises:
        InvalidArgument: for a line that is not a JSON object, a missing column, captions of a wrong type, or
            paths that lead out of the folder; it names the line, counted from 1.
    """
    below = file.parent.relative_to(root).as_posix()
    prefix = "" if below == "." else f"{below}/"
    listed: list[ListedSample] = []
    named: set[str] = set()
    for where, row in _rows(file):
        paths: list[str | None] = []
        for argument, column in (("image_column", columns.image), ("condition_column", columns.condition)):
            found = None
            if column is not None:
                path = _path(row, argument, column, where, allow_outside)
                found = find_path(root, PurePosixPath(below, path).as_posix(), known)
            paths.append(found)
        listed.append(ListedSample(paths[0] or "", paths[1], _captions(row, columns.caption, where)))
        texts = (prefix + value.replace("\\", "/") for value in row.values() if isinstance(value, str))
        named.update(path for path in (*texts, *paths) if path is not None and path in known)
    return listed, named


def metadata_columns(file: Path) -> list[str]:
    """Return the columns of a metadata file's first row. Raises `InvalidArgument` as `read_metadata`."""
    return [str(name) for name in next((row for _, row in _rows(file)), {})]


def _captions(row: Mapping[str, Any], column: str | None, where: str) -> tuple[str, ...] | None:
    """The captions in a row; None for a null, which means that this image has no caption."""
    if column is None:
        return ("",)
    name, key = split_column(column, row)
    value = _value(row, "caption_column", name, where)
    if value is None:
        return None
    captions, shown = captions_at(value, key), f"{json.dumps(value)[:60]} as '{name}' in {where}"
    if captions is None:
        texts = "a string or a list of at least one string"
        expected = texts if key is None else f"a JSON object with {texts} as '{key}'"
        is_object = isinstance(value, dict) and value and key is None
        hint = f"Add a key, such as {name}:{next(iter(value))}" if is_object else ""
        raise InvalidArgument("caption_column", expected, shown, hint)
    if keys := json_keys(captions):
        hint = f"Add the key of the caption, such as {name}:{keys[0]}"
        raise InvalidArgument("caption_column", "text", f"a JSON object, {shown}", hint)
    return captions


def _rows(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's description for errors and its columns; empty lines are skipped."""
    try:
        text = read_regular(metadata).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("folder", f"a {metadata.name} in UTF-8", f"'{metadata}' ({error})") from error
    if metadata.suffix == ".csv":
        yield from csv_rows(io.StringIO(text, newline=""), metadata, "folder")
        return
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            where = f"line {number} of '{metadata}'"
            yield where, _row(line, where)


def csv_rows(
    lines: Iterable[str], file: Path, argument: str, separator: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row's description for errors and its fields, by the names in the first row.

    Empty lines are skipped.

    Args:
        lines: the table's lines with their line ends.
        file: the table's file, for errors.
        argument: the name of the argument with the file, for errors.
        separator: the separator of the columns.

    Raises:
        InvalidArgument: for a row with more or fewer fields than the first one; it names the line.
    """
    names: list[str] | None = None
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(lines, delimiter=separator)
        for fields in reader:
            if len(fields) < 2 and not "".join(fields).strip():
                continue
            if names is None:
                names = fields
                continue
            where = f"line {reader.line_num} of '{file}'"
            if len(fields) != len(names):
                quotes = "Put quotation marks around text that contains the separator"
                raise InvalidArgument(
                    argument,
                    f"as many fields as in the first line ({len(names)})",
                    f"{len(fields)} in {where}",
                    separator_hint(names) or (quotes if len(fields) > len(names) else ""),
                )
            yield where, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise InvalidArgument(argument, "a table in CSV", f"'{file}' ({one_line(error)})") from error
    finally:
        csv.field_size_limit(before)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(
            "folder", "a JSON object per line", f"{where}, which is not JSON ({error})"
        ) from error
    if not isinstance(row, dict):
        raise InvalidArgument("folder", "a JSON object per line", f"{where}, which is a {type(row).__name__}")
    return row


def _value(row: Mapping[str, Any], argument: str, column: str, where: str) -> Any:
    if column not in row:
        raise no_column(argument, column, row, where)
    return row[column]


def _path(row: Mapping[str, Any], argument: str, column: str, where: str, allow_outside: bool) -> str:
    path = _value(row, argument, column, where)
    is_path = isinstance(path, str) and path != "" and "\0" not in path
    if not is_path or (leaves_folder(path) and not allow_outside):
        raise InvalidArgument(
            argument,
            "a path inside the folder, relative to it",
            f"{json.dumps(path)[:200]} as '{column}' in {where}",
            OUTSIDE_HINT if is_path else "",
        )
    return str(path)
