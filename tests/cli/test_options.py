import argparse
import json
import os
import stat
from collections import defaultdict

import pytest
from PIL import Image
from tests.png_settings import read_settings
from tests.refusals import refused

from nexus_adapters.choices import BALANCE_NAMES
from nexus_adapters.cli import build_parser
from nexus_adapters.cli.options import check_output, save_json, save_png
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.generation.requests import ControlRequest, MapSource
from nexus_adapters.injection.scales import BALANCES

IMAGE = Image.new("RGB", (5, 3), "red")


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_settings_are_stored_in_the_png(tmp_path):
    settings = {"prompt": 'a "größer" star\n', "seed": 3, "scale": 0.5, "options": {"low": None}}
    save_png(tmp_path / "a.png", IMAGE, settings, force=False)
    assert read_settings(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (5, 3)
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_existing_file_stays_without_force(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"mine")
    with refused("--out", f"'{target}', which already exists", hint="--force"):
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


def test_a_file_that_is_written_as_a_folder_is_refused(tmp_path):
    with refused("--out", "a.png/'", expected=".png"):
        check_output(f"{tmp_path}/a.png/", ".png", force=True)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))
    with refused("--out", f"'{tmp_path}'", expected="can be written to"):
        check_output(tmp_path / "a.png", ".png", force=False)


# An option has the same name, meaning and default in every command. What differs, and why:
EXCEPTIONS = {
    ("--out", "metavar", "help"): "a file or a folder, as the command writes it",
    ("--out", "required", "default"): "nexus demo writes to demo/ where nothing is said",
    (
        "--adapter",
        "metavar",
        "default",
        "help",
    ): "nexus evaluate names each for its tables, nexus app has all",
    ("--option", "metavar", "help"): "nexus prepare extracts several maps: NAME.KEY=VALUE",
    (
        "--count",
        "default",
        "help",
    ): "one image, all samples of the data or all of the source: how many there are",
    ("--resolution", "help"): "nexus prepare keeps the size of images where nothing is said",
    ("--kind", "choices"): "nexus prepare also reads COCO folders, nexus evaluate prepared sets",
    ("--split", "default", "help"): "nexus prepare also reads COCO folders",
    ("--batch-size", "help"): "nexus evaluate generates that many at once, nexus prepare extracts their maps",
    ("--condition", "default", "help"): "nexus info and app read it for adapters that are given by name",
    ("--list", "help"): "of extractors or recipes",
    ("--guidance", "help"): "nexus demo has one base, whose own scale is the default",
}
FIELDS = ("type", "choices", "default", "required", "nargs", "metavar", "help")
# nexus evaluate hands on only what was given, so that a file's values stay; the defaults are the config's.
CONFIG_DEFAULTS = {
    "--base": EvaluationConfig().base.path,
    "--condition": EvaluationConfig().data.condition,
    "--steps": EvaluationConfig().num_inference_steps,
    "--policy": EvaluationConfig().policy,
    "--scale": EvaluationConfig().scale,
    "--seed": EvaluationConfig().seed,
    "--batch-size": EvaluationConfig().batch_size,
    "--kind": "auto",
    "--dtype": EvaluationConfig().dtype,
    "--option": [],
}
# nexus generate takes these once for each control, so that a default cannot be told apart in the parser.
CONTROL = ControlRequest(MapSource("map.png"))
CONTROL_DEFAULTS = {
    "--condition": CONTROL.condition_name,
    "--scale": CONTROL.scale,
    "--policy": CONTROL.settings()["policy"],
}


def declared():
    """Option -> command -> its fields."""
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found = defaultdict(dict)
    for command, parser in commands.choices.items():
        for action in parser._actions:
            for option in action.option_strings:
                fields = {name: getattr(action, name) for name in FIELDS}
                defaults = {"evaluate": CONFIG_DEFAULTS, "generate": CONTROL_DEFAULTS}.get(command, {})
                if fields["default"] is None:
                    fields["default"] = defaults.get(option)
                found[option][command] = fields
    return found


def test_an_option_is_the_same_in_every_command():
    different = set()
    for option, commands in declared().items():
        different |= {(option, name) for name in FIELDS if len({str(f[name]) for f in commands.values()}) > 1}
    assert different == {(option, name) for option, *names in EXCEPTIONS for name in names}


def test_commands_agree_on_options_that_many_have():
    found = declared()
    for option in (
        "--steps",
        "--guidance",
        "--seed",
        "--condition",
        "--base",
        "--policy",
        "--dtype",
        "--force",
    ):
        assert len(found[option]) > 1


def test_every_balance_can_be_chosen():
    assert tuple(BALANCES) == BALANCE_NAMES
