"""Folders of images as samples, with captions from metadata.jsonl, from text files, or from a COCO file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from nexus_adapters.conditions.images import FORMATS
from nexus_adapters.data.samples import (
    BadSample,
    Sample,
    as_captions,
    hash_sample,
    no_column,
    read_image,
    read_size,
    read_stored_map,
    read_text,
)
from nexus_adapters.errors import InvalidArgument, one_line

METADATA = "metadata.jsonl"
_IMAGE, _CAPTION = "file_name", "text"  # the columns as the convention names them


@dataclass(frozen=True, slots=True)
class ListedSample:
    """A sample's files, relative to the folder. `captions`: None where NAME.txt next to the image is read."""

    image: str
    condition: str | None
    captions: tuple[str, ...] | None


class FolderSource:
    """The images in a folder.

    metadata.jsonl has a JSON object on each line: the image's path relative to the folder, its captions (a
    string or a list of strings), and, with `condition_column`, the path of its structure map. Without
    metadata.jsonl, and with the default columns, every image in the folder and below is a sample, with the
    UTF-8 text of NAME.txt next to it as its caption.

    A listed file that does not exist is a BadSample when it is read.

    Args:
        folder: with the images.
        image_column: of the image's path.
        condition_column: of the structure map's path; None where there are no maps.
        caption_column: of the captions.

    Raises:
        InvalidArgument: for no folder, no samples, or a line of metadata.jsonl that is wrong.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_column: str = _IMAGE,
        condition_column: str | None = None,
        caption_column: str = _CAPTION,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InvalidArgument("folder", "an existing folder", f"'{folder}'")
        self._listed = self._list(image_column, condition_column, caption_column)

    def _list(
        self, image_column: str, condition_column: str | None, caption_column: str
    ) -> list[ListedSample]:
        if (self.folder / METADATA).exists():
            listed = read_metadata(self.folder, image_column, condition_column, caption_column)
            if not listed:
                raise InvalidArgument(
                    "folder", f"samples in {METADATA}", f"'{self.folder}', where it lists none"
                )
            return listed
        if (image_column, condition_column, caption_column) != (_IMAGE, None, _CAPTION):
            raise InvalidArgument(
                "folder", f"a {METADATA} with the named columns", f"'{self.folder}', which has no {METADATA}"
            )
        listed = list_images(self.folder)
        if not any((self.folder / item.image).with_suffix(".txt").exists() for item in listed):
            raise InvalidArgument(
                "folder",
                f"a {METADATA}, or images with captions in NAME.txt next to them",
                f"'{self.folder}', which has neither",
            )
        return listed

    def __len__(self) -> int:
        return len(self._listed)

    def key(self, index: int) -> str:
        """The image's path."""
        return str(self._image(index))

    def content_hash(self, index: int) -> str:
        """SHA-256 over image, structure map and captions. BadSample."""
        contents = [self._image(index), self._condition(index)]
        return hash_sample(contents, self._captions(index), self.key(index))

    def stamp(self, index: int) -> str | None:
        """Names, sizes and times of the files, and captions in metadata.jsonl; None for a missing file."""
        captions = self._listed[index].captions
        texts = None if captions is not None else self._image(index).with_suffix(".txt")
        files = [file for file in (self._image(index), self._condition(index), texts) if file is not None]
        try:
            return json.dumps([[_stamp(file) for file in files], captions])
        except OSError:
            return None

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of the image, upright, from its header. BadSample."""
        return read_size(self._image(index), "image", self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. BadSample."""
        captions = self._captions(index)
        image = read_image(self._image(index), "image", self.key(index))
        path = self._condition(index)
        condition = None if path is None else read_stored_map(path, "condition", str(path))
        return Sample(self.key(index), image, condition, captions)

    def _image(self, index: int) -> Path:
        return self.folder / self._listed[index].image

    def _condition(self, index: int) -> Path | None:
        condition = self._listed[index].condition
        return None if condition is None else self.folder / condition

    def _captions(self, index: int) -> tuple[str, ...]:
        captions = self._listed[index].captions
        if captions is not None:
            return captions
        file = self._image(index).with_suffix(".txt")
        if not file.exists():
            raise BadSample(f"captions: '{self.key(index)}' has no '{file}'")
        return (read_text(file, "captions", str(file)),)


def read_metadata(
    folder: Path, image_column: str, condition_column: str | None, caption_column: str
) -> list[ListedSample]:
    """The samples of a folder's metadata.jsonl, in its order; whether the files exist is not checked.

    Raises:
        InvalidArgument: for a line that is no JSON object, misses a column, or has captions of a wrong type
            or paths that leave the folder; it names the line, from 1 on.
    """
    listed = []
    columns = {"image_column": image_column, "condition_column": condition_column}
    for where, row in _rows(folder / METADATA):
        paths = []
        for argument, column in columns.items():
            paths.append(None if column is None else _path(row, argument, column, where))
        captions = as_captions(_value(row, "caption_column", caption_column, where))
        if captions is None:
            shown = f"{json.dumps(row[caption_column])[:60]} as '{caption_column}' in {where}"
            raise InvalidArgument("caption_column", "a string or a list of at least one string", shown)
        listed.append(ListedSample(paths[0] or "", paths[1], captions))
    return listed


