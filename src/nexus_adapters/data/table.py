"""A Hugging Face dataset, from the Hub or a local folder, as samples."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_adapters.data.listing import OUTSIDE_HINT, check_regular, find_path
from nexus_adapters.data.metadata import csv_rows
from nexus_adapters.data.samples import (
    BadSample,
    Part,
    Sample,
    as_captions,
    captions_at,
    hash_image,
    hash_sample,
    json_keys,
    no_column,
    read_image,
    read_size,
    read_stored_map,
    split_column,
)
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.packages import missing_package

_IMAGES, _PATHS = "image", "file_name"  # columns that are read by default
_READERS: dict[str, tuple[str, dict[str, Any]]] = {  # for single files: the library's reader and its options
    ".parquet": ("parquet", {}),
    # A caption may be "NA" or "None", which the library's readers would treat as missing by default.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
_INDEX = "__index_level_0__"  # pandas' name for a column without a name
_UTF8_HINT = "Save it as UTF-8"
_TEXTS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


class TableSource:
    """The rows of a dataset that the `datasets` library reads. Images are decoded on demand.

    Args:
        path: a folder written by `Dataset.save_to_disk`, any folder that `load_dataset` reads (Parquet files,
            an image folder, ...), a Parquet, CSV, TSV or JSON lines file, or a name on the Hub. Set
            HF_HUB_OFFLINE to keep the library from accessing the Hub.
        split: the dataset's split; slices such as "train[:100]" work if `load_dataset` reads it.
        image_column: column of images: the library's `Image`, bytes, or paths relative to the table's folder;
            None for "image" or, if there is none, "file_name".
        condition_column: column of structure maps; None if there are no maps.
        caption_column: column of strings or lists of strings, or COLUMN:KEY for a key of JSON objects with
            one of these.
        revision: branch, tag or commit on the Hub.
        config_name: the configuration of a dataset that has several.
        with_captions: False ignores captions: every sample has the empty caption.
        allow_outside: allow paths to lead out of the table's folder.

    Raises:
        InvalidArgument: if the library is not installed or cannot find the dataset or split, or if the
            dataset is empty or a column is missing or has another type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        image_column: str | None = None,
        condition_column: str | None = None,
        caption_column: str = "text",
        revision: str | None = None,
        config_name: str | None = None,
        *,
        with_captions: bool = True,
        allow_outside: bool = False,
    ) -> None:
        self.path, self.split = os.fspath(path), split
        self._allow_outside = allow_outside
        table = _open_table(self.path, split, revision, config_name)
        self.folder = _folder_of(Path(path))
        if len(table) == 0:
            raise InvalidArgument("path", "a dataset with rows", f"'{self.path}', which is empty")
        if image_column is None:
            image_column = (
                _PATHS if _PATHS in table.column_names and _IMAGES not in table.column_names else _IMAGES
            )
        self.image_column, self.condition_column = image_column, condition_column
        self.caption_column, self._caption_key = split_column(caption_column, table.column_names)
        images = {"image_column": image_column, "condition_column": condition_column}
        wanted = {**images, "caption_column": self.caption_column if with_captions else None}
        for argument, column in wanted.items():
            if column is not None and column not in table.column_names:
                raise no_column(argument, column, table.column_names, f"'{self.path}'")
        try:
            if with_captions:
                _check_captions(table, self.caption_column, self._caption_key)
        except UnicodeDecodeError as error:
            raise _unreadable(self.path, error) from error
        table = table.select_columns(list(dict.fromkeys(c for c in wanted.values() if c is not None)))
        for argument, column in images.items():
            if column is not None:
                table = _left_encoded(table, argument, column)
        self._table, self._with_captions = table, with_captions

    @property
    def fingerprint(self) -> str:
        """The library's fingerprint of the dataset."""
        return str(self._table._fingerprint)

    def __len__(self) -> int:
        return len(self._table)

    def key(self, index: int) -> str:
        """Return the dataset, split and row."""
        return f"{self.path}/{self.split}/{index}"

    def content_hash(self, index: int) -> str:
        """Return the SHA-256 of image, structure map and captions. Raises BadSample."""
        row = self._row(index)
        columns = [column for column in (self.image_column, self.condition_column) if column is not None]
        parts = [Part(column, *self._content(row, column, index)) for column in columns]
        return hash_sample(parts, self._captions(row, index))

    def image_hash(self, index: int) -> str:
        """Return the SHA-256 of the image's bytes. Raises BadSample."""
        return hash_image(*self._content(self._row(index), self.image_column, index))

    def stamp(self, index: int) -> None:
        """Return None, since the library does not report which file a row is in."""

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) of the upright image, from its header. Raises BadSample."""
        content, name = self._content(self._row(index), self.image_column, index)
        return read_size(content, self.image_column, name)

    def load(self, index: int) -> Sample:
        """Decode a sample. Raises BadSample."""
        row = self._row(index)
        captions = self._captions(row, index)
        content, name = self._content(row, self.image_column, index)
        image, condition, name = read_image(content, self.image_column, name), None, ""
        if self.condition_column is not None:
            content, name = self._content(row, self.condition_column, index)
            condition = read_stored_map(content, self.condition_column, name)
        return Sample(self.key(index), image, condition, captions, condition_key=name)

    def _row(self, index: int) -> dict[str, Any]:
        try:
            return dict(self._table[index])
        except UnicodeDecodeError as error:  # of JSON lines in a folder
            raise BadSample(
                f"table: expected text in UTF-8, got '{self.key(index)}' ({error}). {_UTF8_HINT}"
            ) from error

    def _content(self, row: dict[str, Any], column: str, index: int) -> tuple[bytes | Path, str]:
        """The bytes or the file of an image, and its name in errors."""
        encoded, key = row[column] or {}, self.key(index)
        content: bytes | None = encoded.get("bytes")
        if content is not None:
            return content, key
        path = encoded.get("path")
        if not path:
            raise BadSample(f"{column}: '{key}' has no image")
        file = Path(path) if self.folder is None else self.folder / find_path(self.folder, path)
        if not (self._allow_outside or self._is_inside(file)):
            raise BadSample(
                f"{column}: expected a file in the table's folder, got '{path}' in '{key}'; {OUTSIDE_HINT}"
            )
        return file, f"{key} ({path})"

    def _is_inside(self, file: Path) -> bool:
        """Whether a file is inside the table's folder or the library's download cache."""
        import datasets

        if ".." in file.parts:
            return False
        caches = datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, hub_cache()
        folders = [Path(cache) for cache in caches] + ([] if self.folder is None else [self.folder])
        # The library follows a link to the folder, and its rows name files inside the link's target.
        places = [place for folder in folders for place in (folder.absolute(), folder.resolve())]
        return any(file.absolute().is_relative_to(place) for place in places)

    def _captions(self, row: dict[str, Any], index: int) -> tuple[str, ...]:
        if not self._with_captions:
            return ("",)
        captions = captions_at(row[self.caption_column], self._caption_key)
        if captions is None:
            at = f" at '{self._caption_key}'" if self._caption_key else ""
            raise BadSample(f"{self.caption_column}: '{self.key(index)}' has no caption{at}")
        if keys := json_keys(captions):
            hint = f"add its key, such as {self.caption_column}:{keys[0]}"
            raise BadSample(
                f"{self.caption_column}: the caption of '{self.key(index)}' is a JSON object; {hint}"
            )
        return captions


def hub_cache() -> str:
    """Return the cache folder of the Hub's client."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def _folder_of(path: Path) -> Path | None:
    """The folder that paths in a local table are relative to."""
    return path if path.is_dir() else path.parent if path.is_file() else None


