"""README is short, and its links lead to files. `documentation/test_pages.py` runs its examples."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()
