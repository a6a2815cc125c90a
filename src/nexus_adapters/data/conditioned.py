"""Samples as training reads them, by index: image and structure map, resized and cropped in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nexus_adapters.choices import MapKind
from nexus_adapters.conditions import EXTRACTORS, Extractor, extract, find_extractor
from nexus_adapters.conditions.maps import read_map, split_map_options
from nexus_adapters.conditions.resize import judge_kind
from nexus_adapters.data.crop import Geometry, aspect_ratio
from nexus_adapters.data.listing import exists
from nexus_adapters.data.samples import BadSample, Sample, Source
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import append_json_lines, folder_sha256, read_json_lines
from nexus_adapters.registry import source_of

_MAX_ASPECT_RATIO = 1.01
_KEPT_EVERY = 1000  # hashes, so that little is lost if the process is killed
_HASHING = 2  # version of the hash; a new number makes stored hashes be computed again


@dataclass(frozen=True)
class FittedSample:
    """A sample at its target size.

    Attributes:
        key: its name in messages and reports.
        image: RGB image at the target size.
        condition: RGB structure map with the size of the image.
        captions: at least one caption.
        original_size: (height, width) of the image before it was resized, including by `nexus prepare`.
        crop_top_left: (top, left) of the crop in the resized image.
    """

    key: str
    image: Image.Image
    condition: Image.Image
    captions: tuple[str, ...]
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]

    @property
    def time_ids(self) -> tuple[float, ...]:
        """Return SDXL's size conditioning: original height, width; top, left of the crop; height, width."""
        numbers = (*self.original_size, *self.crop_top_left, self.image.height, self.image.width)
        return tuple(float(number) for number in numbers)


def fit_sample(
    source: Source, index: int, geometry: Geometry, condition_name: str, options: Mapping[str, object]
) -> FittedSample:
    """Load a sample, resize and crop it, and extract its structure map if it has none.

    As in generation, the map is extracted from the resized image, so lines are one pixel wide at the
    resolution of the base. A map from the source may differ in size from the image but must show the same
    content; both are cropped to the same part. It is read by `read_map`.

    Args:
        source: the dataset.
        index: index of the sample.
        geometry: the target sizes.
        condition_name: the extractor for missing maps, which also determines the kind of existing maps.
        options: options of the extractor, or of `read_map` for maps of its kind.

    Raises:
        BadSample: if the sample cannot be read, or if the aspect ratios of image and map differ by more than
            1 % and by more than rounding to whole pixels explains.
        InvalidArgument: for an unknown extractor or option if one is needed.
    """
    return _fitted(source.load(index), geometry, condition_name, options)


def _fitted(
    sample: Sample, geometry: Geometry, condition_name: str, options: Mapping[str, object]
) -> FittedSample:
    size = sample.image.size
    target = geometry.target(size)
    given = _given_map(sample, condition_name, options)
    image = geometry.fit(sample.image, target)
    if given is None:
        condition = extract(condition_name, image, **options_for(condition_name, options)[1])
    else:
        kind = declared_kind(condition_name)
        condition = geometry.fit(given, target, kind or judge_kind(np.asarray(given)), image_size=size)
    crop = geometry.crop_of(size, target, sample.original_size)
    return FittedSample(sample.key, image, condition, sample.captions, crop.original_size, crop.crop_top_left)


def declared_kind(condition_name: str) -> MapKind | None:
    """Return the kind of map that the extractor with this name makes; None if there is no such extractor."""
    return EXTRACTORS[condition_name].kind if condition_name in EXTRACTORS else None


def options_for(
    condition_name: str, options: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, object]]:
    """Split a condition's options into those for `read_map` and those for the extractor."""
    if condition_name not in EXTRACTORS:
        return {}, dict(options)
    extractor = EXTRACTORS[condition_name]
    return split_map_options(extractor.kind, options, extractor.options())


def _given_map(sample: Sample, condition_name: str, options: Mapping[str, object]) -> Image.Image | None:
    """A sample's own map as RGB; None if it has none. Raises BadSample for one that cannot be used."""
    if sample.condition is None:
        return None
    key = sample.condition_key or sample.key
    _check_aspects(sample.image.size, sample.condition.size, key)
    reading, _ = options_for(condition_name, options)
    try:
        return read_map(sample.condition, declared_kind(condition_name), **reading)
    except InvalidArgument as error:
        if error.name != "condition":  # an option, which is wrong for all samples
            raise
        raise BadSample(f"{error} in '{key}'") from error


def _check_aspects(image: tuple[int, int], condition: tuple[int, int], key: str) -> None:
    if aspect_ratio(image, condition) <= _MAX_ASPECT_RATIO:
        return
    scale = max(condition[0] / image[0], condition[1] / image[1])
    if all(abs(side * scale - other) < 1 for side, other in zip(image, condition, strict=True)):
        return  # for a small map, rounding to whole pixels makes a larger difference
    raise BadSample(
        f"condition: expected the aspect ratio of the image, {image[0]}x{image[1]}, got "
        f"{condition[0]}x{condition[1]} in '{key}'"
    )


