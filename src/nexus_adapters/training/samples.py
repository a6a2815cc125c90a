"""The samples of a recipe: split, and read one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from nexus_adapters.data.draws import draw_for_sample
from nexus_adapters.data.feed import Place, Read, Skipped
from nexus_adapters.data.fitting import Fitting
from nexus_adapters.data.order import SampleOrder, permutation
from nexus_adapters.data.replacement import read_or_replace
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.training.config import DataOptions

_ONE_SHAPE = ""
_ENCODED_WHOLE = 10_000  # samples
_HOLD_OUT = 2**32  # the key that held-out samples are drawn by, together with the seed


@dataclass(frozen=True)
class Split:
    """Which samples are trained on and which are held out, with their shapes; which have none to read."""

    trained: Mapping[int, Hashable]
    held_out: Mapping[int, Hashable]
    unreadable: Sequence[Skipped]


def split_samples(fitting: Fitting, data: DataOptions, seed: int, held_out: int) -> Split:
    """Hold out so many samples, drawn by the seed, but at most a tenth of all.

    Raises `InvalidArgument` for a data set without samples.
    """
    total = len(fitting.source)
    count = min(total, data.count) if data.count else total
    if count == 0:
        raise InvalidArgument("data", "samples", f"no samples in {data.path or data.shards}")
    shapes, unreadable = {}, []
    is_slow = data.aspect_buckets  # reads the header of every image
    for index in tqdm(range(count), desc="reading sizes", unit="sample", delay=2, disable=not is_slow):
        try:
            shapes[index] = fitting.target(index) if data.aspect_buckets else _ONE_SHAPE
        except BadSample as error:
            unreadable.append(Skipped(index, fitting.source.key(index), str(error)))
    indices = list(shapes)
    order = permutation(len(indices), (seed, _HOLD_OUT))
    held = {indices[int(place)] for place in order[: min(held_out, len(indices) // 10)]}
    return Split(
        {index: shape for index, shape in shapes.items() if index not in held},
        {index: shape for index, shape in shapes.items() if index in held},
        unreadable,
    )


def shards_to_keep_together(data: DataOptions, source: Source) -> Mapping[int, Hashable] | None:
    """Index -> shard, where shards are fetched: an order that jumps between them would fetch them anew."""
    if isinstance(source, TarSource) and any("://" in shard for shard in data.shards):
        return {index: source.shard_of(index) for index in range(len(source))}
    return None


def samples_to_encode(split: Split, order: SampleOrder, steps: int) -> Split:
    """What a cache must have for a run of so many steps: all, or of a large data set what will be read.

    Small data sets are encoded whole, so that whatever is wrong with them is reported before the first step.
    """
    if len(split.trained) <= _ENCODED_WHOLE or steps * order.global_batch_size >= len(split.trained):
        return split
    read = {int(index) for step in range(steps) for index in order.at(step)}
    return replace(split, trained={i: shape for i, shape in split.trained.items() if i in read})


def members_by_shape(shapes: Mapping[int, Hashable]) -> dict[Hashable, list[int]]:
    """Shape -> its samples in ascending order, any of which may stand in for another."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(shapes):
        members[shapes[index]].append(index)
    return dict(members)


def usable_shapes(shapes: Mapping[int, Hashable], unreadable: Collection[int]) -> dict[int, Hashable]:
    """The samples of all shapes that have a readable one; `InvalidArgument` where no shape has."""
    members = members_by_shape(shapes)
    usable = {shape for shape, indices in members.items() if not set(indices) <= set(unreadable)}
    if not usable:
        raise InvalidArgument("data", "readable samples", f"no readable one among {len(shapes)}")
    return {index: shape for index, shape in shapes.items() if shape in usable}


def substitutes(shapes: Mapping[int, Hashable], unreadable: Collection[int]) -> dict[int, int]:
    """Stand-ins for those of the samples that are unreadable; `InvalidArgument` where a shape has none."""
    members = members_by_shape(shapes)

    def read(index: int) -> None:
        if index in unreadable:
            raise BadSample("it is known to be unreadable")

    return {
        index: read_or_replace(index, members[shapes[index]], read, str).index
        for index in sorted(unreadable)
        if index in shapes
    }


@dataclass(frozen=True)
class FittedSamples:
    """A `Reader` of samples that are decoded when they are needed, with one caption each.

    `members`: as `members_by_shape`.
    """

    fitting: Fitting
    shapes: Mapping[int, Hashable]
    members: Mapping[Hashable, Sequence[int]]
    seed: int

    def read(self, place: Place) -> Read:
        """The sample at a place, or the next readable one of its shape."""
        # A held-out sample may be alone in its shape.
        candidates = self.members.get(self.shapes[place.index], ())
        found = read_or_replace(place.index, candidates, self.fitting.fit, self.fitting.source.key)
        drawn = draw_for_sample(self.seed, place.step, place.place, (0, 0, 0)).caption
        caption = found.content.captions[int(drawn * len(found.content.captions))]
        return Read(place, found.index, replace(found.content, captions=(caption,)), found.skipped)
