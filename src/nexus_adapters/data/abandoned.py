"""Unfinished files that a kill has left in a folder where others may be writing theirs."""

import time
from contextlib import suppress
from pathlib import Path

_AFTER_S = 3600.0  # in which nobody has written to one


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Delete the files that fit the glob pattern and have long been left alone."""
    for file in folder.glob(pattern):
        with suppress(OSError):  # another process was faster, or it is open on a system that holds on to such
            if time.time() - file.stat().st_mtime > _AFTER_S:
                file.unlink()
