"""Filling the cache before the first step: every sample encoded once, whichever process does it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nexus_adapters.bases.base import Base
from nexus_adapters.data.cache import TensorCache
from nexus_adapters.data.entries import Entry, encode
from nexus_adapters.data.feed import Place, Read, Skipped, leave_ctrl_c_to_the_trainer, raise_errors
from nexus_adapters.data.fitting import Fitting
from nexus_adapters.data.known_hashes import KnownHashes
from nexus_adapters.data.samples import BadSample

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
