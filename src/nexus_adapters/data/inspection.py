"""Inspect a dataset before it is used: readable samples, captions, sizes and ignored files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_adapters.bases.tokens import token_counts, token_limit
from nexus_adapters.data.crop import Size
from nexus_adapters.data.feed import Skipped
from nexus_adapters.data.samples import BadSample, Sample, Source
from nexus_adapters.errors import in_utf8
from nexus_adapters.progress import progress

LOOKED_AT = 1000  # samples; of a larger dataset, this many evenly spaced ones are inspected
UNKNOWN = -1  # the length of a caption without a tokenizer


def caption_lengths(captions: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the number of tokens in each caption, 0 for one without words; `UNKNOWN` without a tokenizer."""
    counts = [UNKNOWN] * len(captions) if tokenizer is None else token_counts(tokenizer, captions)
    return [count if caption.strip() else 0 for caption, count in zip(captions, counts, strict=True)]


def describe_captions(lengths: Iterable[Sequence[int]], tokenizer: Any) -> list[str]:
    """Return the problems with captions, one per line; empty if there are none.

    `lengths` are the lengths of each sample's captions, from `caption_lengths`.
    """
    samples = [list(counts) for counts in lengths]
    empty = sum(not any(counts) for counts in samples)
    lines = []
    if empty:
        of_all = f"samples with an empty caption: {empty:,} of {len(samples):,}"
        lines.append(f"{of_all}; the adapter cannot learn from prompts" if empty == len(samples) else of_all)
    limit = 0 if tokenizer is None else token_limit(tokenizer)
    if limit and (cut := sum(any(count > limit for count in counts) for counts in samples)):
        lines.append(
            f"samples with a caption longer than {limit} tokens, which will be truncated: "
            f"{cut:,} of {len(samples):,}"
        )
    return lines


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting a dataset.

    Attributes:
        samples: number of samples.
        looked_at: number of samples that were read.
        left_out: those of them that cannot be used; each reason begins with its kind and a colon.
        lengths: lengths of the captions of each of the others, from `caption_lengths`.
        small: how many of the others have an image that must be enlarged.
        ignored: what the source ignores, as text; "" for nothing.
        tokenizer: the tokenizer used to measure the captions, if any.
    """

    samples: int
    looked_at: int
    left_out: Sequence[Skipped]
    lengths: Sequence[Sequence[int]]
    small: int
    ignored: str
    tokenizer: Any = None

    def describe(self) -> list[str]:
        """Return the facts that users should know, one per line."""
        looked_at = f"{self.looked_at:,} samples"
        lines = []
        if self.looked_at < self.samples:
            looked_at += " inspected"
            lines.append(f"{looked_at}, evenly spaced over all {self.samples:,}")
        if self.ignored:
            lines.append(f"ignored {self.ignored}")
        if self.left_out:
            kinds = Counter(each.reason.partition(":")[0] for each in self.left_out)
            counts = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
            first = self.left_out[0]
            reason = first.reason if first.key in first.reason else f"{first.key!r}: {first.reason}"
            lines.append(f"{len(self.left_out):,} of {looked_at} cannot be used ({counts}); first {reason}")
        lines += describe_captions(self.lengths, self.tokenizer)
        if self.small:
            lines.append(
                f"{self.small:,} of {len(self.lengths):,} images are smaller than the resolution and enlarged"
            )
        return list(map(in_utf8, lines))


def evenly_spaced(indices: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the indices, evenly spaced and in order."""
    count = min(most, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def inspect(
    source: Source,
    indices: Sequence[int],
    load: Callable[[int], Sample],
    target: Callable[[Size], Size],
    tokenizer: Any = None,
) -> Inspection:
    """Read samples of a dataset, at most `LOOKED_AT`, and count what users may not expect.

    Args:
        source: the dataset.
        indices: indices of the samples that would be used.
        load: reads a sample; raises BadSample for one that cannot be used.
        target: (width, height) of an image -> (width, height) that it is fitted to.
        tokenizer: the base's tokenizer; None if it is not available.
    """
    chosen = evenly_spaced(indices, LOOKED_AT)
    left_out, lengths, small = [], [], 0
    for index in progress(chosen, what="inspecting samples", unit="sample", delay=2):
        try:
            sample = load(index)
        except BadSample as error:
            left_out.append(Skipped(index, source.key(index), str(error)))
            continue
        lengths.append(caption_lengths(sample.captions, tokenizer))
        size = sample.image.size
        small += any(side < wanted for side, wanted in zip(size, target(size), strict=True))
    ignored = str(getattr(source, "ignored", ""))  # not every kind of source ignores something
    return Inspection(len(indices), len(chosen), left_out, lengths, small, ignored, tokenizer)
