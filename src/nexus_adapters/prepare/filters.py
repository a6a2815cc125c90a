"""Filters that decide which samples a prepared set drops, and near-duplicates by perceptual hashes."""

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
_INDEX_BITS = 40  # bits of a key for the index of an image, enough for 10^12 images
_CHUNK = 2**14  # keys processed at a time, since a temporary array of all would double the memory
_ROWS = 512  # rows of a bucket that are compared at a time


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit pHash, computed by imagehash.

    Its bits say which of the 8x8 lowest frequencies of 32x32 pixels exceed their median. Resizing,
    compression and small color changes flip few bits; images with different content differ in about half of
    them.
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
    """Find the images to drop: those within `distance` bits of an earlier image that is kept.

    This is equivalent to going through the images in order and keeping each that is not near one kept before.
    Two hashes that differ in at most d bits agree in at least one of d + 1 parts of their bits, so only
    images that share a part are compared.

    Args:
        hashes: hash of each image.
        has_hash: False for images to ignore, whose result is -1.
        distance: distance in bits, 0 to 15.
        chunk: number of keys processed at a time; limits memory without changing the result.
        rows: number of images compared at a time; likewise.

    Returns:
        For each image, an earlier near one that is kept; -1 for images that are kept.
    """
    nearest: Int[np.ndarray, " n"] = np.full(len(hashes), -1, np.int64 if len(hashes) >= 2**31 else np.int32)
    # An image is unknown as long as it has an earlier neighbor that is unknown.
    is_unknown = has_hash.copy()
    while is_unknown.any():
        waits = np.zeros(len(hashes), bool)
        is_settled = has_hash & ~is_unknown
        for members in _buckets(hashes, has_hash, distance, chunk):
            if is_unknown[members].any():
                _compare(hashes, members, distance, rows, is_unknown, is_settled, nearest, waits)
        is_dropped = is_unknown & (nearest >= 0)
        # Images near a kept one are dropped, those that need not wait for another are kept, the rest wait.
        is_unknown &= waits & ~is_dropped
    return nearest


def _buckets(
    hashes: UInt64[np.ndarray, " n"], has_hash: Bool[np.ndarray, " n"], distance: int, chunk: int
) -> Iterator[Int[np.ndarray, " m"]]:
    """For each part of the bits, groups of images that agree in it, in ascending order."""
    parts = distance + 1
    edges = [_BITS * part // parts for part in range(parts + 1)]
    keys = np.empty_like(hashes)
    for low, high in pairwise(edges):
        width = min(high - low, _BITS - _INDEX_BITS)
        # Part and index in a single number, so that one in-place sort orders by both.
        np.right_shift(hashes, np.uint64(low), out=keys)
        keys <<= np.uint64(_BITS - width)
        for first in range(0, len(keys), chunk):
            some = keys[first : first + chunk]
            some |= np.arange(first, first + len(some), dtype=np.uint64)
        keys[~has_hash] = np.iinfo(np.uint64).max
        keys.sort()
        yield from _runs(keys[: np.count_nonzero(has_hash)], width, chunk)


def _runs(keys: UInt64[np.ndarray, " n"], width: int, chunk: int) -> Iterator[Int[np.ndarray, " m"]]:
    """The indices in the lower bits of sorted keys, for each value of the upper bits that several share."""
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
    """Find, for each unknown member, a neighbor that is known to be kept and whether it must still wait."""
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


class LeftOut(Exception):  # noqa: N818  # not an error: the user set a filter, or the sample is unreadable
    """A sample is dropped from the set.

    Attributes:
        kind: kind of reason: "unreadable", "small", "aspect", "caption", "near-duplicate", "map" or "image".
        reason: what was expected and what was received.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Filters:
    """The limits that samples must meet.

    Attributes:
        min_side: minimum length of the shorter side in pixels; 0 for no limit.
        max_aspect: maximum ratio of the longer to the shorter side; 0 for no limit.
        min_caption_length: minimum length of captions in characters. Shorter captions are dropped, and
            samples that have no captions left.
        max_caption_length: maximum length of captions in characters, likewise; 0 for no limit.
        near_duplicates: drop images whose 64-bit perceptual hash differs in at most this many bits from that
            of an earlier image; None keeps all.

    Raises:
        InvalidArgument: for limits that no sample can meet.
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
                "0 or a finite number of at least 1",
                self.max_aspect,
            ),
            (self.min_caption_length >= 0, "min_caption_length", "at least 0", self.min_caption_length),
            (
                self.max_caption_length == 0 or self.max_caption_length >= self.min_caption_length,
                "max_caption_length",
                f"0 or at least the minimum length, {self.min_caption_length}",
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
        """Return the sample with the captions that pass, or raise `LeftOut`. Ignores near-duplicates."""
        width, height = sample.image.size
        if min(width, height) < self.min_side:
            raise LeftOut("small", f"expected sides of at least {self.min_side}, got {width}x{height}")
        if self.max_aspect and max(width, height) > self.max_aspect * min(width, height):
            raise LeftOut(
                "aspect", f"expected an aspect ratio of at most {self.max_aspect:g}, got {width}x{height}"
            )
        captions = tuple(caption for caption in sample.captions if self._keeps(caption))
        if not captions:
            lengths = ", ".join(str(len(caption)) for caption in sample.captions)
            raise LeftOut("caption", f"expected a caption with {self._lengths()} characters, got {lengths}")
        return replace(sample, captions=captions)

    def _keeps(self, caption: str) -> bool:
        is_short = bool(self.max_caption_length) and len(caption) > self.max_caption_length
        return len(caption) >= self.min_caption_length and not is_short

    def _lengths(self) -> str:
        if not self.max_caption_length:
            return f"at least {self.min_caption_length}"
        return f"{self.min_caption_length} to {self.max_caption_length}"
