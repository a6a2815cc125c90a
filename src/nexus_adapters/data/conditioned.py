"""Samples as training reads them: image and structure map, resized and cropped alike, by number."""

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
_KEPT_EVERY = 1000  # hashes, so that little is lost to a kill
_HASHING = 2  # a new number for hashes of another form: those that are kept are computed again


@dataclass(frozen=True)
class FittedSample:
    """A sample at its target size.

    Attributes:
        key: names it in messages and reports.
        image: RGB, at the target size.
        condition: RGB, of the image's size.
        captions: at least one.
        original_size: (height, width) of the image before it was resized, by a prepared set too.
        crop_top_left: (top, left) of what was kept, in the resized image.
    """

    key: str
    image: Image.Image
    condition: Image.Image
    captions: tuple[str, ...]
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]

    @property
    def time_ids(self) -> tuple[float, ...]:
        """SDXL's size conditioning: original height and width, top and left of the crop, height and width."""
        numbers = (*self.original_size, *self.crop_top_left, self.image.height, self.image.width)
        return tuple(float(number) for number in numbers)


def fit_sample(
    source: Source, index: int, geometry: Geometry, condition_name: str, options: Mapping[str, object]
) -> FittedSample:
    """Load a sample, resize and crop it, and extract its structure map where it has none.

    The map is extracted from the resized image, at the scale that the base is trained at, as in generation:
    lines stay one pixel wide. A map that the source has may differ in size from the image, but has to show
    the same: the same part of both is kept. It is read by `read_map`.

    Args:
        source: the dataset.
        index: of the sample.
        geometry: the target sizes.
        condition_name: of the extractor of missing maps; says what kind of map a present one is.
        options: of the extractor, or of `read_map` for maps of its kind.

    Raises:
        BadSample: where it cannot be read, or where the aspects of image and map differ by more than 1 % and
            by more than rounding to whole pixels makes.
        InvalidArgument: for an unknown extractor or option, where one is needed.
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
    """The kind of map that the extractor of this name makes; None where there is none."""
    return EXTRACTORS[condition_name].kind if condition_name in EXTRACTORS else None


def options_for(
    condition_name: str, options: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, object]]:
    """What of a condition's options `read_map` takes, and what its extractor takes."""
    if condition_name not in EXTRACTORS:
        return {}, dict(options)
    extractor = EXTRACTORS[condition_name]
    return split_map_options(extractor.kind, options, extractor.options())


def _given_map(sample: Sample, condition_name: str, options: Mapping[str, object]) -> Image.Image | None:
    """The map that a sample has, as RGB; None where it has none. BadSample for one that cannot be used."""
    if sample.condition is None:
        return None
    key = sample.condition_key or sample.key
    _check_aspects(sample.image.size, sample.condition.size, key)
    reading, _ = options_for(condition_name, options)
    try:
        return read_map(sample.condition, declared_kind(condition_name), **reading)
    except InvalidArgument as error:
        if error.name != "condition":  # an option, wrong for all samples alike
            raise
        raise BadSample(f"{error} in '{key}'") from error


def _check_aspects(image: tuple[int, int], condition: tuple[int, int], key: str) -> None:
    if aspect_ratio(image, condition) <= _MAX_ASPECT_RATIO:
        return
    scale = max(condition[0] / image[0], condition[1] / image[1])
    if all(abs(side * scale - other) < 1 for side, other in zip(image, condition, strict=True)):
        return  # a small map: rounding to whole pixels makes more than that
    raise BadSample(
        f"condition: expected the aspect of the image, {image[0]}x{image[1]}, got "
        f"{condition[0]}x{condition[1]} in '{key}'"
    )


@dataclass(frozen=True)
class ConditionedSource:
    """A source whose samples have their target size and a structure map.

    Attributes:
        source: the samples.
        geometry: their target sizes.
        condition_name: of the extractor of maps that the source lacks.
        options: of the extractor.
    """

    source: Source
    geometry: Geometry
    condition_name: str
    options: Mapping[str, object] = field(default_factory=dict)

    def fit(self, index: int) -> FittedSample:
        """The sample; BadSample where it cannot be read."""
        return fit_sample(self.source, index, self.geometry, self.condition_name, self.options)

    def load(self, index: int) -> Sample:
        """The sample as it is in the source, unless `fit` would refuse it: BadSample. No map is extracted."""
        sample = self.source.load(index)
        _given_map(sample, self.condition_name, self.options)
        return sample

    def target(self, index: int) -> tuple[int, int]:
        """The sample's target (width, height); BadSample where its own size cannot be read."""
        return self.geometry.target(self.source.size(index))

    def content_hash(self, index: int, known: KnownHashes) -> str:
        """SHA-256 over all that decides what `fit` returns; BadSample where the sample cannot be read."""
        made_of = [known.content_hash(self.source, index), self._maker]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @cached_property
    def _maker(self) -> list[object]:
        """Whatever else decides what `fit` returns: sizes, the resizing code, and the extractor."""
        name = self.condition_name
        extractor = _identity_of(find_extractor(name), self.options) if name in EXTRACTORS else None
        return [repr(self.geometry), name, _fitting_sha256(name), extractor]


def _identity_of(extractor: Extractor, options: Mapping[str, object]) -> list[object]:
    """An extractor's code, and its options, of which names of files and folders stand for their content."""
    used = {**extractor.defaults(), **options}
    code = hashlib.sha256(source_of(extractor.extract).encode()).hexdigest()
    return [code, sorted((name, _content_of(used[name], name in extractor.files)) for name in used)]


def _content_of(value: object, may_be_file: bool) -> object:
    if may_be_file and isinstance(value, str) and exists(value):
        return folder_sha256(Path(value))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole else value  # type: ignore[arg-type]  # an int


def _fitting_sha256(condition_name: str) -> str:
    """SHA-256 over what an image and a map of twice its size become that shrink, and that grow.

    So changed resizing is noticed, by this package or by Pillow.
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
    """Hashes of samples and of their images, by `Source.stamp`, in a file that several processes may add to.

    A sample without a stamp is hashed every time. Where the file is damaged or missing, samples are hashed
    again.

    Args:
        file: JSON lines; its folder is created where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = dict(_pairs(file))
        self._new: dict[str, str] = {}

    def content_hash(self, source: Source, index: int) -> str:
        """The hash of a sample's content, computed unless it is known. BadSample where it cannot be read."""
        return self._hash("content", source.content_hash, source, index)

    def image_hash(self, source: Source, index: int) -> str:
        """The same for its image alone."""
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
        """Keep what is computed inside, also where an error ends it."""
        try:
            yield self
        finally:
            self.keep()

    def keep(self) -> None:
        """Append what is new to the file. OSError where the disk is full."""
        if not self._new:
            return
        append_json_lines(self.file, self._new.items())
        self._new = {}


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for pair in read_json_lines(file, list):
        name, content_hash = pair if len(pair) == 2 else (None, None)
        if isinstance(name, str) and isinstance(content_hash, str) and len(content_hash) == 64:
            yield name, content_hash
