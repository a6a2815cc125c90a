"""Where the package keeps what it can make again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """nexus-adapters below XDG_CACHE_HOME, or else below ~/.cache; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexus-adapters"