def _open_table(path: str, split: str, revision: str | None, config_name: str | None) -> Any:
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError as error:
        raise missing_package("data", error) from error
    if revision is not None and Path(path).exists():
        raise InvalidArgument("revision", f"no value for the local '{path}'", f"'{revision}'")
    is_file = Path(path).is_file()
    if config_name is not None and (is_file or _is_saved(Path(path))):
        raise InvalidArgument("config_name", f"no value for the saved table '{path}'", f"'{config_name}'")
    reader, options = _READERS.get(Path(path).suffix.lower(), ("", {}))
    if is_file and not reader:
        raise InvalidArgument("path", f"a table in {', '.join(_READERS)}", f"'{path}'")
    if Path(path).is_dir() and not _is_saved(Path(path)) and glob.has_magic(os.path.realpath(path)):
        raise InvalidArgument(
            "path",
            "a folder whose path has no [, * or ?",
            f"'{os.path.realpath(path)}'",
            "The datasets library would treat it as a pattern. Rename the folder, or use a single file in it",
        )
    if Path(path).is_dir():
        check_regular(Path(path), "path")
    if is_file and reader != "parquet":
        _check_text(Path(path), options.get("sep", ",") if reader == "csv" else None)
    try:
        with _no_bars_in_logs():
            if is_file:  # escaped, or the library might treat its name as a pattern
                found = datasets.load_dataset(reader, data_files=glob.escape(path), split=split, **options)
            elif _is_saved(Path(path)):
                found = datasets.load_from_disk(path)
            else:
                found = datasets.load_dataset(path, name=config_name, split=split, revision=revision)
    except Exception as error:  # exceptions of the library and of its file systems and readers
        if isinstance(error, datasets.exceptions.DatasetGenerationError | ArrowException):
            raise _unreadable(path, error) from error
        raise InvalidArgument(
            "path",
            f"the folder or Hub id of a dataset with split '{split}'",
            f"'{path}' ({type(error).__name__}: {one_line(error)})",
        ) from error
    if not _is_saved(Path(path)):
        _check_fields(path, found)
        return found
    splits = found if isinstance(found, dict) else {str(found.split or split): found}
    if split not in splits:
        raise InvalidArgument("split", f"a split of '{path}' ({', '.join(splits)})", f"'{split}'")
    return splits[split]


