"""Open the samples of a recipe, fit them to the base, split off the held-out ones, and read them."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from nexus_adapters.conditions import EXTRACTORS, find_extractor
from nexus_adapters.conditions.transformers_models import existing_device
from nexus_adapters.data.batch import draw_for_sample
from nexus_adapters.data.conditioned import ConditionedSource, options_for
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.feed import Position, Read, SampleOrder, Skipped, permutation
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.prepared_set import geometry_of, open_prepared
from nexus_adapters.data.replacement import read_or_replace
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.data.table import TableSource
from nexus_adapters.data.tars import TarSource
from nexus_adapters.embedded.maps import MAPS
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import InvalidArgument, expect, renamed
from nexus_adapters.files import cache_folder
from nexus_adapters.progress import progress
from nexus_adapters.training.config import CacheOptions, DataOptions, TrainingOptions

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]*\w")
_TRIED = 64  # side in pixels of the image that an extractor's options are tried on
_ONE_SHAPE = ""  # the shape of all samples without aspect buckets
_ENCODED_WHOLE = 10_000  # samples; of a larger dataset, only the samples that a run reads are encoded
_FEW_HELD_OUT = 4  # samples, one per validation image; a tenth of a small dataset would be fewer
_MANY_EPOCHS = 100
_HOLD_OUT = 2**32  # with the seed, the key that selects the held-out samples

# Arguments of sources -> keys of a recipe.
_KEYS = {
    "condition_name": "data.condition",
    "folder": "data.path",
    "path": "data.path",
    "shards": "data.shards",
    "split": "data.split",
    "config_name": "data.config_name",
    "revision": "data.revision",
    "image_column": "data.image_column",
    "condition_column": "data.condition_column",
    "caption_column": "data.caption_column",
    "index_folder": "cache.folder",
}


def open_training_source(data: DataOptions, cache_folder: Path) -> Source:
    """Open the samples that `[data]` names, without decoding any.

    Raises:
        InvalidArgument: if they cannot be found.
    """
    columns = {
        "image_column": data.image_column or None,
        "condition_column": data.condition_column or None,
        "caption_column": data.caption_column or None,
    }
    given: dict[str, Any] = {name: column for name, column in columns.items() if column}
    if data.kind == "scenes":  # canny is extracted, with the extractor's options; other maps are exact
        return SceneSource(data.count, condition_name=None if data.condition == "canny" else data.condition)
    with renamed(_KEYS):
        if data.kind == "prepared":
            return open_prepared(
                data.path, data.condition, cache_folder / "tars", allow_outside=data.allow_outside
            )
        if data.kind == "folder":
            return FolderSource(data.path, **given, allow_outside=data.allow_outside)
        if data.kind == "tars":
            return TarSource(data.shards, index_folder=cache_folder / "tars", **given)
        return TableSource(
            data.path,
            split=data.split,
            config_name=data.config_name or None,
            revision=data.revision or None,
            allow_outside=data.allow_outside,
            **given,
        )


def samples_cache(options: CacheOptions) -> Path:
    """Return the folder of encoded samples."""
    return Path(options.folder) if options.folder else cache_folder() / "training"


def known_hashes_file(data: DataOptions, cache_folder: Path) -> Path:
    """Return the file that stores the content hashes of this dataset's samples."""
    named = hashlib.sha256(json.dumps([data.kind, data.path, data.shards]).encode()).hexdigest()
    return cache_folder / "hashes" / f"{named[:32]}.jsonl"


def open_samples(data: DataOptions, cache_folder: Path, multiple: int) -> ConditionedSource:
    """Return the samples, fitted to the recipe's resolution.

    Their sides are multiples of `multiple` pixels.

    Raises:
        InvalidArgument: as `check_samples`, and if the samples cannot be found.
    """
    check_samples(data, multiple)
    geometry = (
        Geometry.bucketed(data.resolution, step=multiple)
        if data.aspect_buckets
        else Geometry(data.resolution, data.resolution)
    )
    return ConditionedSource(
        open_training_source(data, cache_folder), geometry, data.condition, data.extractor
    )


