"""Log lines of libraries around calls of this package: hidden if they mislead users, or shown as warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

# Image processors report that they use Pillow, as they always do here: torchvision is not required. And
# diffusers lists the parts that `to` should have kept in float32 even where there are none.
MISLEADING = ("requires torchvision (not installed)", "should be kept in float32: []")
_LOGGED_BY = ("transformers.utils.import_utils", "diffusers.models.modeling_utils")


@contextmanager
def logs_hidden(phrases: Sequence[str] = MISLEADING, logged_by: Sequence[str] = _LOGGED_BY) -> Iterator[None]:
    """Drop log records of these loggers whose message has one of these phrases.

    Args:
        phrases: parts of messages.
        logged_by: names of the loggers themselves; a filter on a parent would not see the records.
    """

    def is_something_else(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(phrase in message for phrase in phrases)

    loggers = [logging.getLogger(name) for name in logged_by]
    for logger in loggers:
        logger.addFilter(is_something_else)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_something_else)


_LIBRARIES = ("diffusers", "transformers", "huggingface_hub")
# The tokenizer warns of indexing errors, but the pipeline truncates long prompts and logs what it removes.
_DROPPED = ("Token indices sequence length is longer", *MISLEADING)


@contextmanager
def library_logs_as_warnings() -> Iterator[None]:
    """Collect the log lines of diffusers, transformers and huggingface_hub; on success, warn of each once.

    If the block raises, the lines are dropped: the exception says it all. Lines logged while the libraries
    are imported, which happens here, are dropped too: they concern features that are not used.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    # The first call sets up the library's logger, with a handler to stderr.
    diffusers.utils.logging.get_logger()
    transformers.utils.logging.get_logger()
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [collector], False
        import_module("nexus_adapters.methods")
        collector.lines.clear()
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
    for line in dict.fromkeys(collector.lines):
        warnings.warn(line, stacklevel=3)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if not any(words in line for words in _DROPPED):
            self.lines.append(line)
