"""The batches of a run's training steps and of its validation.

With a cache, samples are encoded once, before the first step; without one, they are encoded in every step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nexus_adapters.bases.base import Base
from nexus_adapters.data.batch import CAPTION_LENGTHS, Batch, Entry, as_batch, draw_for_sample, encode
from nexus_adapters.data.conditioned import ConditionedSource, FittedSample, KnownHashes
from nexus_adapters.data.feed import (
    Feed,
    Position,
    Read,
    Reader,
    SampleOrder,
    Skipped,
    leave_ctrl_c_to_the_trainer,
    raise_errors,
)
from nexus_adapters.data.inspection import caption_lengths, describe_captions
from nexus_adapters.data.replacement import SkipReport
from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.tensor_cache import TensorCache
from nexus_adapters.progress import progress
from nexus_adapters.training.config import DataOptions, LossOptions, TrainingOptions
from nexus_adapters.training.recipe_samples import (
    FittedSamples,
    Split,
    known_hashes_file,
    members_by_shape,
    samples_to_encode,
    substitutes,
    usable_shapes,
)

CACHE_FORMAT = 2  # part of every entry's name: a new number makes all samples be encoded again
_ENCODING_BATCH = 8  # the same for every run, since an entry's last bits may depend on it
_SHARD_SAMPLES = 256  # samples per file of the cache
_LOOKED_AT = 64  # samples whose captions are inspected if none are encoded before the first step
_HELD_OUT_STEP = 2**40  # a step that no training reaches; validation uses its random numbers


@dataclass
class Batches:
    """The batches of every training step and of the validation.

    Attributes:
        feed: this process's samples by step.
        reader: reads a single sample.
        empty_prompt: the embeddings of the empty prompt, by name.
        encoders: the base that encodes samples in every step; None with a cache of encoded samples.
        held_out: the indices of the validation samples.
        report: collects unreadable samples.
        encoders_hash: hash of the encoders' weights.
        loss: how often prompts and conditions are dropped.
        seed: the run's seed.
        accelerator: the processes that train together.
    """

    feed: Feed
    reader: Reader
    empty_prompt: Mapping[str, Tensor]
    encoders: Base | None
    held_out: Sequence[int]
    report: SkipReport
    encoders_hash: str
    loss: LossOptions
    seed: int
    accelerator: Accelerator

    def of_step(self, step: int) -> Iterator[Batch]:
        """Yield this process's batches of the optimizer step that follows `step` finished ones."""
        for reads in self.feed.step(step):
            yield self._batch(reads, self.loss.prompt_dropout, self.loss.condition_dropout)

    def of_validation(self, batch_size: int) -> list[Batch]:
        """Return this process's share of the held-out samples, grouped by shape and without dropout."""
        positions = [Position(index, _HELD_OUT_STEP, row) for row, index in enumerate(self.held_out)]
        mine = positions[self.accelerator.process_index :: self.accelerator.num_processes]
        by_shape: dict[tuple[int, ...], list[Read]] = {}
        for read in map(self.reader.read, mine):
            by_shape.setdefault(_shape(read.content), []).append(read)
        return [
            self._batch(reads[first : first + batch_size], 0.0, 0.0)
            for reads in by_shape.values()
            for first in range(0, len(reads), batch_size)
        ]

    def _batch(self, reads: Sequence[Read], prompt_dropout: float, condition_dropout: float) -> Batch:
        self.report.add(skipped for read in reads for skipped in read.skipped)
        contents = [read.content for read in reads]
        entries = contents if self.encoders is None else encode(contents, self.encoders)
        draws = [
            draw_for_sample(self.seed, read.position.step, read.position.place, entry.mean.shape)
            for read, entry in zip(reads, entries, strict=True)
        ]
        indices = [read.index for read in reads]
        batch = as_batch(indices, entries, draws, self.empty_prompt, prompt_dropout, condition_dropout)
        return batch.to(self.accelerator.device)


