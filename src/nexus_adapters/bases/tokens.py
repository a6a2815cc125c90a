"""Count the tokens of prompts, and keep libraries from logging each prompt that is truncated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.library_logs import logs_hidden

if TYPE_CHECKING:
    from nexus_adapters.bases.loading import BaseSource

_TRANSFORMERS = "transformers.tokenization_utils_base"
_MESSAGES = ("was truncated", "Token indices sequence length")  # diffusers' and transformers'


def find_tokenizer(source: BaseSource) -> Any:
    """Load a base's tokenizer from its folder or the Hub's cache; None if it is not on this machine."""
    import transformers

    location, place = source.location, {"subfolder": "tokenizer"}
    if Path(location).is_dir():
        location, place = str(Path(location) / "tokenizer"), {}
    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(
            location, local_files_only=True, trust_remote_code=False, **place
        )
    except Exception:  # if it matters, loading the base reports it
        return None
    return found


def token_counts(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each prompt, including start and end tokens (see `token_limit`)."""
    if not prompts:
        return []
    with truncation_unlogged():
        found = tokenizer(list(prompts), truncation=False, padding=False)
    return [len(tokens) for tokens in found.input_ids]


def token_limit(tokenizer: Any) -> int:
    """Return how many tokens of a prompt are read, such as 77."""
    return int(tokenizer.model_max_length)


@contextmanager
def truncation_unlogged(pipe: Any = None) -> Iterator[None]:
    """Keep `pipe.encode_prompt` from logging each truncated prompt; the caller reports their number."""
    encode = getattr(type(pipe), "encode_prompt", None)  # its module has the logger, also for a subclass
    names = [_TRANSFORMERS, *([] if encode is None else [encode.__module__])]
    with logs_hidden(_MESSAGES, names):
        yield
