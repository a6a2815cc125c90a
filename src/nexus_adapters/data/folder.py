"""Image folders as samples, with captions from metadata files or from text files next to the images."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from nexus_adapters.conditions.images import HEIF_ENDINGS, image_endings
from nexus_adapters.data.ignored import Ignored
from nexus_adapters.data.listing import check_inside, list_files
from nexus_adapters.data.metadata import (
    METADATA,
    METADATA_CSV,
    Columns,
    ListedSample,
    metadata_columns,
    read_metadata,
)
from nexus_adapters.data.samples import (
    BadSample,
    Part,
    Sample,
    file_stamp,
    hash_image,
    hash_sample,
    read_image,
    read_size,
    read_stored_map,
    read_words,
)
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.packages import install_command

_IMAGE, _CAPTION = "file_name", "text"  # conventional names of the columns
_IMAGES, _MAPS = "images", "conditioning"  # folders whose files are paired by name
_TEXTS = (".txt", ".caption")  # extensions of captions; the first that exists is read


class FolderSource:
    """The images in a folder and its subfolders. Ignored files are reported in a single warning.

    metadata.jsonl has one JSON object per line with the image's path relative to the folder, its captions (a
    string or a list of strings) and, with `condition_column`, the path of its structure map. metadata.csv has
    the same as a table. Subfolders can have their own metadata.

    Without metadata, every image is a sample whose caption is the UTF-8 text in NAME.txt or NAME.caption next
    to it. If there are folders `images` and `conditioning`, or those named by `image_column` and
    `condition_column`, images in the first are paired with the maps of the same name in the second.

    Links to folders and images are followed. Reading a sample whose listed file does not exist raises
    BadSample.

    Args:
        folder: the folder with the images.
        image_column: column with the image's path.
        condition_column: column with the structure map's path; None if there are no maps.
        caption_column: column with the captions, or COLUMN:KEY for a key of a JSON object in that column.
        with_captions: False ignores captions: every sample has the empty caption.
        with_maps: False ignores the maps in a folder `conditioning`, which are not read as images either.
        allow_outside: allow metadata and captions to be links to other folders, and paths to lead outside.

    Raises:
        InvalidArgument: for a missing folder, a folder without samples, an invalid line in the metadata, and
            metadata or captions outside the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_column: str = _IMAGE,
        condition_column: str | None = None,
        caption_column: str = _CAPTION,
        *,
        with_captions: bool = True,
        with_maps: bool = True,
        allow_outside: bool = False,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            hint = (
                "Use kind table for a single Parquet, CSV or JSON lines file" if self.folder.is_file() else ""
            )
            raise InvalidArgument("folder", "an existing folder", f"'{folder}'", hint)
        self._with_captions, self._with_maps, self._allow_outside = with_captions, with_maps, allow_outside
        ignored = Ignored()
        files = list_files(self.folder, ignored)
        listings = [path for path in files if PurePosixPath(path).name in (METADATA, METADATA_CSV)]
        columns = Columns(image_column, condition_column, caption_column if with_captions else None)
        self.metadata = [self.folder / path for path in self._find_metadata(listings, columns, ignored)]
        for path in listings:  # each has been read or ignored for another reason
            del files[path]
        if self.metadata:
            self._listed = self._from_metadata(files, columns, ignored)
        else:
            self._listed = self._from_names(files, columns, caption_column, ignored)
        self._check_links(files)
        self.ignored = str(ignored)
        ignored.report(self.folder)

    def _find_metadata(self, found: Iterable[str], columns: Columns, ignored: Ignored) -> list[str]:
        """The metadata files to read, that of the folder itself first."""
        by_folder: dict[str, str] = {}
        for path in sorted(found, key=lambda path: (path.count("/"), path.endswith(METADATA_CSV), path)):
            file, below = self.folder / path, str(PurePosixPath(path).parent)
            check_inside(file, self.folder, "folder", self._allow_outside)
            if below in by_folder:
                ignored.add(f"{METADATA_CSV} next to a {METADATA}", path)
            elif path.endswith(METADATA_CSV) and columns.image not in (names := metadata_columns(file)):
                ignored.add(f"{METADATA_CSV} without a column {columns.image}{_separated(names)}", path)
            else:
                by_folder[below] = path
        return list(by_folder.values())

    def _from_metadata(
        self, files: Mapping[str, bool], columns: Columns, ignored: Ignored
    ) -> list[ListedSample]:
        listed: list[ListedSample] = []
        named: set[str] = set()
        earlier: set[str] = set()
        for file in self.metadata:
            samples, files_named = read_metadata(file, columns, self.folder, files, self._allow_outside)
            named |= files_named
            for sample in samples:
                if sample.image in earlier:
                    ignored.add("rows for images listed in other metadata", sample.image)
                else:
                    listed.append(sample)
            earlier.update(sample.image for sample in samples)
        if not listed:
            names = " and ".join(file.name for file in self.metadata)
            raise InvalidArgument("folder", f"samples in {names}", f"none in '{self.folder}'")
        endings = image_endings()
        for path in files:
            if PurePosixPath(path).suffix.lower() in endings and path not in named:
                ignored.add("images not listed in the metadata", path)
        return listed

    def _from_names(
        self, files: Mapping[str, bool], columns: Columns, caption_column: str, ignored: Ignored
    ) -> list[ListedSample]:
        folders = {PurePosixPath(path).parts[0] for path in files if "/" in path}
        images = _IMAGES if columns.image == _IMAGE else columns.image
        maps = columns.condition or _MAPS
        if {images, maps} <= folders and caption_column == _CAPTION:
            listed = _paired(files, images, maps, ignored, self._with_maps)
            if columns.condition is None and self._with_maps:
                what = f"images in {images} are paired with maps of the same name in {maps}"
                warnings.warn(f"'{self.folder}': {what}", stacklevel=3)
        elif (columns.image, columns.condition, caption_column) != (_IMAGE, None, _CAPTION):
            raise InvalidArgument(
                "folder",
                f"a {METADATA} or {METADATA_CSV} with the named columns, or folders with these names",
                f"'{self.folder}', which has no {METADATA}",
                f"Ignored: {ignored}" if ignored else "",
            )
        else:
            listed = list_images(files, ignored)
        hint = "To use images without captions, run nexus prepare --captions none"
        if not listed or (self._with_captions and not any(item.text for item in listed)):
            raise InvalidArgument(
                "folder",
                f"a {METADATA}, or images with captions in NAME.txt next to them",
                f"'{self.folder}', which has neither",
                ". ".join(filter(None, [hint if listed else "", f"Ignored: {ignored}" if ignored else ""])),
            )
        return listed

    def _check_links(self, files: Mapping[str, bool]) -> None:
        """Raise `InvalidArgument` for captions that are links to files outside the folder."""
        for item in self._listed:
            if item.text is not None and files.get(item.text):
                check_inside(self.folder / item.text, self.folder, "folder", self._allow_outside)

    def __len__(self) -> int:
        return len(self._listed)

    def key(self, index: int) -> str:
        """Return the image's path."""
        return str(self._image(index))

    def content_hash(self, index: int) -> str:
        """Return the SHA-256 of image, structure map and captions. Raises BadSample."""
        condition = self._condition(index)
        parts = [
            Part("image", self._image(index), self.key(index)),
            Part("condition", condition, str(condition)),
        ]
        return hash_sample(parts, self._captions(index))

    def image_hash(self, index: int) -> str:
        """Return the SHA-256 of the image's file. Raises BadSample."""
        return hash_image(self._image(index), self.key(index))

    def stamp(self, index: int) -> str | None:
        """Return names, sizes and times of the files, and captions in metadata; None for a missing file."""
        item = self._listed[index]
        files = [self._image(index), self._condition(index), item.text and self.folder / item.text]
        try:
            return json.dumps([[file_stamp(file) for file in files if file], item.captions])
        except (OSError, ValueError):
            return None

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) of the upright image, from its header. Raises BadSample."""
        return read_size(self._image(index), "image", self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. Raises BadSample."""
        captions = self._captions(index)
        image = read_image(self._image(index), "image", self.key(index))
        path = self._condition(index)
        condition = None if path is None else read_stored_map(path, "condition", str(path))
        return Sample(self.key(index), image, condition, captions, condition_key=str(path or ""))

    def _image(self, index: int) -> Path:
        return self.folder / self._listed[index].image

    def _condition(self, index: int) -> Path | None:
        condition = self._listed[index].condition
        return None if condition is None else self.folder / condition

    def _captions(self, index: int) -> tuple[str, ...]:
        item = self._listed[index]
        if not self._with_captions:
            return ("",)
        if item.captions is not None:
            return item.captions
        if item.text is None:
            file = self._image(index).with_suffix(_TEXTS[0])
            missing = "caption in the metadata" if self.metadata else f"'{file}'"
            raise BadSample(f"captions: '{self.key(index)}' has no {missing}")
        file = self.folder / item.text
        return (read_words(file, str(file)),)


