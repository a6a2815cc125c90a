"""A worker, which reads, filters and resizes the samples of a shard, extracts their maps, and writes them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int
from PIL import Image

from nexus_adapters.conditions import find_extractor
from nexus_adapters.data.prepared_set import SetFolder
from nexus_adapters.data.samples import BadSample, Sample
from nexus_adapters.errors import mentions, one_line
from nexus_adapters.prepare.filters import LeftOut, perceptual_hash
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.shard_file import ShardFile, encode_image, encode_map, sample_members

_ERRNOS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC, errno.ETIMEDOUT)
_WORDS = ("out of memory", "insufficient memory", "cuda error", "cublas", "cudnn")


def is_machine_failure(error: BaseException | None) -> bool:
    """Return whether an error is due to the machine (memory, GPU, disk, network) instead of the sample."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        # Not the text of a ValueError or OSError, which may contain the name of a file.
        if isinstance(error, RuntimeError | cv2.error) and mentions(error, _WORDS):
            return True
        error = error.__cause__
    return False


@dataclass(frozen=True)
class _Read:
    """A resized sample that passed the filters, with its index and its size in the source."""

    index: int
    sample: Sample
    original_size: tuple[int, int]


@dataclass
class Worker:
    """Makes complete shards by number, in any order. Finished ones are skipped.

    Attributes:
        plan: the set to make.
        folder: the set's folder.
        progress: called with the number of samples processed since its last call.
    """

    plan: Plan
    folder: SetFolder
    progress: Callable[[int], None] = lambda _: None

    def survey(self, shard: int) -> None:
        """Hash the images of a shard that pass the filters, to find near-duplicates."""
        if self.folder.is_surveyed(shard):
            return
        indices, hashes = self.plan.indices(shard), {}
        for index in indices:
            with suppress(LeftOut):  # it is dropped and listed when the shard is written
                hashes[index] = perceptual_hash(self.load(index).image)
            self.progress(1)
        self.folder.write_hashes(shard, hashes, indices)

    def write(self, shard: int) -> None:
        """Write a shard and a record of its samples and of those that were dropped."""
        if self.folder.is_written(shard):
            return
        left_out: list[tuple[int, LeftOut]] = []
        file = ShardFile(self.folder.shard(shard), self.folder.unfinished)
        try:
            for batch in self._batches(shard, left_out):
                for members in self._with_maps(batch, left_out):
                    for name, content in members:
                        file.add(name, content)
                    file.samples += 1
            record = self._finish(file)
        except BaseException:
            file.discard()
            raise
        skipped = [
            {"source": self.plan.key(index), "kind": why.kind, "reason": str(why)}
            for index, why in sorted(left_out, key=lambda pair: pair[0])
        ]
        self.folder.write_record(shard, record | {"skipped": skipped})

    @staticmethod
    def _finish(file: ShardFile) -> dict[str, Any]:
        if not file.samples:
            file.discard()
            return {"samples": 0}
        size, sha256 = file.finish()
        return {"file": file.path.name, "samples": file.samples, "bytes": size, "sha256": sha256}

    def example(self, index: int) -> tuple[Sample, dict[str, Image.Image]]:
        """Return a sample as it would be written, with its maps, or raise `LeftOut`. Duplicates stay."""
        read = self._fitted(self.load(index), index)
        (maps,) = self._maps([read.sample.image])
        return read.sample, maps

    def _batches(self, shard: int, left_out: list[tuple[int, LeftOut]]) -> Iterator[list[_Read]]:
        """Yield the samples that pass the filters, in batches for the extractors."""
        batch: list[_Read] = []
        for index in self.plan.indices(shard):
            try:
                batch.append(self._read(index))
            except LeftOut as why:
                left_out.append((index, why))
                self.progress(1)
            if len(batch) == self.plan.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def load(self, index: int) -> Sample:
        """Return the sample with the captions that pass, or raise `LeftOut`."""
        try:
            sample = self.plan.source.load(index)
        except BadSample as error:
            if is_machine_failure(error):
                raise OSError(str(error)) from error
            raise LeftOut("unreadable", self.plan.message(str(error))) from error
        return self.plan.filters.apply(sample)

    def _read(self, index: int) -> _Read:
        sample = self.load(index)
        if self.plan.filters.near_duplicates is not None and (earlier := int(self._duplicates[index])) >= 0:
            key = self.plan.key(earlier)
            raise LeftOut(
                "near-duplicate", f"expected no near-duplicate of an earlier image, got one of '{key}'"
            )
        return self._fitted(sample, index)

    def _fitted(self, sample: Sample, index: int) -> _Read:
        size, geometry = sample.image.size, self.plan.geometry
        image = sample.image if geometry is None else geometry.fit(sample.image, geometry.target(size))
        captions = self.plan.choose(sample.captions, index)
        return _Read(index, replace(sample, image=image, captions=captions), size)

    @cached_property
    def _duplicates(self) -> Int[np.ndarray, " n"]:
        return self.folder.read_duplicates()

    def _with_maps(
        self, batch: Sequence[_Read], left_out: list[tuple[int, LeftOut]]
    ) -> Iterator[list[tuple[str, bytes]]]:
        """Yield each sample's files. Samples whose maps cannot be extracted or written are dropped."""
        try:
            extracted = self._maps([read.sample.image for read in batch])
        except Exception as error:  # due to one of them; extractors of other packages can raise anything
            if is_machine_failure(error):
                raise
            extracted = []
        for place, read in enumerate(batch):
            kind, expected = "map", "maps that can be extracted"
            try:
                maps = extracted[place] if extracted else self._maps([read.sample.image])[0]
                kind, expected = "image", f"what {self.plan.image_format} and PNG can hold"
                members = list(self._members(read, maps))
            except Exception as error:
                if is_machine_failure(error):
                    raise
                reason = one_line(error)
                left_out.append((read.index, LeftOut(kind, f"expected {expected}, got {reason}")))
            else:
                yield members
            self.progress(1)

    def _maps(self, images: Sequence[Image.Image]) -> list[dict[str, Image.Image]]:
        by_name = {
            name: find_extractor(name).extract_all(images, options)
            for name, options in self.plan.conditions.items()
        }
        return [{name: maps[place] for name, maps in by_name.items()} for place in range(len(images))]

    def _members(self, read: _Read, maps: dict[str, Image.Image]) -> Iterator[tuple[str, bytes]]:
        """The sample's files."""
        sample = read.sample
        about = {
            "captions": list(sample.captions),
            "source": self.plan.key(read.index),
            "original_size": list(read.original_size),
        }
        image = self.plan.image_format, encode_image(sample.image, self.plan.image_format)
        conditions = {name: encode_map(condition) for name, condition in maps.items()}
        return sample_members(f"{read.index:09d}", image, conditions, about)