def check_samples(data: DataOptions, multiple: int) -> None:
    """Check `[data]` as far as possible without opening the samples.

    Warns if the data have a fixed size and the recipe's is different.

    Raises:
        InvalidArgument: for an unknown extractor if one is needed, for options that it does not accept, and
            for a resolution that does not fit the base.
    """
    if data.kind == "scenes":
        _check_scenes(data)
    elif data.kind != "prepared" and not data.condition_column and data.condition not in EXTRACTORS:
        known = ", ".join(sorted(EXTRACTORS))
        raise InvalidArgument(
            "data.condition", f"one of {known}, or a data.condition_column", repr(data.condition)
        )
    if data.condition in EXTRACTORS:  # the extractor also scores the structure of images
        _check_options(data)
    _check_resolution(data, multiple)


def _check_resolution(data: DataOptions, multiple: int) -> None:
    own = data.own_resolution()
    if data.resolution % multiple:
        is_own = "This is the size of the data; set another to resize them" if data.resolution == own else ""
        raise InvalidArgument(
            "data.resolution", f"a multiple of {multiple} for this base", data.resolution, is_own
        )
    if own not in (None, data.resolution):
        what = "scenes have" if data.kind == "scenes" else f"the set '{data.path}' was prepared with"
        warnings.warn(
            f"data.resolution: {what} {own} pixels; images and maps are resized to {data.resolution}",
            stacklevel=2,
        )
    with renamed(_KEYS):
        geometry = geometry_of(data.path) if data.kind == "prepared" else None
    if geometry is not None and geometry.buckets and not data.aspect_buckets:
        warnings.warn(
            f"data.aspect_buckets: the images in '{data.path}' have several aspect ratios and are cropped to "
            "squares; set data.aspect_buckets = true to keep their aspect ratios",
            stacklevel=2,
        )


def _check_options(data: DataOptions) -> None:
    """Check the types of an extractor's options, and the values by extracting a map from a small image.

    A model is loaded for this only if it is available locally.
    """
    with renamed(extractor_keys):
        extractor = find_extractor(data.condition)
        _, extracting = options_for(data.condition, data.extractor)
        extractor.check_options(extracting)
        if extractor.model and "device" in extracting:
            existing_device(str(extracting["device"]))
        model = str(extracting.get("model", ""))
        is_here = Path(model or extractor.model).exists()
        if extractor.model and model:
            is_hub_id = _HUB_ID.fullmatch(model) is not None
            expect(is_here or is_hub_id, "model", "a folder or the Hub id of a model", repr(model))
        if extracting and (is_here or not extractor.model):
            extractor.extract_all([Image.new("RGB", (_TRIED, _TRIED))], extracting)


def option_keys(data: DataOptions) -> dict[str, str]:
    """Return option of the extractor -> key of a recipe."""
    names = EXTRACTORS[data.condition].options() if data.condition in EXTRACTORS else ()
    return {name: extractor_keys(name) for name in names}


def extractor_keys(name: str) -> str:
    """Return the recipe's key for an extractor's option, whether or not it exists."""
    return "data.extractor" if name == "options" else f"data.extractor.{name}"


def _check_scenes(data: DataOptions) -> None:
    if data.condition not in MAPS:
        raise InvalidArgument(
            "data.condition", f"one of {', '.join(MAPS)}, for data.kind 'scenes'", repr(data.condition)
        )
    if data.condition != "canny" and data.extractor:
        raise InvalidArgument(
            "data.extractor",
            f"no options, since the {data.condition} maps of scenes are exact",
            repr(dict(data.extractor)),
        )