def list_images(folder: Path) -> list[ListedSample]:
    """All images in a folder and below, sorted by path, hidden ones excepted."""
    endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (Path(parent, name) for name in names if not name.startswith("."))
        found += [image for image in images if image.suffix.lower() in endings]
    return [
        ListedSample(path, None, None) for path in sorted(p.relative_to(folder).as_posix() for p in found)
    ]


def _rows(metadata: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Each line's object, and how errors name the line; empty lines are skipped."""
    try:
        with metadata.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"line {number} of '{metadata}'"
                    yield where, _row(line, where)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("folder", f"a {METADATA} in UTF-8", f"'{metadata}' ({error})") from error


def _row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(
            "folder", "a JSON object per line", f"{where}, which is not JSON ({error})"
        ) from error
    if not isinstance(row, dict):
        raise InvalidArgument("folder", "a JSON object per line", f"{where}, which is a {type(row).__name__}")
    return row


def _value(row: dict[str, object], argument: str, column: str, where: str) -> object:
    if column not in row:
        raise no_column(argument, column, row, where)
    return row[column]


def _path(row: dict[str, object], argument: str, column: str, where: str) -> str:
    path = _value(row, argument, column, where)
    if not isinstance(path, str) or not path or _leaves_folder(path):
        raise InvalidArgument(
            argument,
            "a path below the folder, relative to it",
            f"{json.dumps(path)[:200]} as '{column}' in {where}",
        )
    return path


def _leaves_folder(path: str) -> bool:
    """Read as Windows and as POSIX read it: a data set may have been made on either."""
    windows, posix = PureWindowsPath(path), PurePosixPath(path)
    return bool(windows.anchor) or posix.is_absolute() or ".." in windows.parts


def _stamp(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class CocoSource:
    """The images of an annotation file such as COCO's captions_train2017.json, in the order of their ids.

    Captions are in the order of the annotations' ids. An image without captions or without its file is a
    BadSample when it is read.

    Args:
        annotations: JSON with "images" (id, file_name) and "annotations" (id, image_id, caption).
        images: the folder of the images.

    Raises:
        InvalidArgument: for a missing file or folder, other JSON, and a file that lists no images.
    """

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.images.is_dir():
            raise InvalidArgument("images", "an existing folder", f"'{images}'")
        listed, captions = _read_annotations(self.annotations)
        self._names = [name for _, name in listed]
        self._captions = [tuple(captions.get(number, ())) for number, _ in listed]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The image's path."""
        return str(self.images / self._names[index])

    def content_hash(self, index: int) -> str:
        """SHA-256 over image and captions. BadSample."""
        return hash_sample([self.images / self._names[index]], self._captions_of(index), self.key(index))

    def stamp(self, index: int) -> str | None:
        """Name, size and time of the image, and the captions; None for a missing file."""
        try:
            return json.dumps([*_stamp(self.images / self._names[index]), self._captions[index]])
        except OSError:
            return None

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of the image, upright, from its header. BadSample."""
        return read_size(self.images / self._names[index], "image", self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. BadSample."""
        captions = self._captions_of(index)
        image = read_image(self.images / self._names[index], "image", self.key(index))
        return Sample(self.key(index), image, None, captions)

    def _captions_of(self, index: int) -> tuple[str, ...]:
        if not self._captions[index]:
            raise BadSample(f"captions: '{self.annotations}' has none for '{self.key(index)}'")
        return self._captions[index]


def _read_annotations(file: Path) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """(id, name) of the images by id, and the captions of each."""
    expected = "COCO captions in JSON"
    if not file.is_file():
        raise InvalidArgument("annotations", expected, f"'{file}', which is not a file")
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        listed = sorted((int(image["id"]), _text(image["file_name"])) for image in content["images"])
        captions: dict[int, list[str]] = {}
        for row in sorted(content["annotations"], key=lambda row: int(row["id"])):
            captions.setdefault(int(row["image_id"]), []).append(_text(row["caption"]).strip())
    except KeyError as error:
        raise InvalidArgument("annotations", expected, f"'{file}', which lacks {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise InvalidArgument("annotations", expected, f"'{file}' ({reason})") from error
    if not listed:
        raise InvalidArgument("annotations", expected, f"'{file}', which lists no images")
    for _, name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InvalidArgument(
                "annotations", expected, f"'{file}', which names '{name}', outside the folder"
            )
    return listed, captions


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text is expected")
    return value
