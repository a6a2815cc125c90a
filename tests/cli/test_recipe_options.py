"""`nexus train` and `nexus evaluate` list and print the recipes that ship with the package."""

import pytest

from nexus_adapters.cli import main
from nexus_adapters.recipes import recipe_names, recipe_text, recipe_title


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_recipes_are_listed_and_printed(command, capsys):
    names = recipe_names(command)
    with pytest.raises(SystemExit) as stop:
        main([command, "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert [line.split("  ")[0].strip() for line in lines] == list(names)
    assert all(recipe_title(name) in line for name, line in zip(names, lines, strict=True))
    with pytest.raises(SystemExit) as stop:
        main([command, "--show", names[0]])
    assert stop.value.code == 0
    assert capsys.readouterr().out == recipe_text(names[0])


def test_an_unknown_recipe_is_one_line_with_the_names(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--show", "evaluate-embedded"])
    assert stop.value.code == 2
    assert main(["train", "sd15"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("nexus train: error: ")
        assert ", ".join(recipe_names("train")) in line