@dataclass(frozen=True)
class ConditionedSource:
    """A source whose samples are fitted to their target size and have a structure map.

    Attributes:
        source: the samples.
        geometry: their target sizes.
        condition_name: the extractor for maps that the source does not have.
        options: options of the extractor.
    """

    source: Source
    geometry: Geometry
    condition_name: str
    options: Mapping[str, object] = field(default_factory=dict)

    def fit(self, index: int) -> FittedSample:
        """Return the fitted sample. Raises BadSample if it cannot be read."""
        return fit_sample(self.source, index, self.geometry, self.condition_name, self.options)

    def load(self, index: int) -> Sample:
        """Return the unfitted sample without extracting a map. Raises BadSample as `fit` would."""
        sample = self.source.load(index)
        _given_map(sample, self.condition_name, self.options)
        return sample

    def target(self, index: int) -> tuple[int, int]:
        """Return the sample's target (width, height). Raises BadSample if its own size cannot be read."""
        return self.geometry.target(self.source.size(index))

    def content_hash(self, index: int, known: KnownHashes) -> str:
        """Return the SHA-256 of all that determines the result of `fit`. Raises BadSample."""
        made_of = [known.content_hash(self.source, index), self._maker]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @cached_property
    def _maker(self) -> list[object]:
        """All else that determines the result of `fit`: sizes, the resizing code, and the extractor."""
        name = self.condition_name
        extractor = _identity_of(find_extractor(name), self.options) if name in EXTRACTORS else None
        return [repr(self.geometry), name, _fitting_sha256(name), extractor]


def _identity_of(extractor: Extractor, options: Mapping[str, object]) -> list[object]:
    """An extractor's code and options; files and folders in options are represented by their content."""
    used = {**extractor.defaults(), **options}
    code = hashlib.sha256(source_of(extractor.extract).encode()).hexdigest()
    return [code, sorted((name, _content_of(used[name], name in extractor.files)) for name in used)]


def _content_of(value: object, may_be_file: bool) -> object:
    if may_be_file and isinstance(value, str) and exists(value):
        return folder_sha256(Path(value))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole else value  # type: ignore[arg-type]  # an int


def _fitting_sha256(condition_name: str) -> str:
    """SHA-256 of an image and a map of twice its size, each made smaller and larger.

    It reveals changes in resizing, whether in this package or in Pillow.
    """
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    condition = np.zeros((80, 120, 3), np.uint8)
    condition[::9] = condition[:, ::7] = 255  # lines
    condition[40:, 60:] = random.integers(0, 128, (40, 60, 3))
    sample = Sample("witness", Image.fromarray(image), Image.fromarray(condition), ("",))
    digest = hashlib.sha256()
    for geometry in (Geometry(24, 20), Geometry(90, 60), Geometry(150, 100)):
        fitted = _fitted(sample, geometry, condition_name, {})
        digest.update(fitted.image.tobytes() + fitted.condition.tobytes())
    return digest.hexdigest()


class KnownHashes:
    """Hashes of samples and images by `Source.stamp`, in a file that several processes can append to.

    A sample without a stamp is hashed every time. If the file is damaged or missing, samples are hashed
    again.

    Args:
        file: JSON lines file; its folder is created if it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = dict(_pairs(file))
        self._new: dict[str, str] = {}

    def content_hash(self, source: Source, index: int) -> str:
        """Return the hash of a sample's content, computed if it is unknown. Raises BadSample."""
        return self._hash("content", source.content_hash, source, index)

    def image_hash(self, source: Source, index: int) -> str:
        """Return the hash of a sample's image, computed if it is unknown. Raises BadSample."""
        return self._hash("image", source.image_hash, source, index)

    def _hash(self, of: str, compute: Callable[[int], str], source: Source, index: int) -> str:
        stamp = source.stamp(index)
        if stamp is None:
            return compute(index)
        name = hashlib.sha256(f"{_HASHING} {of} {stamp}".encode()).hexdigest()[:32]
        if name not in self._known:
            self._known[name] = self._new[name] = compute(index)
            if len(self._new) >= _KEPT_EVERY:
                self.keep()
        return self._known[name]

    @contextmanager
    def kept(self) -> Iterator[KnownHashes]:
        """Store the hashes that are computed inside, also if an error occurs."""
        try:
            yield self
        finally:
            self.keep()

    def keep(self) -> None:
        """Append new hashes to the file. Raises OSError if the disk is full."""
        if not self._new:
            return
        append_json_lines(self.file, self._new.items())
        self._new = {}


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for pair in read_json_lines(file, list):
        name, content_hash = pair if len(pair) == 2 else (None, None)
        if isinstance(name, str) and isinstance(content_hash, str) and len(content_hash) == 64:
            yield name, content_hash
