"""Reading the settings that commands embed in their images."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexus_adapters.generation import settings as stored


def read_settings(path: Path) -> dict[str, Any]:
    """The settings, none of which says where anything lies on the machine that made the image."""
    settings = stored.read_settings(path)
    for text in _texts(settings):
        assert not os.path.isabs(text), text
        assert str(path.parent) not in text, text
    return settings


def _texts(content: Any) -> Iterator[str]:
    """All texts, however deep they are."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _texts(each)