def prepare_batches(
    samples: ConditionedSource,
    split: Split,
    order: SampleOrder,
    base: Base,
    cache: TensorCache | None,
    data: DataOptions,
    training: TrainingOptions,
    loss: LossOptions,
    seed: int,
    skipped_file: Path,
    accelerator: Accelerator,
) -> Batches:
    """Return the batches of a run. With a cache, fill it first and then release the base's encoders.

    Args:
        samples: all samples, fitted to the base.
        split: which of them are trained on and which are held out.
        order: the order in which they are trained on.
        base: the base with its encoders loaded.
        cache: where encoded samples are kept; None to encode them in every step.
        data: the recipe's `[data]`.
        training: the recipe's `[training]`.
        loss: the recipe's `[loss]`.
        seed: the run's seed.
        skipped_file: where unreadable samples are reported.
        accelerator: the processes that train together.

    Raises:
        InvalidArgument: if too many samples are unreadable.
        OSError: if the disk has no room for the cache.
    """
    report = SkipReport(skipped_file, split.total, data.max_bad_fraction)
    report.add(split.unreadable)
    empty_prompt = {name: tensor.cpu() for name, tensor in base.encode_empty_prompt().items()}
    encoders_hash = base.content_hash()
    shapes = {**split.trained, **split.held_out}
    reader: Reader
    if cache is None:
        held_out = [index for index in split.held_out if _is_readable(samples, index, report)]
        reader = FittedSamples(samples, shapes, members_by_shape(split.trained), seed)
        lengths = _first_caption_lengths(samples, order, base)
    else:
        needed = samples_to_encode(split, order, training.max_train_steps)
        names, bad = _encode_into(cache, samples, needed, base, encoders_hash, data, report, accelerator)
        usable = usable_shapes(needed.trained, bad)
        order = SampleOrder(usable, order.global_batch_size, seed) if needed is split else order
        held_out = [index for index in split.held_out if names.get(index) in cache]
        reader = CachedSamples(cache, names, substitutes(usable, bad))
        lengths = _cached_caption_lengths(cache, [names[i] for i in usable if names.get(i) in cache])
    tokenizer = getattr(base.pipe, "tokenizer", None)
    for line in describe_captions(lengths, tokenizer) if accelerator.is_main_process else ():
        warnings.warn(f"data: {line}", stacklevel=2)
    if cache is not None:
        base.release()
    feed = Feed(
        order,
        reader,
        training.batch_size,
        training.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        data.workers,
    )
    return Batches(
        feed=feed,
        reader=reader,
        empty_prompt=empty_prompt,
        encoders=base if cache is None else None,
        held_out=held_out,
        report=report,
        encoders_hash=encoders_hash,
        loss=loss,
        seed=seed,
        accelerator=accelerator,
    )


def _cached_caption_lengths(cache: TensorCache, names: Iterable[str]) -> Iterator[list[int]]:
    for name in names:
        yield cache.read_part(name, CAPTION_LENGTHS).tolist()


