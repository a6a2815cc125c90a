"""The batches of a run: samples in order, encoded once before the first step or anew in every step."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nexus_adapters.bases.base import Base
from nexus_adapters.data.batch import Batch, Entry, as_batch, draw_for_sample, encode
from nexus_adapters.data.conditioned import FittedSample, Fitting, KnownHashes
from nexus_adapters.data.feed import (
    Feed,
    Place,
    Read,
    Reader,
    SampleOrder,
    Skipped,
    leave_ctrl_c_to_the_trainer,
    raise_errors,
)
from nexus_adapters.data.replacement import SkipReport
from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.tensor_cache import TensorCache
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.recipe_samples import (
    FittedSamples,
    Split,
    known_hashes_file,
    members_by_shape,
    samples_to_encode,
    shards_to_keep_together,
    split_samples,
    substitutes,
    usable_shapes,
)

FORMAT = 1  # of entries; a new number makes all caches anew
_SHARD_SAMPLES = 256
_BATCH = 8  # encoded at once; the same for every run, since the last bits may depend on it


@dataclass
class CachedSamples:
    """A `Reader` of encoded samples.

    Attributes:
        cache: where they are.
        names: index -> name of its entry, for those that have one.
        substitutes: index of an unreadable sample -> that of the one that stands in for it.
    """

    cache: TensorCache
    names: Mapping[int, str]
    substitutes: Mapping[int, int]

    def read(self, place: Place) -> Read:
        """The entry at a place."""
        index = self.substitutes.get(place.index, place.index)
        return Read(place, index, Entry.from_tensors(self.cache.read(self.names[index])))


def entry_names(
    fitting: Fitting,
    indices: Sequence[int],
    encoders_hash: str,
    known: KnownHashes,
    accelerator: Accelerator,
) -> tuple[dict[int, str], list[Skipped]]:
    """Names for a cache, by all that an entry is made of; and the samples that cannot be read at all.

    Each process hashes its share, and knows all in the end.
    """
    names, unreadable = [], []
    share = indices[accelerator.process_index :: accelerator.num_processes]
    shown = tqdm(
        share, desc="hashing samples", unit="sample", disable=not accelerator.is_main_process, delay=2
    )
    with known.kept():
        for index in shown:
            try:
                made_of = [FORMAT, encoders_hash, fitting.content_hash(index, known)]
            except BadSample as error:
                unreadable.append(Skipped(index, fitting.source.key(index), str(error)))
                continue
            names.append((index, hashlib.sha256(json.dumps(made_of).encode()).hexdigest()))
    return dict(sorted(gather_object(names))), sorted(gather_object(unreadable), key=lambda bad: bad.index)


def fill_cache(
    cache: TensorCache,
    names: Mapping[int, str],
    fitting: Fitting,
    base: Base,
    accelerator: Accelerator,
    workers: int,
) -> list[Skipped]:
    """Encode what the cache lacks; the samples that turned out unreadable, on every process the same.

    Each process encodes its share. What is there stays, so an interrupted run resumes.

    Raises OSError where the disk has less room than what is to come.
    """
    wanted = {name: index for index, name in names.items()}
    missing = [wanted[name] for name in cache.missing(names.values())]
    accelerator.wait_for_everyone()  # all have looked before any writes
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if missing and accelerator.is_main_process:
        _announce(cache, missing, fitting, base)
    loader = DataLoader(
        _Prepared(fitting, share),
        batch_size=_BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_ctrl_c_to_the_trainer,
    )
    reasons: dict[str, str] = {}  # name -> why it has no entry
    entries: dict[str, dict[str, Any]] = {}
    with tqdm(
        total=len(share), desc="encoding", unit="sample", disable=not accelerator.is_main_process or not share
    ) as bar:
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
    told = dict(gather_object(list(reasons.items())))
    # Samples of the same content have one entry, or none.
    return [
        Skipped(index, fitting.source.key(index), told[name]) for index, name in names.items() if name in told
    ]


def _announce(cache: TensorCache, missing: Sequence[int], fitting: Fitting, base: Base) -> None:
    """Say how much is to come, by the first sample that can be read; OSError where it has no room."""
    for index in missing:
        try:
            (entry,) = encode([fitting.fit(index)], base)
        except BadSample:
            continue
        tensors = entry.as_tensors().values()
        needed = len(missing) * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(cache.folder).free
        size = f"{len(missing)} samples, about {needed / 2**20:,.0f} MiB"
        print(f"cache: encoding {size}, into '{cache.folder}'", file=sys.stderr, flush=True)
        if needed > free:
            raise OSError(
                f"cache.folder: expected room for {size}; received '{cache.folder}' with "
                f"{free / 2**30:.2f} GiB free"
            )
        return


class _Prepared(Dataset[tuple[int, Any]]):
    def __init__(self, fitting: Fitting, indices: Sequence[int]) -> None:
        self.fitting, self.indices = fitting, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self.indices[place]
        try:
            return index, self.fitting.fit(index)
        except BadSample as error:
            return index, Skipped(index, self.fitting.source.key(index), str(error))
        except (ValueError, OSError) as error:
            return index, error


_HELD_OUT_STEP = 2**40  # a step that no training takes, whose draws are the validation's


@dataclass
class Material:
    """Batches of every step, and of the validation.

    Attributes:
        feed: this process's samples by step.
        reader: the same, by place.
        empty: the encoded empty prompt.
        encoders: where samples are encoded in every step; None where a cache has them.
        held_out: the indices of samples for the validation.
        report: of unreadable samples.
        content: a hash of the samples' keys and the encoders.
    """

    config: TrainConfig
    accelerator: Accelerator
    feed: Feed
    reader: Reader
    empty: Mapping[str, Tensor]
    encoders: Base | None
    held_out: Sequence[int]
    report: SkipReport
    content: str

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's parts of a step."""
        for reads in self.feed.step(step):
            loss = self.config.loss
            yield self._batch(reads, loss.prompt_dropout, loss.condition_dropout)

    def held_out_batches(self, batch_size: int) -> list[Batch]:
        """This process's share of the held-out samples, by shape; no prompt and no condition is dropped."""
        places = [Place(index, _HELD_OUT_STEP, row) for row, index in enumerate(self.held_out)]
        mine = places[self.accelerator.process_index :: self.accelerator.num_processes]
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
            draw_for_sample(self.config.seed, read.place.step, read.place.place, entry.mean.shape)
            for read, entry in zip(reads, entries, strict=True)
        ]
        indices = [read.index for read in reads]
        batch = as_batch(indices, entries, draws, self.empty, prompt_dropout, condition_dropout)
        return batch.to(self.accelerator.device)


