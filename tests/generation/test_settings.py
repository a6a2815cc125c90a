import io

import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters.generation.settings import read_settings, save_png

IMAGE = Image.new("RGB", (5, 3), "red")


def test_settings_are_read_from_the_png(tmp_path):
    settings = {"prompt": 'a "größer" star\n', "seed": 3, "options": {"low": None}}
    save_png(tmp_path / "a.png", IMAGE, settings)
    assert read_settings(tmp_path / "a.png") == settings
    stream = io.BytesIO()
    save_png(stream, IMAGE, settings)
    stream.seek(0)
    assert read_settings(stream) == settings


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_png_is_refused(content):
    with refused("map"):
        read_settings(io.BytesIO(content), "map")


def test_a_png_without_settings_is_refused(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    with refused("image", "without"):
        read_settings(tmp_path / "a.png")