def _first_caption_lengths(samples: ConditionedSource, order: SampleOrder, base: Base) -> Iterator[list[int]]:
    """The caption lengths of the samples in the first steps; without a cache, not all samples are read."""
    tokenizer = getattr(base.pipe, "tokenizer", None)
    steps = range(-(-_LOOKED_AT // order.global_batch_size))
    for index in dict.fromkeys(int(index) for step in steps for index in order.at(step)):
        with suppress(BadSample):  # reported when a step reads it
            yield caption_lengths(samples.source.load(index).captions, tokenizer)


def _is_readable(samples: ConditionedSource, index: int, report: SkipReport) -> bool:
    """Whether a held-out sample can be read. It is not replaced, since all other samples are trained on."""
    try:
        samples.fit(index)
    except BadSample as error:
        report.add([Skipped(index, samples.source.key(index), str(error))])
        return False
    return True


def _shape(content: Entry | FittedSample) -> tuple[int, ...]:
    return tuple(content.mean.shape) if isinstance(content, Entry) else content.image.size


@dataclass
class CachedSamples:
    """A `Reader` of encoded samples.

    Attributes:
        cache: contains their entries.
        names: index -> name of the sample's entry; without the samples that have none.
        substitutes: index of an unreadable sample -> index of its replacement.
    """

    cache: TensorCache
    names: Mapping[int, str]
    substitutes: Mapping[int, int]

    def read(self, position: Position) -> Read:
        """Return the entry at a position."""
        index = self.substitutes.get(position.index, position.index)
        return Read(position, index, Entry.from_tensors(self.cache.read(self.names[index])))


def _encode_into(
    cache: TensorCache,
    samples: ConditionedSource,
    split: Split,
    base: Base,
    encoders_hash: str,
    data: DataOptions,
    report: SkipReport,
    accelerator: Accelerator,
) -> tuple[dict[int, str], set[int]]:
    """Fill the cache. Returns index -> name in the cache, and the indices of the unreadable samples."""
    indices = sorted([*split.trained, *split.held_out])
    known = KnownHashes(known_hashes_file(data, cache.folder))
    names, unreadable = entry_names(samples, indices, encoders_hash, known, accelerator)
    report.add(unreadable)
    failed = fill_cache(cache, names, samples, base, accelerator, data.workers)
    report.add(failed)
    return names, {skipped.index for skipped in (*unreadable, *failed)}


def entry_names(
    samples: ConditionedSource,
    indices: Sequence[int],
    encoders_hash: str,
    known: KnownHashes,
    accelerator: Accelerator,
) -> tuple[dict[int, str], list[Skipped]]:
    """Return index -> name of the sample's entry in a cache, and the unreadable samples.

    A name is a hash of all that the entry depends on. Each process hashes its share; all get the whole
    result.
    """
    names, unreadable = [], []
    share = indices[accelerator.process_index :: accelerator.num_processes]
    shown = progress(share, what="hashing samples", unit="sample", delay=2, shown=accelerator.is_main_process)
    with known.kept():
        for index in shown:
            try:
                made_of = [CACHE_FORMAT, encoders_hash, samples.content_hash(index, known)]
            except BadSample as error:
                unreadable.append(Skipped(index, samples.source.key(index), str(error)))
                continue
            names.append((index, hashlib.sha256(json.dumps(made_of).encode()).hexdigest()))
    return dict(sorted(gather_object(names))), sorted(gather_object(unreadable), key=lambda bad: bad.index)


def fill_cache(
    cache: TensorCache,
    names: Mapping[int, str],
    samples: ConditionedSource,
    base: Base,
    accelerator: Accelerator,
    workers: int,
) -> list[Skipped]:
    """Encode the samples that the cache does not contain; each process encodes its share.

    Existing entries are kept, so an interrupted run resumes.

    Returns:
        The unreadable samples of all processes.

    Raises:
        OSError: if the disk has no room for the new entries.
    """
    index_of = {name: index for index, name in names.items()}
    missing = [index_of[name] for name in cache.missing(names.values())]
    accelerator.wait_for_everyone()  # every process has checked the cache before any of them writes
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if missing and accelerator.is_main_process:
        _announce(cache, missing, samples, base)
    loader = DataLoader(
        _FittedDataset(samples, share),
        batch_size=_ENCODING_BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_ctrl_c_to_the_trainer,
    )
    reasons: dict[str, str] = {}  # name -> why it has no entry
    entries: dict[str, dict[str, Any]] = {}
    is_shown = accelerator.is_main_process and bool(share)
    with progress(what="encoding samples", unit="sample", total=len(share), shown=is_shown) as bar:
        for fitted in loader if share else ():
            raise_errors(sample for _, sample in fitted)
            good = [(index, sample) for index, sample in fitted if not isinstance(sample, Skipped)]
            reasons |= {
                names[index]: sample.reason for index, sample in fitted if isinstance(sample, Skipped)
            }
            if good:
                encoded = encode([sample for _, sample in good], base)
                for (index, _), entry in zip(good, encoded, strict=True):
                    entries[names[index]] = entry.as_tensors()
            if len(entries) >= _SHARD_SAMPLES:
                cache.write(entries)
                entries = {}
            bar.update(len(fitted))
        cache.write(entries)
    accelerator.wait_for_everyone()
    cache.refresh()
    reasons = dict(gather_object(list(reasons.items())))
    # Samples with the same content share an entry, or the lack of one.
    return [
        Skipped(index, samples.source.key(index), reasons[name])
        for index, name in names.items()
        if name in reasons
    ]


class _FittedDataset(Dataset[tuple[int, Any]]):
    def __init__(self, samples: ConditionedSource, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self.indices[place]
        try:
            return index, self.samples.fit(index)
        except BadSample as error:
            return index, Skipped(index, self.samples.source.key(index), str(error))
        except (ValueError, OSError) as error:
            return index, error


def _announce(cache: TensorCache, missing: Sequence[int], samples: ConditionedSource, base: Base) -> None:
    """Print an estimate of what will be encoded. Raises OSError if the disk has no room for it."""
    for index in missing:
        try:
            (entry,) = encode([samples.fit(index)], base)
        except BadSample:
            continue
        tensors = entry.as_tensors().values()
        needed = len(missing) * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(cache.folder).free
        size = f"{len(missing)} samples, about {needed / 2**20:,.0f} MiB"
        print(f"cache: encoding {size} into '{cache.folder}'", file=sys.stderr, flush=True)
        if needed > free:
            raise OSError(
                f"cache.folder: not enough disk space for {size}: '{cache.folder}' has only "
                f"{free / 2**30:.2f} GiB free"
            )
        return