def order_samples(config: TrainConfig, fitting: Fitting, processes: int) -> tuple[Split, SampleOrder]:
    """What is trained on and in which order.

    InvalidArgument for no data, and for a batch larger than the data.
    """
    training = config.training
    wanted = config.validation.samples if config.validation.every_steps else 0
    split = split_samples(fitting, config.data, config.seed, wanted)
    together = None if config.cache.enabled else shards_to_keep_together(config.data, fitting.source)
    batch_size = training.batch_size * training.gradient_accumulation_steps * processes
    return split, SampleOrder(split.trained, batch_size, config.seed, together)


def gather_material(
    config: TrainConfig,
    fitting: Fitting,
    split: Split,
    order: SampleOrder,
    base: Base,
    cache: TensorCache | None,
    accelerator: Accelerator,
) -> Material:
    """Fill the cache where there is one, and let go of the encoders that are then idle.

    Raises InvalidArgument for too many unreadable samples.
    """
    training, is_cached = config.training, cache is not None
    report = SkipReport(
        Path(config.output_dir) / "skipped.jsonl",
        len(split.trained) + len(split.held_out) + len(split.unreadable),
        config.data.max_bad_fraction,
    )
    report.add(split.unreadable)
    empty = {name: tensor.cpu() for name, tensor in base.encode_empty_prompt().items()}
    encoders_hash = base.content_hash()
    shapes = {**split.trained, **split.held_out}
    held_out = list(split.held_out)
    reader: Reader
    if cache is not None:
        needed = samples_to_encode(split, order, training.max_train_steps)
        names, bad = _encode(config, fitting, needed, base, encoders_hash, cache, accelerator, report)
        usable = usable_shapes(needed.trained, bad)
        order = SampleOrder(usable, order.global_batch_size, config.seed) if needed is split else order
        reader = CachedSamples(cache, names, substitutes(usable, bad))
        held_out = [index for index in held_out if names.get(index) in cache]
        base.release()
    else:
        held_out = [index for index in held_out if _is_readable(fitting, index, report)]
        reader = FittedSamples(fitting, shapes, members_by_shape(split.trained), config.seed)
    return Material(
        config,
        accelerator,
        Feed(
            order,
            reader,
            training.batch_size,
            training.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            config.data.workers,
        ),
        reader,
        empty,
        None if is_cached else base,
        held_out,
        report,
        _content(encoders_hash, fitting, shapes),
    )


def _encode(
    config: TrainConfig,
    fitting: Fitting,
    split: Split,
    base: Base,
    encoders_hash: str,
    cache: TensorCache,
    accelerator: Accelerator,
    report: SkipReport,
) -> tuple[dict[int, str], set[int]]:
    """Index -> name in the cache; and the samples that cannot be read."""
    indices = sorted([*split.trained, *split.held_out])
    known = KnownHashes(known_hashes_file(config.data, cache.folder))
    names, unreadable = entry_names(fitting, indices, encoders_hash, known, accelerator)
    report.add(unreadable)
    failed = fill_cache(cache, names, fitting, base, accelerator, config.data.workers)
    report.add(failed)
    return names, {skipped.index for skipped in (*unreadable, *failed)}


def _is_readable(fitting: Fitting, index: int, report: SkipReport) -> bool:
    """Whether a held-out sample can be; none stands in for it, since those that could are trained on."""
    try:
        fitting.fit(index)
    except BadSample as error:
        report.add([Skipped(index, fitting.source.key(index), str(error))])
        return False
    return True


def _content(encoders_hash: str, fitting: Fitting, indices: Iterable[int]) -> str:
    digest = hashlib.sha256(encoders_hash.encode())
    for index in indices:
        digest.update(f"{fitting.source.key(index)}\n".encode())
    return digest.hexdigest()


def _shape(content: Entry | FittedSample) -> tuple[int, ...]:
    return tuple(content.mean.shape) if isinstance(content, Entry) else content.image.size
