"""Which samples are left out of a prepared set, and why; near-duplicates by their perceptual hashes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int, UInt64
from PIL import Image

from nexus_adapters.data.samples import Sample
from nexus_adapters.errors import expect

_BITS = 64
_INDEX_BITS = 40  # of a key, next to the part of the hash: for 10^12 images
_CHUNK = 2**14  # keys at once, where a temporary array of all would double the memory
_ROWS = 512  # of a bucket that are compared at once


def perceptual_hash(image: Image.Image) -> int:
    """Give the 64 bits of pHash: which of the 8x8 lowest frequencies of 32x32 pixels exceed their median.

    By the library imagehash. Resizing, compression and small changes of color flip few bits; images of
    unlike content differ in about half.
    """
    import imagehash

    bits = imagehash.phash(image, hash_size=8).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_near_duplicates(
    hashes: UInt64[np.ndarray, " n"],
    has_hash: Bool[np.ndarray, " n"],
    distance: int,
    *,
    chunk: int = _CHUNK,
    rows: int = _ROWS,
) -> Int[np.ndarray, " n"]:
    """The images to leave out: those within `distance` bits of an earlier image that is kept.

    The same as going through the images in order and keeping each that is near none kept so far. Two hashes
    that differ in at most d bits agree in at least one of d + 1 parts of their bits, so only images that
    share a part are compared.

    Args:
        hashes: of each image.
        has_hash: False for images that take no part, and get -1.
        distance: in bits, 0 to 15.
        chunk: of keys, and
        rows: of images that are compared at once; both bound the memory and change no result.

    Returns:
        For each image an earlier one that is kept and that near; -1 for images that are kept.
    """
    nearest: Int[np.ndarray, " n"] = np.full(len(hashes), -1, np.int64 if len(hashes) >= 2**31 else np.int32)
    # An image is unknown while it has an earlier neighbor of which it is unknown whether it is kept.
    is_unknown = has_hash.copy()
    while is_unknown.any():
        waits = np.zeros(len(hashes), bool)
        is_settled = has_hash & ~is_unknown
        for members in _buckets(hashes, has_hash, distance, chunk):
            if is_unknown[members].any():
                _compare(hashes, members, distance, rows, is_unknown, is_settled, nearest, waits)
        is_dropped = is_unknown & (nearest >= 0)
        # Images that wait for none are kept, those near one that is kept are dropped, the others still wait.
        is_unknown &= waits & ~is_dropped
    return nearest


def _buckets(
    hashes: UInt64[np.ndarray, " n"], has_hash: Bool[np.ndarray, " n"], distance: int, chunk: int
) -> Iterator[Int[np.ndarray, " m"]]:
    """Groups of images, ascending, that agree in a part of their bits; part after part."""
    parts = distance + 1
    edges = [_BITS * part // parts for part in range(parts + 1)]
    keys = np.empty_like(hashes)
    for low, high in pairwise(edges):
        width = min(high - low, _BITS - _INDEX_BITS)
        # Part and index in one number, so that one sort in place orders by both.
        np.right_shift(hashes, np.uint64(low), out=keys)
        keys <<= np.uint64(_BITS - width)
        for first in range(0, len(keys), chunk):
            some = keys[first : first + chunk]
            some |= np.arange(first, first + len(some), dtype=np.uint64)
        keys[~has_hash] = np.iinfo(np.uint64).max
        keys.sort()
        yield from _runs(keys[: np.count_nonzero(has_hash)], width, chunk)


def _runs(keys: UInt64[np.ndarray, " n"], width: int, chunk: int) -> Iterator[Int[np.ndarray, " m"]]:
    """The indices in the lower bits of sorted keys, for each value of the upper bits that several have."""
    shift, mask = np.uint64(_BITS - width), np.uint64(2 ** (_BITS - width) - 1)
    first = 0
    for start in range(0, len(keys), chunk):
        parts = keys[start : start + chunk + 1] >> shift
        ends = np.flatnonzero(parts[1:] != parts[:-1]) + start + 1
        is_last = start + chunk >= len(keys)
        for end in (*ends.tolist(), *([len(keys)] if is_last else [])):
            if end - first > 1:
                yield (keys[first:end] & mask).astype(np.int64)
            first = end


def _compare(
    hashes: UInt64[np.ndarray, " n"],
    members: Int[np.ndarray, " m"],
    distance: int,
    at_once: int,
    is_unknown: Bool[np.ndarray, " n"],
    is_settled: Bool[np.ndarray, " n"],
    nearest: Int[np.ndarray, " n"],
    waits: Bool[np.ndarray, " n"],
) -> None:
    """Find for each unknown member a neighbor that is known to be kept, and whether it must still wait."""
    asking = np.flatnonzero(is_unknown[members])
    for first in range(0, len(asking), at_once):
        rows = asking[first : first + at_once]
        for start in range(0, int(rows[-1]), at_once):
            columns = np.arange(start, min(start + at_once, int(rows[-1])))
            differ = hashes[members[rows]][:, None] ^ hashes[members[columns]][None]
            is_near = (np.bitwise_count(differ) <= distance) & (columns[None] < rows[:, None])
            is_kept = is_settled[members[columns]] & (nearest[members[columns]] < 0)
            _set_nearest(is_near & is_kept, members, rows, columns, nearest)
            waits[members[rows]] |= (is_near & is_unknown[members[columns]]).any(axis=1)


def _set_nearest(
    is_near: Bool[np.ndarray, "rows columns"],
    members: Int[np.ndarray, " m"],
    rows: Int[np.ndarray, " rows"],
    columns: Int[np.ndarray, " columns"],
    nearest: Int[np.ndarray, " n"],
) -> None:
    has_one = is_near.any(axis=1)
    found = members[columns[is_near.argmax(axis=1)]][has_one]
    places = members[rows[has_one]]
    known = nearest[places]
    nearest[places] = np.where(known < 0, found, np.minimum(known, found))


class LeftOut(Exception):  # noqa: N818  # not an error: the user asked for it, or the sample cannot be read
    """A sample that is left out of the set.

    Attributes:
        kind: of reason: "unreadable", "small", "aspect", "caption", "near-duplicate", "map" or "image".
        reason: what was expected and what was received.
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
        """The sample with the captions that pass; `LeftOut` where it does not. Duplicates are not checked."""
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
