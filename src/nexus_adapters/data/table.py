"""A Hugging Face data set, from the Hub or a local folder, as samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nexus_adapters.data.samples import (
    BadSample,
    Sample,
    as_captions,
    hash_sample,
    no_column,
    read_image,
    read_size,
    read_stored_map,
)
from nexus_adapters.errors import InvalidArgument, one_line

_TEXTS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


class TableSource:
    """The rows of a data set that the `datasets` library reads. Images are decoded when they are read.

    Args:
        path: a folder that `Dataset.save_to_disk` made, any folder that `load_dataset` reads (Parquet files,
            an image folder, ...), or else a name on the Hub. Whether the Hub may be reached is the library's
            to decide, by HF_HUB_OFFLINE.
        split: of the data set; slices such as "train[:100]" work where `load_dataset` reads it.
        image_column: of images: the library's `Image`, paths or bytes.
        condition_column: of structure maps; None where there are none.
        caption_column: of strings, or of lists of strings.
        revision: branch, tag or commit on the Hub.
        config_name: which of the data set's configurations, where it has several.

    Raises:
        InvalidArgument: where the library is missing, finds no such data set or split, or where the data set
            is empty, misses a column, or has a column of another type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        image_column: str = "image",
        condition_column: str | None = None,
        caption_column: str = "text",
        revision: str | None = None,
        config_name: str | None = None,
    ) -> None:
        self.path, self.split = os.fspath(path), split
        self.image_column, self.condition_column = image_column, condition_column
        self.caption_column = caption_column
        table = _open_table(self.path, split, revision, config_name)
        if len(table) == 0:
            raise InvalidArgument("path", "a data set with rows", f"'{self.path}', which is empty")
        images = {"image_column": image_column, "condition_column": condition_column}
        wanted = {**images, "caption_column": caption_column}
        for argument, column in wanted.items():
            if column is not None and column not in table.column_names:
                raise no_column(argument, column, table.column_names, f"'{self.path}'")
        _check_captions(table, caption_column)
        table = table.select_columns(list(dict.fromkeys(c for c in wanted.values() if c is not None)))
        for argument, column in images.items():
            if column is not None:
                table = _left_encoded(table, argument, column)
        self._table = table

    @property
    def fingerprint(self) -> str:
        """The library's hash of this data set's state."""
        return str(self._table._fingerprint)

    def __len__(self) -> int:
        return len(self._table)

    def key(self, index: int) -> str:
        """The data set, split and row."""
        return f"{self.path}/{self.split}/{index}"

    def content_hash(self, index: int) -> str:
        """SHA-256 over image, structure map and captions. BadSample."""
        row = self._table[index]
        contents = [self._content(row, self.image_column, index)]
        if self.condition_column is not None:
            contents.append(self._content(row, self.condition_column, index))
        return hash_sample(contents, self._captions(row, index), self.key(index))

    def stamp(self, index: int) -> None:
        """None: the library does not say in which file a row is."""

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of the image, upright, from its header. BadSample."""
        content = self._content(self._table[index], self.image_column, index)
        return read_size(content, self.image_column, self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. BadSample."""
        row, key = self._table[index], self.key(index)
        captions = self._captions(row, index)
        image = read_image(self._content(row, self.image_column, index), self.image_column, key)
        condition = None
        if self.condition_column is not None:
            content = self._content(row, self.condition_column, index)
            condition = read_stored_map(content, self.condition_column, key)
        return Sample(key, image, condition, captions)

    def _content(self, row: dict[str, Any], column: str, index: int) -> bytes | Path:
        encoded = row[column] or {}
        content: bytes | None = encoded.get("bytes")
        if content is not None:
            return content
        if not encoded.get("path"):
            raise BadSample(f"{column}: '{self.key(index)}' has no image")
        return Path(encoded["path"])

    def _captions(self, row: dict[str, Any], index: int) -> tuple[str, ...]:
        captions = as_captions(row[self.caption_column])
        if captions is None:
            raise BadSample(f"{self.caption_column}: '{self.key(index)}' has no caption")
        return captions


def _open_table(path: str, split: str, revision: str | None, config_name: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InvalidArgument(
            "path",
            "the datasets package, which reads Hugging Face data sets",
            "an installation that lacks it",
            "Run pip install 'nexus-adapters[data]'",
        ) from error
    if revision is not None and Path(path).exists():
        raise InvalidArgument("revision", f"no value for the local '{path}'", f"'{revision}'")
    if config_name is not None and _is_saved(Path(path)):
        raise InvalidArgument("config_name", f"no value for the saved table '{path}'", f"'{config_name}'")
    try:
        if not _is_saved(Path(path)):
            return datasets.load_dataset(path, name=config_name, split=split, revision=revision)
        saved = datasets.load_from_disk(path)
    except Exception as error:  # the library's own kinds, and those of the file systems and readers below it
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InvalidArgument(
            "path", f"the folder or Hub id of a data set with split '{split}'", f"'{path}' ({reason})"
        ) from error
    splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
    if split not in splits:
        raise InvalidArgument("split", f"one of {', '.join(splits)}, as '{path}' has", f"'{split}'")
    return splits[split]


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made it, of one table or of several splits."""
    is_table = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return is_table or (folder / "dataset_dict.json").exists()


def _check_captions(table: Any, column: str) -> None:
    feature = table.features[column]
    element = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    if getattr(element, "dtype", None) not in _TEXTS:
        raise InvalidArgument(
            "caption_column", "strings or lists of strings", f"'{column}' of type {feature}"
        )


def _left_encoded(table: Any, argument: str, column: str) -> Any:
    """The table with this column's images as {"bytes", "path"}, for `read_image` to decode."""
    import datasets

    feature = table.features[column]
    is_image = isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in (*_TEXTS, *_BYTES)
    is_pair = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (is_image or is_pair):
        raise InvalidArgument(argument, "images, paths or bytes", f"'{column}' of type {feature}")
    return table.cast_column(column, datasets.Image(decode=False))
