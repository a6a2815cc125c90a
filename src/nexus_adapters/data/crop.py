"""The training sizes of samples: images are resized to cover the target size, then center-cropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from nexus_adapters.choices import MapKind
from nexus_adapters.conditions.resize import resize_map
from nexus_adapters.errors import InvalidArgument

MAX_SIDE = 2**14  # pixels; more than any base supports, but tensor sizes do not overflow yet

Size = tuple[int, int]  # (width, height), as Pillow has it


class Crop(NamedTuple):
    """SDXL's size conditioning, in pixels.

    Attributes:
        original_size: (height, width) of the image before it was resized.
        crop_top_left: (top, left) of the crop in the resized image.
        target_size: (height, width) of the crop.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The target sizes of samples: a fixed one or, with `buckets`, the bucket with the nearest aspect ratio.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        buckets: (width, height) of each bucket; empty for a fixed size.

    Raises:
        InvalidArgument: for sides of less than one pixel or more than `MAX_SIDE`.
    """

    width: int
    height: int
    buckets: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        for argument in ("width", "height"):
            side = getattr(self, argument)
            if not 1 <= side <= MAX_SIDE:
                raise InvalidArgument(argument, f"1 to {MAX_SIDE} pixels", side)

    @classmethod
    def bucketed(cls, resolution: int, step: int = 64, max_aspect: float = 2.0) -> Geometry:
        """Return a geometry with buckets of many aspect ratios and about the same number of pixels.

        Each bucket, one of which is the square, is as large as possible: if a side were one step longer, it
        would have more than resolution^2 pixels.

        Args:
            resolution: side of the square, in pixels.
            step: all sides are multiples of this, in pixels.
            max_aspect: largest ratio of the longer to the shorter side.

        Raises:
            InvalidArgument: for a step below 1, a resolution below one step, or a max_aspect below 1.
        """
        if step < 1:
            raise InvalidArgument("step", "at least 1 pixel", step)
        if resolution > MAX_SIDE:
            raise InvalidArgument("resolution", f"at most {MAX_SIDE} pixels", resolution)
        if resolution < step:
            raise InvalidArgument("resolution", f"at least one step, {step}", resolution)
        if not 1 <= max_aspect < math.inf:
            raise InvalidArgument("max_aspect", "a finite number of at least 1", max_aspect)
        largest = (resolution // step) * step
        sizes = {(largest, largest)}
        for width in range(step, int(resolution * max_aspect) + 1, step):
            height = resolution**2 // width // step * step
            is_widest = height > 0 and resolution**2 // height // step * step == width
            if is_widest and max(width, height) <= max_aspect * min(width, height):
                sizes.add((width, height))
        # Of several buckets that are equally near, Geometry.target takes the first: make it the largest.
        ordered = sorted(sizes, key=lambda size: (-size[0] * size[1], size))
        return cls(largest, largest, tuple(ordered))

    def target(self, size: Size) -> Size:
        """Return the (width, height) to which an image with this (width, height) is fitted."""
        return min(
            self.buckets or ((self.width, self.height),), key=lambda bucket: aspect_ratio(bucket, size)
        )

    def fit(
        self,
        image: Image.Image,
        target: Size,
        kind: MapKind | None = None,
        image_size: Size | None = None,
    ) -> Image.Image:
        """Resize and crop an image or a map to `target`, (width, height), in one step.

        Images are shrunk with a Lanczos filter and enlarged with a bicubic one. Maps are resized by
        `resize_map`, as their kind requires.

        Args:
            image: RGB image or map.
            target: (width, height) of the result.
            kind: the kind of structure map; None for an image.
            image_size: for a map, (width, height) of the image that it belongs to, at any scale, so that both
                are cropped to the same part. None for the size of `image`.

        Returns:
            The RGB image or map.
        """
        width, height = image_size or image.size
        (resized_width, resized_height), (left, top) = _resized(width, height, target)
        box = (  # equivalent to cropping the resized image, with a single division each
            left * image.width / resized_width,
            top * image.height / resized_height,
            (left + target[0]) * image.width / resized_width,
            (top + target[1]) * image.height / resized_height,
        )
        if kind is not None:
            return resize_map(image, target, kind, box)
        shrinks = image.width > resized_width or image.height > resized_height
        how = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
        return image.resize(target, how, box=box)

    def crop_of(self, size: Size, target: Size, original: Size | None = None) -> Crop:
        """Return SDXL's size conditioning for what `fit` does to an image with this (width, height).

        `original` is the (width, height) before the image was fitted to `size` in the same way; None if it
        was not. The result combines both crops, in the pixels of the last one.
        """
        original = original or size
        (width, height), (left, top) = _resized(*size, target)
        _, (left_before, top_before) = _resized(*original, size)
        left += round(left_before * width / size[0])
        top += round(top_before * height / size[1])
        return Crop((original[1], original[0]), (top, left), (target[1], target[0]))


def aspect_ratio(a: Size, b: Size) -> float:
    """Return the larger of two aspect ratios divided by the smaller; 1 if they are equal.

    It orders sizes like the difference of the aspect ratios' logarithms, but a single division is the same on
    every machine.
    """
    products = a[0] * b[1], a[1] * b[0]
    return max(products) / min(products)


def _resized(width: int, height: int, target: Size) -> tuple[Size, tuple[int, int]]:
    """The smallest size that covers the target, and (left, top) of the target in its center."""
    if target[0] * height >= target[1] * width:
        resized = target[0], max(target[1], (2 * height * target[0] + width) // (2 * width))
    else:
        resized = max(target[0], (2 * width * target[1] + height) // (2 * height)), target[1]
    return resized, ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)
