import json
import os
import stat

import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters.cli.options import check_output, read_settings, save_json, save_png

IMAGE = Image.new("RGB", (5, 3), "red")


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_settings_travel_with_the_png(tmp_path):
    settings = {"prompt": 'a "größer" star\n', "seed": 3, "scale": 0.5, "options": {"low": None}}
    save_png(tmp_path / "a.png", IMAGE, settings, force=False)
    assert read_settings(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (5, 3)
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_png_without_settings_is_refused(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    with refused("path", f"'{tmp_path / 'a.png'}'"):
        read_settings(tmp_path / "a.png")


def test_existing_file_stays_without_force(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"mine")
    with refused("--out", f"'{target}', which exists", hint="--force"):
        save_png(target, IMAGE, {}, force=False)
    assert target.read_bytes() == b"mine"
    save_png(target, IMAGE, {}, force=True)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert names(tmp_path) == ["a.png"]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("mine")
    with pytest.raises(TypeError):
        save_json(target, {"bad": object()}, force=True)
    with pytest.raises(KeyError):
        save_png(tmp_path / "b.png", _Unsavable(), {}, force=True)
    assert target.read_text() == "mine"
    assert names(tmp_path) == ["a.json"]


class _Unsavable(Image.Image):
    """Writes half of itself, then fails."""

    def save(self, fp, format=None, **params):
        fp.write(b"half")
        raise KeyError("half")


def test_result_obeys_the_umask_and_follows_links(tmp_path):
    before = os.umask(0o022)
    try:
        save_json(tmp_path / "a.json", {"x": 1}, force=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    save_json(tmp_path / "link.json", {"x": 2}, force=True)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jpg", ".png"),
        ("a", ".png"),
        ("missing/a.png", "an existing folder"),
        ("folder.png", "a file"),
    ],
)
def test_bad_output_is_named(tmp_path, path, expected):
    (tmp_path / "folder.png").mkdir()
    with refused("--map", f"'{tmp_path / path}'", expected=expected):
        check_output(tmp_path / path, ".png", force=True, argument="--map")


def test_a_folder_that_cannot_be_written_to_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with refused("--out", f"'{tmp_path}'", expected="can be written to"):
        check_output(tmp_path / "a.png", ".png", force=False)
