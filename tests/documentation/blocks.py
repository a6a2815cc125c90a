"""The code blocks of a page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sybil import Document, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
_INFO = re.compile(r'(?P<language>[\w-]*)(?: title="(?P<title>[^"]+)")?[^\n]*\n')


@dataclass(frozen=True)
class Block:
    """A code block: where it is, its language and title ("" for none), and its text."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks in their order."""
    document = Document(text, str(PAGES[page]))
    for region in RawFencedCodeBlockLexer(_INFO)(document):
        assert isinstance(region, Region)
        found = region.lexemes
        line = text.count("\n", 0, region.start) + 1
        yield Block(page, line, found["language"], found["title"] or "", str(found["source"]))
