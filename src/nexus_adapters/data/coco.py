"""A COCO captions file and its folder of images as samples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nexus_adapters.data.samples import BadSample, Sample
from nexus_adapters.data.stored import hash_sample, read_image, read_size
from nexus_adapters.errors import InvalidArgument, one_line


class CocoSource:
    """The images of an annotation file such as COCO's captions_train2017.json, in the order of their ids.

    Captions stand in the order of the annotations' ids. An image without any, or whose file is not there, is
    a BadSample when it is read.

    Args:
        annotations: JSON with "images" (id, file_name) and "annotations" (id, image_id, caption).
        images: the folder of the images.

    Raises:
        InvalidArgument: for no such file or folder, what is no such JSON, and no images in it.
    """

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        if not self.images.is_dir():
            raise InvalidArgument("images", "an existing folder", f"'{images}'")
        listed, captions = _read(self.annotations)
        self._names = [name for _, name in listed]
        self._captions = [tuple(captions.get(number, ())) for number, _ in listed]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The image's path."""
        return str(self.images / self._names[index])

    def content_hash(self, index: int) -> str:
        """SHA-256 over image and captions. BadSample."""
        return hash_sample([self.images / self._names[index]], self._of(index), self.key(index))

    def stamp(self, index: int) -> str | None:
        """Name, size and time of the image, and the captions; None for no file."""
        try:
            status = (self.images / self._names[index]).stat()
        except OSError:
            return None
        changed = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        return json.dumps([str(Path(self.key(index)).absolute()), *changed, self._captions[index]])

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of the image, upright, from its header. BadSample."""
        return read_size(self.images / self._names[index], "image", self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. BadSample."""
        captions = self._of(index)
        image = read_image(self.images / self._names[index], "image", self.key(index))
        return Sample(self.key(index), image, None, captions)

    def _of(self, index: int) -> tuple[str, ...]:
        if not self._captions[index]:
            raise BadSample(f"captions: '{self.annotations}' has none for '{self.key(index)}'")
        return self._captions[index]


def _read(file: Path) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
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
