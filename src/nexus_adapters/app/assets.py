"""The page's HTML, CSS and JavaScript files."""

from functools import cache
from pathlib import Path


@cache
def text_of(name: str) -> str:
    """Return the content of a file next to this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
