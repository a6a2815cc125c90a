"""What diffusers and the libraries below it log, as one-line warnings."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

_LIBRARIES = ("diffusers", "transformers", "huggingface_hub")
# The tokenizer warns of indexing errors, but the pipeline truncates long prompts, and logs what it has cut.
# Processors log that they use Pillow, as all do here: torchvision is not required.
_MISLEADING = ("Token indices sequence length is longer", "requires torchvision (not installed)")


@contextmanager
def library_logs_as_warnings() -> Iterator[None]:
    """Collect what the libraries log, and issue each line once as a warning if the block succeeds.

    What they log before they raise is dropped, since the exception says it. So is what they log when they are
    imported, which happens here first: it concerns options that are not used.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    # Both set up their logger, with a handler to stderr, when it is first asked for.
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
        if not any(words in line for words in _MISLEADING):
            self.lines.append(line)
