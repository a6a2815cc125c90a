"""Recipes that ship with the package are found by name, where no file has that name."""

import tomllib

import pytest
from tests.refusals import refused

from nexus_adapters.recipes import recipe_file, recipe_names, recipe_text, recipe_title


def test_each_command_has_its_own():
    train, evaluate = recipe_names("train"), recipe_names("evaluate")
    assert {"embedded-canny", "sd15-canny", "sdxl-canny"} <= set(train)
    assert "evaluate-embedded" in evaluate
    assert not set(train) & set(evaluate)
    for name in train:
        assert "adapter" in tomllib.loads(recipe_text(name))
    for name in evaluate:
        assert "adapters" in tomllib.loads(recipe_text(name))


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_each_has_a_title(command):
    for name in recipe_names(command):
        assert 10 < len(recipe_title(name)) < 110


def test_a_name_is_looked_up_only_where_there_is_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = recipe_file("sd15-canny", "train", "RECIPE")
    assert shipped.read_text(encoding="utf-8") == recipe_text("sd15-canny")
    (tmp_path / "sd15-canny").mkdir()
    with refused("RECIPE", "'sd15-canny', which is not a file", expected="sd15-canny"):
        recipe_file("sd15-canny", "train", "RECIPE")
    (tmp_path / "sd15-canny").rmdir()
    (tmp_path / "sd15-canny").write_text("seed = 1")
    assert recipe_file("sd15-canny", "train", "RECIPE").samefile(tmp_path / "sd15-canny")


@pytest.mark.parametrize(
    "name", ["sd15", "evaluate-embedded", "recipes/sd15-canny.toml", "", "../recipes/sd15-canny"]
)
def test_what_is_neither_is_refused_with_the_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("RECIPE", expected=", ".join(recipe_names("train"))):
        recipe_file(name, "train", "RECIPE")