@dataclass(frozen=True)
class Split:
    """The samples that are trained on and those held out, each with its shape, and the unreadable ones."""

    trained: Mapping[int, Hashable]
    held_out: Mapping[int, Hashable]
    unreadable: Sequence[Skipped]

    @property
    def total(self) -> int:
        """Number of all samples, including unreadable ones."""
        return len(self.trained) + len(self.held_out) + len(self.unreadable)

    def is_as_before(self, wanted: int) -> bool:
        """Return whether earlier versions split the same way: a tenth, but at most `wanted`, was held out."""
        held_out = len(self.held_out)
        return held_out == min(wanted, (len(self.trained) + held_out) // 10)


def held_out_in_words(split: Split) -> str:
    """Return a phrase that says how many samples are held out."""
    count = len(split.held_out)
    return f"{count:,} of {split.total:,} samples {'is' if count == 1 else 'are'} held out"


def split_samples(
    samples: ConditionedSource, data: DataOptions, seed: int, held_out: int, batch_size: int = 1
) -> Split:
    """Split the samples, with `held_out` of them (at most `_most_held_out`) held out as the seed determines.

    At least `batch_size` samples, those of an optimizer step, are left to train on.

    Raises:
        InvalidArgument: for a dataset without samples.
    """
    total = len(samples.source)
    count = min(total, data.count) if data.count else total
    if count == 0:
        raise InvalidArgument("data", "samples", f"no samples in {data.path or data.shards}")
    shapes, unreadable = {}, []
    is_slow = data.aspect_buckets  # these need the header of every image
    for index in progress(range(count), what="reading sizes", unit="sample", delay=2, shown=is_slow):
        try:
            shapes[index] = samples.target(index) if data.aspect_buckets else _ONE_SHAPE
        except BadSample as error:
            unreadable.append(Skipped(index, samples.source.key(index), str(error)))
    indices = list(shapes)
    order = permutation(len(indices), (seed, _HOLD_OUT))
    held = {indices[int(p)] for p in order[: min(held_out, _most_held_out(len(indices), batch_size))]}
    return Split(
        {index: shape for index, shape in shapes.items() if index not in held},
        {index: shape for index, shape in shapes.items() if index in held},
        unreadable,
    )


def _most_held_out(count: int, batch_size: int) -> int:
    """A tenth of `count` samples; if these are few, up to 4 but at most a third. A batch is always left."""
    return max(0, min(max(count // 10, min(_FEW_HELD_OUT, count // 3)), count - batch_size))


def shards_to_keep_together(data: DataOptions, source: Source) -> Mapping[int, Hashable] | None:
    """Return index -> shard if shards are downloaded, so that each is read completely and downloaded once."""
    if isinstance(source, TarSource) and data.is_remote:
        return {index: source.shard_of(index) for index in range(len(source))}
    return None


def warn_of_many_epochs(training: TrainingOptions, batch_size: int, samples: int) -> None:
    """Warn if a run reads each sample too often. `batch_size` counts the samples of an optimizer step."""
    epochs = training.max_train_steps * batch_size / samples
    if epochs > _MANY_EPOCHS:
        warnings.warn(
            f"training.max_train_steps: {training.max_train_steps:,} steps of {batch_size} samples are "
            f"{epochs:,.0f} epochs of the {samples:,} samples; after more than {_MANY_EPOCHS} epochs an "
            "adapter may memorize them",
            stacklevel=2,
        )


def samples_to_encode(split: Split, order: SampleOrder, steps: int) -> Split:
    """Return the samples to encode for a run of `steps` steps.

    Of a large dataset, these are the samples that the run reads. A small one is encoded completely, so that
    all of its problems are reported before the first step.
    """
    if len(split.trained) <= _ENCODED_WHOLE or steps * order.global_batch_size >= len(split.trained):
        return split
    read = {int(index) for step in range(steps) for index in order.at(step)}
    return replace(split, trained={i: shape for i, shape in split.trained.items() if i in read})


def members_by_shape(shapes: Mapping[int, Hashable]) -> dict[Hashable, list[int]]:
    """Return shape -> its samples in ascending order, each of which can replace another."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(shapes):
        members[shapes[index]].append(index)
    return dict(members)


def usable_shapes(shapes: Mapping[int, Hashable], unreadable: Collection[int]) -> dict[int, Hashable]:
    """Return the samples of all shapes that have a readable one; `InvalidArgument` if no shape has."""
    members = members_by_shape(shapes)
    usable = {shape for shape, indices in members.items() if not set(indices) <= set(unreadable)}
    if not usable:
        raise InvalidArgument("data", "readable samples", f"{len(shapes)} unreadable ones")
    return {index: shape for index, shape in shapes.items() if shape in usable}


def substitutes(shapes: Mapping[int, Hashable], unreadable: Collection[int]) -> dict[int, int]:
    """Return unreadable sample -> its replacement; `InvalidArgument` if a shape has no readable sample."""
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
    """A `Reader` that decodes samples on demand and chooses one caption of each.

    `members` comes from `members_by_shape`.
    """

    samples: ConditionedSource
    shapes: Mapping[int, Hashable]
    members: Mapping[Hashable, Sequence[int]]
    seed: int

    def read(self, position: Position) -> Read:
        """Return the sample at a position, or the next readable one with the same shape."""
        # A held-out sample may be the only one with its shape.
        candidates = self.members.get(self.shapes[position.index], ())
        found = read_or_replace(position.index, candidates, self.samples.fit, self.samples.source.key)
        drawn = draw_for_sample(self.seed, position.step, position.place, (0, 0, 0)).caption
        caption = found.content.captions[int(drawn * len(found.content.captions))]
        return Read(position, found.index, replace(found.content, captions=(caption,)), found.skipped)
