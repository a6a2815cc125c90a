"""Which samples are left out of a prepared set, and why. All filters are off until they are given a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nexus_adapters.data.samples import Sample
from nexus_adapters.errors import expect


class LeftOut(Exception):  # noqa: N818  # not an error: the user asked for it, or the sample cannot be read
    """A sample that is not in the set.

    Attributes:
        kind: of reason: "unreadable", "small", "aspect", "caption", "near-duplicate", "map" or "image".
        reason: what was expected and what came.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Filters:
    """Limits.

    Attributes:
        min_side: of the shorter side, in pixels; 0 for none.
        max_aspect: of the longer to the shorter side; 0 for none.
        min_caption_length: in characters; captions shorter are dropped, and samples without any left.
        max_caption_length: likewise for longer ones; 0 for none.
        near_duplicates: images whose 64-bit perceptual hashes differ in at most so many bits from an earlier
            one's are left out; None keeps all.

    Raises:
        InvalidArgument: for limits that no sample could keep.
    """

    min_side: int = 0
    max_aspect: float = 0.0
    min_caption_length: int = 0
    max_caption_length: int = 0
    near_duplicates: int | None = None

    def __post_init__(self) -> None:
        distance = self.near_duplicates
        for fits, argument, expected, received in (
            (self.min_side >= 0, "min_side", "at least 0", self.min_side),
            (
                self.max_aspect == 0 or 1 <= self.max_aspect < math.inf,
                "max_aspect",
                "0, or a finite number of at least 1",
                self.max_aspect,
            ),
            (self.min_caption_length >= 0, "min_caption_length", "at least 0", self.min_caption_length),
            (
                self.max_caption_length == 0 or self.max_caption_length >= self.min_caption_length,
                "max_caption_length",
                f"0, or at least the minimum length, {self.min_caption_length}",
                self.max_caption_length,
            ),
            (
                distance is None or 0 <= distance <= 15,
                "near_duplicates",
                "0 to 15 of 64 bits",
                distance,
            ),
        ):
            expect(fits, argument, expected, received)

    def apply(self, sample: Sample) -> Sample:
        """The sample with the captions that are kept; `LeftOut` where it is not. Duplicates are not seen."""
        width, height = sample.image.size
        if min(width, height) < self.min_side:
            raise LeftOut("small", f"expected sides of at least {self.min_side}, got {width}x{height}")
        if self.max_aspect and max(width, height) > self.max_aspect * min(width, height):
            raise LeftOut(
                "aspect", f"expected an aspect of at most {self.max_aspect:g}, got {width}x{height}"
            )
        captions = tuple(caption for caption in sample.captions if self._keeps(caption))
        if not captions:
            lengths = ", ".join(str(len(caption)) for caption in sample.captions)
            raise LeftOut("caption", f"expected a caption of {self._lengths()} characters, got {lengths}")
        return replace(sample, captions=captions)

    def _keeps(self, caption: str) -> bool:
        is_short = bool(self.max_caption_length) and len(caption) > self.max_caption_length
        return len(caption) >= self.min_caption_length and not is_short

    def _lengths(self) -> str:
        if not self.max_caption_length:
            return f"at least {self.min_caption_length}"
        return f"{self.min_caption_length} to {self.max_caption_length}"
