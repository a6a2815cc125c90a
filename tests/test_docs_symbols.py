"""Every symbol that the documentation names by its full path exists."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In code spans. Two parts are also names of entry points and of metadata.
SYMBOL = re.compile(r"`(nexus_adapters(?:\.\w+){2,})`")
PAGES = {
    str(page.relative_to(ROOT)): sorted(set(SYMBOL.findall(page.read_text(encoding="utf-8"))))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
NAMED = [(page, name) for page, names in PAGES.items() for name in names]


def resolve(name):
    """What a dotted name means; ModuleNotFoundError or AttributeError where it means nothing."""
    parts = name.split(".")
    found, place = import_module(parts[0]), 1
    while place < len(parts) and not hasattr(found, parts[place]):
        found = import_module(".".join(parts[: place + 1]))
        place += 1
    for part in parts[place:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_a_named_symbol_exists(page, name):
    resolve(name)


@pytest.mark.parametrize("name", ["nexus_adapters.adapter.stage.Stag", "nexus_adapters.adapter.stages.Stage"])
def test_a_misspelled_symbol_is_found(name):
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve(name)


def test_the_map_names_the_code():
    assert len(PAGES["docs/explanation/spec-to-code.md"]) >= 25
