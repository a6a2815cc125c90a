"""Every symbol that the documentation names by its full path exists."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parents[1]
# In code spans. Two parts are also names of entry points and of metadata.
SYMBOL = re.compile(r"`(nexus_adapters(?:\.\w+){2,})`")
PAGES = {
    str(page.relative_to(ROOT)): sorted(set(SYMBOL.findall(page.read_text(encoding="utf-8"))))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
NAMED = [(page, name) for page, names in PAGES.items() for name in names]


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_a_named_symbol_exists(page, name):
    resolve_name(name)


def test_the_map_names_the_code():
    assert len(PAGES["docs/explanation/spec-to-code.md"]) >= 25