def _unreadable(path: str, error: BaseException) -> InvalidArgument:
    """The error for files that the library finds but cannot read, with the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return InvalidArgument(
        "path",
        "a readable table",
        f"'{path}' ({type(error).__name__}: {one_line(error)})",
        _UTF8_HINT if isinstance(error, UnicodeDecodeError) else "",
    )


def _check_text(file: Path, separator: str | None) -> None:
    """Raise `InvalidArgument` for a CSV or JSON table that is not UTF-8, is empty, or has ragged rows.

    The library would report only the byte in its buffer, or read the fields into the wrong columns.

    Args:
        file: the table.
        separator: the separator of the columns; None for JSON.
    """
    has_rows = False
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                has_rows |= bool(line.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                what = f"line {number} of '{file}' ({error})"
                raise InvalidArgument("path", "a table in UTF-8", what, _UTF8_HINT) from error
    if separator is not None:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            has_rows = sum(1 for _ in csv_rows(lines, file, "path", separator)) > 0
    if not has_rows:
        raise InvalidArgument("path", "a dataset with rows", f"'{file}', which is empty")


def _check_fields(path: str, table: Any) -> None:
    """Raise `InvalidArgument` for CSV files in a folder that have rows with more fields than columns.

    pandas would read the first field of such a row as an index and the others into the wrong columns.
    """
    is_csv = table.info.builder_name in ("csv", "imagefolder")
    if is_csv and _INDEX in table.column_names:
        raise InvalidArgument(
            "path",
            "as many fields in each row of a CSV file as in its first line",
            f"more in '{path}'",
            "Put quotation marks around text that contains the separator",
        )


@contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """Hide the progress bars of datasets and of the Hub's client while open, unless stderr is a terminal."""
    import datasets
    from huggingface_hub import utils as hub

    shown = (
        []
        if sys.stderr.isatty()
        else [each for each in (datasets, hub) if not each.are_progress_bars_disabled()]
    )
    try:
        for library in shown:
            library.disable_progress_bars()
        yield
    finally:
        for library in shown:
            library.enable_progress_bars()


def _is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, with one table or several splits."""
    is_table = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return is_table or (folder / "dataset_dict.json").exists()


def _check_captions(table: Any, column: str, key: str | None) -> None:
    feature = table.features[column]
    if key is not None and isinstance(feature, dict) and key not in feature:
        raise no_column("caption_column", key, feature, f"the objects in '{column}'")
    found = feature[key] if key is not None and isinstance(feature, dict) else feature
    element = found[0] if isinstance(found, list) else getattr(found, "feature", found)
    is_mixed = type(element).__name__ == "Json"  # several types; earlier versions of datasets do not have it
    if not is_mixed and getattr(element, "dtype", None) not in _TEXTS:
        is_object = isinstance(feature, dict)
        raise InvalidArgument(
            "caption_column",
            "strings or lists of strings",
            f"'{column}' of type {feature}",
            f"Add a key, such as {column}:{next(iter(feature))}" if is_object and key is None else "",
        )
    if key is not None:
        return
    rows = table.select_columns([column])
    for number in range(len(rows) if is_mixed else 1):
        value = rows[number][column]
        captions = as_captions(value)
        if is_mixed and captions is None and value not in (None, []):  # captions may be missing
            names = list(value) if isinstance(value, dict) else []
            raise InvalidArgument(
                "caption_column",
                "strings or lists of strings",
                f"{json.dumps(value)[:60]} as '{column}' in row {number + 1}",
                f"Add a key, such as {column}:{names[0]}" if names else "",
            )
        if keys := json_keys(captions or ()):
            raise InvalidArgument(
                "caption_column",
                "words",
                f"JSON objects in '{column}' ({', '.join(keys)[:100]})",
                f"Add the key of the caption, such as {column}:{keys[0]}",
            )


def _left_encoded(table: Any, argument: str, column: str) -> Any:
    """The table with undecoded images in this column, as {"bytes", "path"} for `read_image`."""
    import datasets

    feature = table.features[column]
    is_image = isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in (*_TEXTS, *_BYTES)
    is_pair = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (is_image or is_pair):
        raise InvalidArgument(argument, "images, paths or bytes", f"'{column}' of type {feature}")
    return table.cast_column(column, datasets.Image(decode=False))
