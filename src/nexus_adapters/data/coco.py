"""Images with the captions of a COCO annotation file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nexus_adapters.data.listing import OUTSIDE_HINT, check_inside, find_path, leaves_folder
from nexus_adapters.data.samples import (
    BadSample,
    Part,
    Sample,
    file_stamp,
    hash_image,
    hash_sample,
    read_image,
    read_size,
)
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import read_regular


class CocoSource:
    """The images of an annotation file such as COCO's captions_train2017.json, in the order of their ids.

    Captions are in the order of the annotations' ids. Reading an image without captions, or one whose file is
    missing, raises BadSample.

    Args:
        annotations: a JSON file with "images" (id, file_name) and "annotations" (id, image_id, caption).
        images: the folder with the images.
        with_captions: False ignores captions: every sample has the empty caption.
        allow_outside: allow the annotation file to be a link to another folder, and paths to lead outside.

    Raises:
        InvalidArgument: for a missing file or folder, JSON of another form, or a file that lists no images.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        *,
        with_captions: bool = True,
        allow_outside: bool = False,
    ) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.images.is_dir():
            raise InvalidArgument("images", "an existing folder", f"'{images}'")
        if self.annotations.is_file():
            # Both are usually in one folder, inside which the annotation file may be a link.
            both = Path(os.path.commonpath([self.annotations.parent.absolute(), self.images.absolute()]))
            check_inside(self.annotations, both, "annotations", allow_outside)
        listed, captions = _read_annotations(self.annotations, allow_outside)
        self._names = [name for _, name in listed]
        self._captions = [tuple(captions.get(number, ())) if with_captions else ("",) for number, _ in listed]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """Return the image's path."""
        return str(self.images / self._names[index])

    def content_hash(self, index: int) -> str:
        """Return the SHA-256 of image and captions. Raises BadSample."""
        return hash_sample([Part("image", self._image(index), self.key(index))], self._captions_of(index))

    def image_hash(self, index: int) -> str:
        """Return the SHA-256 of the image's file. Raises BadSample."""
        return hash_image(self._image(index), self.key(index))

    def stamp(self, index: int) -> str | None:
        """Return name, size and time of the image, and the captions; None for a missing file."""
        try:
            return json.dumps([*file_stamp(self._image(index)), self._captions[index]])
        except (OSError, ValueError):
            return None

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) of the upright image, from its header. Raises BadSample."""
        return read_size(self._image(index), "image", self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. Raises BadSample."""
        captions = self._captions_of(index)
        return Sample(
            self.key(index), read_image(self._image(index), "image", self.key(index)), None, captions
        )

    def _image(self, index: int) -> Path:
        return self.images / find_path(self.images, self._names[index])

    def _captions_of(self, index: int) -> tuple[str, ...]:
        if not self._captions[index]:
            raise BadSample(f"captions: '{self.annotations}' has none for '{self.key(index)}'")
        return self._captions[index]


def _read_annotations(file: Path, allow_outside: bool) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """(id, name) of the images, sorted by id, and the captions of each."""
    expected = "COCO captions in JSON"
    if not file.is_file():
        raise InvalidArgument("annotations", expected, f"'{file}', which is not a file")
    try:
        content: Any = json.loads(read_regular(file).decode("utf-8-sig"))
        listed = sorted((int(image["id"]), _text(image["file_name"])) for image in content["images"])
        captions: dict[int, list[str]] = {}
        for row in sorted(content["annotations"], key=lambda row: int(row["id"])):
            captions.setdefault(int(row["image_id"]), []).append(_text(row["caption"]).strip())
    except KeyError as error:
        raise InvalidArgument("annotations", expected, f"'{file}', in which {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = one_line(error)
        raise InvalidArgument("annotations", expected, f"'{file}' ({reason})") from error
    if not listed:
        raise InvalidArgument("annotations", expected, f"'{file}', which lists no images")
    for _, name in listed:
        if leaves_folder(name) and not allow_outside:
            raise InvalidArgument(
                "annotations", expected, f"'{file}', which lists '{name}' outside the folder", OUTSIDE_HINT
            )
    return listed, captions


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text is expected")
    return value
