"""Samples as training reads them: image and structure map at the size that geometry gives, by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from nexus_adapters.conditions import EXTRACTORS, extract
from nexus_adapters.data.crop import Geometry, aspect_ratio
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.files import append_json_lines, read_json_lines

_KEPT_EVERY = 1000  # hashes, so that little is lost to a kill


class KnownHashes:
    """What samples' content hashes were, by `Source.stamp`, in a file that several processes may add to.

    A sample without a stamp is hashed every time. A file that is damaged, or missing, costs time alone.

    Args:
        file: JSON lines; its folder is made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = dict(_pairs(file))
        self._new: dict[str, str] = {}

    def content_hash(self, source: Source, index: int) -> str:
        """The hash of a sample's content: the known one, or computed. BadSample where it cannot be read."""
        stamp = source.stamp(index)
        if stamp is None:
            return source.content_hash(index)
        name = hashlib.sha256(stamp.encode()).hexdigest()[:32]
        if name not in self._known:
            self._known[name] = self._new[name] = source.content_hash(index)
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


_MAX_ASPECT_RATIO = 1.01


@dataclass(frozen=True)
class FittedSample:
    """A fitted sample.

    Attributes:
        key: names it in messages and reports.
        image: RGB, at the target size.
        condition: RGB, of the image's size.
        captions: at least one.
        original_size: (height, width) of the image before it was fitted.
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
        """What SDXL is told: original height and width, top and left of the crop, height and width."""
        told = (*self.original_size, *self.crop_top_left, self.image.height, self.image.width)
        return tuple(float(number) for number in told)


def fit_sample(
    source: Source, index: int, geometry: Geometry, extractor_name: str, options: Mapping[str, object]
) -> FittedSample:
    """Load a sample, fit it, and draw its structure map where it has none.

    The map is drawn from the fitted image, at the scale that the base is trained at, as it is in generation:
    lines stay one pixel wide. A map that the source has may be of another size than the image, but has to
    show the same: the same part of both is kept.

    Args:
        source: the data set.
        index: of the sample.
        geometry: what sizes there are.
        extractor_name: what draws a missing map, and what kind of map a present one is.
        options: of the extractor.

    Raises:
        BadSample: where it cannot be read, or where the aspects of image and map differ by more than 1 % and
            by more than rounding to whole pixels makes.
        InvalidArgument: for an unknown extractor or option, where one is needed.
    """
    sample = source.load(index)
    size = sample.image.size
    target = geometry.target(size)
    image = geometry.fit(sample.image, target)
    if sample.condition is None:
        condition = extract(extractor_name, image, **options)
    else:
        _check_aspects(size, sample.condition.size, sample.key)
        is_labels = extractor_name in EXTRACTORS and EXTRACTORS[extractor_name].labels
        condition = geometry.fit(sample.condition, target, is_map=True, labels=is_labels, window_of=size)
    crop = geometry.crop_of(size, target)
    return FittedSample(sample.key, image, condition, sample.captions, crop.original_size, crop.crop_top_left)


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
class Fitting:
    """How a source's samples are fitted.

    Attributes:
        source: the samples.
        geometry: what sizes they are fitted to.
        extractor: what draws the structure maps that the source has not.
        options: of the extractor.
    """

    source: Source
    geometry: Geometry
    extractor: str
    options: Mapping[str, object] = field(default_factory=dict)

    def fit(self, index: int) -> FittedSample:
        """The sample; BadSample where it cannot be read."""
        return fit_sample(self.source, index, self.geometry, self.extractor, self.options)

    def target(self, index: int) -> tuple[int, int]:
        """(width, height) that the sample is fitted to; BadSample where its size cannot be read."""
        return self.geometry.target(self.source.size(index))

    def content_hash(self, index: int, known: KnownHashes) -> str:
        """SHA-256 over all that `fit` makes the sample of; BadSample where it cannot be read."""
        made_of = [
            known.content_hash(self.source, index),
            repr(self.geometry),
            self.extractor,
            sorted(self.options.items()),
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
