"""An evaluation's folder, with images and scores by batch, so that an interrupted evaluation can be resumed.

settings.json           all that determines the images, and the adapters
METHOD/images/*.png     the images, by index
METHOD/drawn/*.json     for each finished batch of images, how long it took
METHOD/scores-*/*.npz   the scores of each batch; other scoring settings use another folder
"""

from __future__ import annotations

import json
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import is_leftover, replacing, write_json
from nexus_adapters.training.run_identity import flat

SETTINGS = "settings.json"
UNREADABLE_ARCHIVE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What `numpy.load` raises for damaged files and files that are not archives."""
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Store:
    """The batches of one method. `scoring` is a hash of what determines the scores.

    A batch with missing or damaged files counts as unfinished and is made again.
    """

    folder: Path
    scoring: str

    def images(self, places: range) -> list[Image.Image] | None:
        """Return the images of a batch; None unless all of them were generated and are readable."""
        if self.generation_s(places) is None:
            return None
        images = []
        for place in places:
            file = self._image(place)
            try:
                with Image.open(file, formats=("PNG",)) as image:
                    images.append(image.convert("RGB"))
            except Exception as error:  # Pillow can raise almost anything for damaged bytes
                self._mark(places).unlink(missing_ok=True)
                _warn(file, error)
                return None
        return images

    def has_images(self, places: range) -> bool:
        """Return whether a batch's images exist. Only their ends are checked; they are not decoded."""
        return self.generation_s(places) is not None and all(
            _is_whole_png(self._image(place)) for place in places
        )

    def generation_s(self, places: range) -> float | None:
        """Return how long it took to generate the batch, in seconds; None if it was not generated."""
        file = self._mark(places)
        if not file.is_file():
            return None
        try:
            return float(json.loads(file.read_bytes())["draw_s"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            _warn(file, error)
            return None

    def keep_images(self, places: range, images: Sequence[Image.Image], generation_s: float) -> None:
        """Write a batch's images and then the file that marks them as finished."""
        for place, image in zip(places, images, strict=True):
            with replacing(self._image(place)) as stream:
                image.save(stream, format="PNG", compress_level=1)
        write_json(self._mark(places), {"draw_s": round(generation_s, 3), "pictures": len(places)})

    def scores(self, places: range) -> dict[str, np.ndarray] | None:
        """Return the scores of a batch; None if it has none with these settings."""
        file = self._scores(places)
        if not file.is_file():
            return None
        try:
            with np.load(file) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            float(found["score_s"])
            if any(len(values) != len(places) for name, values in found.items() if name != "score_s"):
                raise ValueError("scores of other images")
        except (*UNREADABLE_ARCHIVE, TypeError) as error:
            _warn(file, error)
            return None
        return found

    def keep_scores(self, places: range, scores: Mapping[str, np.ndarray]) -> None:
        """Write a batch's scores."""
        with replacing(self._scores(places)) as stream:
            np.savez(stream, **scores)  # type: ignore[arg-type]

    def _image(self, place: int) -> Path:
        return self.folder / "images" / f"{place:05d}.png"

    def _mark(self, places: range) -> Path:
        return self.folder / "drawn" / f"{places.start:05d}-{places.stop:05d}.json"

    def _scores(self, places: range) -> Path:
        return self.folder / f"scores-{self.scoring[:12]}" / f"{places.start:05d}-{places.stop:05d}.npz"


def _is_whole_png(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            stream.seek(-len(_PNG_END), os.SEEK_END)
            return stream.read() == _PNG_END
    except OSError:
        return False


def _warn(file: Path, error: Exception) -> None:
    warnings.warn(f"'{file}' is unreadable ({one_line(error)}) and will be made again", stacklevel=3)


def claim(
    folder: Path, settings: Mapping[str, Any], adapters: Mapping[str, str], defaults: Mapping[str, Any]
) -> None:
    """Write the settings of an evaluation into its folder, or check that it was started with the same ones.

    Args:
        folder: a new or empty folder, or the folder of an evaluation.
        settings: all that determines the images, except the adapters.
        adapters: name -> SHA-256; those of earlier calls are kept.
        defaults: defaults of settings that an earlier version may not have had.

    Raises:
        InvalidArgument: for a folder with other files, or with images of other settings.
    """
    file = folder / SETTINGS
    if file.is_file():
        before = _read_settings(file)
        now = flat(settings)
        unknown = {key: value for key, value in flat(defaults).items() if key in now}
        _compare(unknown | flat(before["drawing"]), now, folder)
        common = [name for name in adapters if name in before["adapters"]]
        _compare({n: before["adapters"][n] for n in common}, {n: adapters[n] for n in common}, folder)
        adapters = {**before["adapters"], **adapters}
    elif folder.is_dir() and (others := sorted(p.name for p in folder.iterdir() if not is_leftover(p.name))):
        raise InvalidArgument(
            "out",
            "a new or empty folder, or the folder of an evaluation",
            f"'{folder}', which contains {others[0]} but no {SETTINGS}",
        )
    write_json(file, {"drawing": settings, "adapters": adapters}, indent=2)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        if not all(isinstance(content[key], dict) for key in ("drawing", "adapters")):
            raise TypeError("no tables")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgument(
            "out",
            "a new or empty folder, or the folder of an evaluation",
            f"'{file.parent}', whose {SETTINGS} is not from an evaluation",
        ) from error
    return content


_IN_WORDS = {
    "data_sha256": "samples (images, maps or captions)",
    "base_sha256": "weights or configs of the base",
}


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            if key in _IN_WORDS:
                raise InvalidArgument(
                    "out",
                    f"a new folder for other {_IN_WORDS[key]}",
                    f"'{folder}', which was made with different ones",
                )
            raise InvalidArgument(
                "out",
                f"a new folder for {key}={now.get(key)!r}",
                f"'{folder}', whose images were made with {before.get(key)!r}",
            )
