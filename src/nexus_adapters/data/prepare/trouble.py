"""A machine in trouble must stop a run, and not leave samples out as if they were bad."""

from __future__ import annotations

import errno

import cv2

from nexus_adapters.errors import mentions

_ERRNOS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC, errno.ETIMEDOUT)
_WORDS = ("out of memory", "insufficient memory", "cuda error", "cublas", "cudnn")


def is_machines(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is the machine's: memory, accelerator, disk or network."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        # Not of a ValueError or OSError, whose text may hold the name of a file.
        if isinstance(error, RuntimeError | cv2.error) and mentions(error, _WORDS):
            return True
        error = error.__cause__
    return False
