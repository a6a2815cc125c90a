"""A folder of images with metadata.jsonl, as in Hugging Face's "imagefolder", or with texts beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nexus_adapters.data.folder_listing import METADATA, Listed, list_images, read_metadata
from nexus_adapters.data.samples import BadSample, Sample
from nexus_adapters.data.stored import hash_sample, read_image, read_size, read_text
from nexus_adapters.errors import InvalidArgument

_IMAGE, _CAPTION = "file_name", "text"  # the columns as the convention names them


class FolderSource:
    """The samples of a folder.

    metadata.jsonl has a JSON object a line: the image's path relative to the folder, its captions (a string
    or a list of strings), and, where asked for, the path of its structure map. Without metadata.jsonl, and
    with the columns left as they are, every image in the folder and below is a sample; the UTF-8 text of
    NAME.txt beside it is its caption.

    A listed file that is not there is a BadSample when it is read.

    Args:
        folder: where they are.
        image_column: of the image's path.
        condition_column: of the structure map's path; None where there are no maps.
        caption_column: of the captions.

    Raises:
        InvalidArgument: for no folder, no samples, and whatever is wrong with a line of metadata.jsonl.
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

    def _list(self, image_column: str, condition_column: str | None, caption_column: str) -> list[Listed]:
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
        """Names, sizes and times of the files, and the captions that metadata.jsonl has; None for no file."""
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
        condition = None if path is None else read_image(path, "condition", str(path))
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


def _stamp(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
