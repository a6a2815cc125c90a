"""The words that an embedded base was trained on, and a warning of words in prompts that it does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nexus_adapters.errors import warn_caller

_WORD = re.compile(r"[^\W_]+")
_MOST = 5  # unknown words that one warning names


def warn_of_unknown_words(pipe: Any, name: str, words: Mapping[str, Sequence[str]]) -> None:
    """From now on, warn where a prompt of this pipeline has words that its base was not trained on.

    It is the text encoder that notices, since all pipelines made of the same parts share it.

    Args:
        pipe: a pipeline with a tokenizer that keeps words whole or in pieces, such as CLIP's.
        name: what the warning calls the base.
        words: what the base knows, in groups with a title each.
    """
    known = frozenset(word for group in words.values() for phrase in group for word in phrase.split())
    listed = "; ".join(f"{title}: {', '.join(group)}" for title, group in words.items())
    pipe.text_encoder.register_forward_pre_hook(
        _Reader(pipe.tokenizer, known, name, listed), with_kwargs=True
    )


@dataclass(frozen=True)
class _Reader:
    """A hook of a text encoder. A class of its own, since a pipeline with a closure cannot be copied."""

    tokenizer: Any
    known: frozenset[str]
    name: str
    listed: str

    def __call__(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if not isinstance(tokens, Tensor):
            return
        unknown = list(dict.fromkeys(self.unknown_words(tokens)))
        if unknown:
            shown = ", ".join(map(repr, unknown[:_MOST])) + (", ..." if len(unknown) > _MOST else "")
            warn_caller(f"prompt: the base '{self.name}' does not know {shown}. It knows {self.listed}")

    def unknown_words(self, tokens: Tensor) -> Iterator[str]:
        """Of token ids (rows, length), in their order."""
        for row in tokens.tolist():
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            yield from (word for word in _WORD.findall(text) if word not in self.known)