def _separated(names: Sequence[str]) -> str:
    """A note on a table that looks like a single column because it has another separator."""
    marks = {";": "semicolons", "\t": "tabs", "|": "bars"}
    found = [words for mark, words in marks.items() if len(names) == 1 and mark in names[0]]
    return f", separated by {found[0]} instead of commas" if found else ""


def list_images(files: Iterable[str], ignored: Ignored) -> list[ListedSample]:
    """Return the images among the files, sorted, each with the text next to it. Other files are ignored."""
    endings, texts = image_endings(), _by_stem(files, _TEXTS, "second captions of an image", ignored)
    images, unused = [], set(texts)
    for path in files:
        ending = PurePosixPath(path).suffix.lower()
        if ending in endings:
            images.append(ListedSample(path, None, None, texts.get(_stem(path))))
            unused.discard(_stem(path))
        elif ending in HEIF_ENDINGS:
            ignored.add(f"HEIC images, which require {install_command('heic')}", path)
        elif ending not in _TEXTS:
            ignored.add("files that are neither images nor captions", path)
    for stem in sorted(unused):
        ignored.add("captions without an image", texts[stem])
    return sorted(images, key=lambda item: item.image)


def _paired(
    files: Iterable[str], images: str, maps: str, ignored: Ignored, with_maps: bool
) -> list[ListedSample]:
    """The images in the folder `images`, with the maps of the same name in the folder `maps`."""
    inside, found = [], []
    for path in files:
        top, _, below = path.partition("/")
        if below and top == maps and PurePosixPath(below).suffix.lower() in image_endings():
            found.append(path)
        elif below and top == images:
            inside.append(path)
        else:
            ignored.add(f"files outside {images} and {maps}", path)
    if not with_maps:
        for path in found:
            ignored.add("maps, which will be extracted from the images", path)
        return list_images(inside, ignored)
    by_name = _by_stem(found, sorted(image_endings()), "second maps of an image", ignored)
    listed, unused = [], set(by_name)
    for item in list_images(inside, ignored):
        stem = f"{maps}/{_stem(item.image).removeprefix(f'{images}/')}"
        listed.append(ListedSample(item.image, by_name.get(stem, f"{stem}.png"), None, item.text))
        unused.discard(stem)
    for stem in sorted(unused):
        ignored.add("maps without an image", by_name[stem])
    return listed


def _by_stem(files: Iterable[str], endings: Sequence[str], reason: str, ignored: Ignored) -> dict[str, str]:
    """Files by `_stem`. Of several with the same stem, the one whose ending comes first is used."""
    found: dict[str, str] = {}
    ranks = {ending: rank for rank, ending in enumerate(endings)}
    named = [path for path in files if PurePosixPath(path).suffix.lower() in ranks]
    for path in sorted(named, key=lambda path: (ranks[PurePosixPath(path).suffix.lower()], path)):
        if found.setdefault(_stem(path), path) != path:
            ignored.add(reason, path)
    return found


def _stem(path: str) -> str:
    """A path without its last ending, in a single Unicode form, since names can use either."""
    return unicodedata.normalize("NFC", str(PurePosixPath(path).with_suffix("")))
