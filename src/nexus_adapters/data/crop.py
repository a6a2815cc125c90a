"""The sizes that samples are trained at: images are resized to cover one, then cropped to its center."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from nexus_adapters.choices import MapKind
from nexus_adapters.conditions.resize import resize_map
from nexus_adapters.errors import InvalidArgument

MAX_SIDE = (
    2**14
)  # pixels of a side: beyond any base's, and its tensors' sizes are still counted without overflow

Size = tuple[int, int]  # (width, height), as Pillow has it


class Crop(NamedTuple):
    """SDXL's size conditioning, each (height, width) or (top, left), in pixels.

    Attributes:
        original_size: of the image before it was resized.
        crop_top_left: in the resized image, of what is kept.
        target_size: of what is kept.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The sizes that samples are fitted to: one, or where there are `buckets`, the one of nearest aspect.

    Attributes:
        width: in pixels.
        height: in pixels.
        buckets: (width, height) of each; empty for one fixed size.

    Raises:
        InvalidArgument: for sides below one pixel, and above `MAX_SIDE`.
    """

    width: int
    height: int
    buckets: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        for argument in ("width", "height"):
            side = getattr(self, argument)
            if not 1 <= side <= MAX_SIDE:
                raise InvalidArgument(argument, f"at least 1 and at most {MAX_SIDE} pixels", side)

    @classmethod
    def bucketed(cls, resolution: int, step: int = 64, max_aspect: float = 2.0) -> Geometry:
        """Sizes of many aspects, with about the pixels of a square.

        A bucket is as large as fits into resolution^2 pixels: no side can grow by a step. The square is one.

        Args:
            resolution: side of the square, in pixels.
            step: what every side is a multiple of.
            max_aspect: of the longer to the shorter side.

        Raises:
            InvalidArgument: for a step below 1, a resolution below a step, or a max_aspect below 1.
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
        # Geometry.target takes the first of several that are equally near: let it be the largest.
        ordered = sorted(sizes, key=lambda size: (-size[0] * size[1], size))
        return cls(largest, largest, tuple(ordered))

    def target(self, size: Size) -> Size:
        """The (width, height) that an image of this (width, height) is fitted to."""
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
        """Resize and crop to `target`, (width, height), in one step.

        Images are resized by Lanczos where they shrink and bicubically where they grow. Maps are resized by
        `resize_map`, as their kind needs it.

        Args:
            image: RGB.
            target: of the result.
            kind: of a structure map; None for an image.
            image_size: for a map, (width, height) of the image that it belongs to, at any scale: the same
                part of both is kept. None for `image`'s own size.

        Returns:
            RGB.
        """
        width, height = image_size or image.size
        (resized_width, resized_height), (left, top) = _resized(width, height, target)
        box = (  # the same as cutting from the resized image; each is one division, which rounds to no more
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
        """What `fit` does to an image of this (width, height), as SDXL's size conditioning states it.

        `original`: what the image was before it was fitted to `size` in the same way; None for `size`. Both
        crops then count, in the pixels of the last one.
        """
        original = original or size
        (width, height), (left, top) = _resized(*size, target)
        _, (left_before, top_before) = _resized(*original, size)
        left += round(left_before * width / size[0])
        top += round(top_before * height / size[1])
        return Crop((original[1], original[0]), (top, left), (target[1], target[0]))


def aspect_ratio(a: Size, b: Size) -> float:
    """How many times longer, at the same height, the longer of two sizes is; 1 for equal aspects.

    The logarithms of aspects lie as far apart as that of this, and one division is the same on every machine.
    """
    products = a[0] * b[1], a[1] * b[0]
    return max(products) / min(products)


def _resized(width: int, height: int, target: Size) -> tuple[Size, tuple[int, int]]:
    """The size that just covers the target, and (left, top) of the target in its middle."""
    if target[0] * height >= target[1] * width:
        resized = target[0], max(target[1], (2 * height * target[0] + width) // (2 * width))
    else:
        resized = max(target[0], (2 * width * target[1] + height) // (2 * height)), target[1]
    return resized, ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)
