"""The pages that are written from the code are up to date. If not: python scripts/docs_reference.py"""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def docs_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("docs_reference")


def test_the_reference_says_what_the_code_says(docs_reference):
    for name, text in docs_reference.pages().items():
        assert (ROOT / "docs" / "reference" / name).read_text() == text, name


def test_values_and_bounds_are_in_words(docs_reference):
    from nexus_adapters.training.config import BelowOne, Fraction, NotNegative

    assert docs_reference.values(NotNegative) == "integer ≥ 0"
    assert docs_reference.values(Fraction) == "number from 0 to 1"
    assert docs_reference.values(BelowOne) == "number ≥ 0 and < 1"
    assert docs_reference.values(float | None) == "number"
    assert docs_reference.values(tuple[str, ...]) == "list: text"
