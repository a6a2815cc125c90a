"""Log lines of libraries that mislead users of this package, hidden around its own calls and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
