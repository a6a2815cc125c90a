"""One sample as training reads it: image and structure map at the size that geometry gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from nexus_adapters.conditions import EXTRACTORS, extract
from nexus_adapters.data.geometry import Geometry, aspect_ratio
from nexus_adapters.data.samples import BadSample, Source

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
