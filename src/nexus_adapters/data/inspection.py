"""What a data set has, looked at before it is used: readable samples, captions, sizes, ignored files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nexus_adapters.bases.tokens import token_counts, token_limit

LOOKED_AT = 1000  # samples, evenly spaced over larger data sets
UNKNOWN = -1  # the length of a caption where there is no tokenizer
_NAMED = 3  # files or samples that a line names


def caption_lengths(captions: Sequence[str], tokenizer: Any) -> list[int]:
    """The tokens of each caption, 0 for one without words; `UNKNOWN` where `tokenizer` is None."""
    counts = [UNKNOWN] * len(captions) if tokenizer is None else token_counts(tokenizer, captions)
    return [count if caption.strip() else 0 for caption, count in zip(captions, counts, strict=True)]


def describe_captions(lengths: Iterable[Sequence[int]], tokenizer: Any) -> list[str]:
    """What a user has to know of samples' captions, a line each; none where all is well.

    `lengths`: of each sample's captions, from `caption_lengths`.
    """
    samples = [list(counts) for counts in lengths]
    empty = sum(not any(counts) for counts in samples)
    lines = []
    if empty:
        of_all = f"{empty:,} of {len(samples):,} samples have an empty caption"
        lines.append(f"{of_all}: nothing is learned of prompts" if empty == len(samples) else of_all)
    limit = 0 if tokenizer is None else token_limit(tokenizer)
    if limit and (cut := sum(any(count > limit for count in counts) for counts in samples)):
        lines.append(
            f"{cut:,} of {len(samples):,} samples have a caption of more than {limit} tokens, of which only "
            f"the first {limit} are read"
        )
    return lines
