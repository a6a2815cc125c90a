"""Metadata files of image folders: metadata.jsonl and metadata.csv, a row for each image."""

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
_LONGEST_FIELD = 2**24  # characters of a CSV field, far above the module's own limit


@dataclass(frozen=True, slots=True)
class ListedSample:
    """A sample's files, relative to the folder.

    `captions`: None where the file `text` has the caption; where that is None too, there is none.
    """

    image: str
    condition: str | None
    captions: tuple[str, ...] | None
    text: str | None = None


@dataclass(frozen=True)
class Columns:
    """Names of columns; `condition` is None where there are no maps, `caption` where captions are not read.

    `caption` may be COLUMN:KEY, for the key of a JSON object in the column.
    """

    image: str
    condition: str | None
    caption: str | None


def read_metadata(
    file: Path, columns: Columns, root: Path, known: Collection[str] = (), allow_outside: bool = False
) -> tuple[list[ListedSample], set[str]]:
    """The samples of a metadata file, in its order, with paths relative to `root`; and the files it names.

    Whether the samples' files exist is not checked. The files that it names, in any column, are those among
    `known`.

    Args:
        file: whose paths are relative to its own folder.
        columns: that are read.
        root: the folder of all samples, of which the file's folder is a part.
        known: files that exist, relative to `root`.
        allow_outside: whether paths may lead out of the folder.

    Raises:
        InvalidArgument: for a line that is no JSON object, misses a column, or has captions of a wrong type
            or paths that leave the folder; it names the line, from 1 on.
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
    """The columns of a metadata file's first row. InvalidArgument as `read_metadata`."""
    return [str(name) for name in next((row for _, row in _rows(file)), {})]


def _captions(row: Mapping[str, Any], column: str | None, where: str) -> tuple[str, ...] | None:
    """None for a null: of one image that has no caption, as opposed to a column of something else."""
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
        hint = f"Name a key, as in {name}:{next(iter(value))}" if is_object else ""
        raise InvalidArgument("caption_column", expected, shown, hint)
    if keys := json_keys(captions):
        hint = f"Name the key of the caption, as in {name}:{keys[0]}"
        raise InvalidArgument("caption_column", "words", f"a JSON object, {shown}", hint)
    return captions


def _rows(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's columns, and how errors name the line; empty lines are skipped."""
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
    """Each row's columns, by the names in the first one, and how errors name it; empty lines are skipped.

    Args:
        lines: of the table, with their ends.
        file: of the table, for errors.
        argument: that names the file, for errors.
        separator: of the columns.

    Raises:
        InvalidArgument: for a row that has more or fewer fields than the first one; it names the line.
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
                quotes = "Put quotation marks around a text that contains the separator"
                raise InvalidArgument(
                    argument,
                    f"as many fields as the first line has ({len(names)})",
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
            "a path below the folder, relative to it",
            f"{json.dumps(path)[:200]} as '{column}' in {where}",
            OUTSIDE_HINT if is_path else "",
        )
    return str(path)
