"""The screenshots of the web app are those that its page shows, and they are small."""

from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "how-to"


def test_the_page_shows_each_screenshot(monkeypatch):
    pytest.importorskip("playwright", reason="needs playwright")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    shots = import_module("screenshot_app").SHOTS
    page = (FOLDER / "web-app.md").read_text()
    assert {path.stem for path in (FOLDER / "web-app").iterdir()} == set(shots)
    for name, (width, height, *_) in shots.items():
        assert f"(web-app/{name}.webp)" in page
        file = FOLDER / "web-app" / f"{name}.webp"
        assert file.stat().st_size < 120_000
        with Image.open(file) as image:
            assert image.size == (width, height)
