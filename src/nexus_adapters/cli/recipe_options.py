"""The options of `nexus train` and `nexus evaluate` for the recipes that ship with the package."""

import argparse
from collections.abc import Sequence
from typing import Any

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.recipes import recipe_names, recipe_text, recipe_title


def add_recipe_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Declare --list and --show, which print and exit. `command`: "train" or "evaluate"."""
    parser.add_argument(
        "--list", action=_ListRecipes, const=command, nargs=0, help="list the recipes by name and exit"
    )
    parser.add_argument(
        "--show",
        action=_ShowRecipe,
        const=command,
        metavar="NAME",
        help="print a recipe, to save and edit a copy, and exit",
    )


class _ListRecipes(argparse.Action):
    """Prints when it is parsed, as --help does, so that nothing else is required."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        names = recipe_names(str(self.const))
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {recipe_title(name)}")
        parser.exit()


class _ShowRecipe(argparse.Action):
    """Prints when it is parsed, as --help does, so that nothing else is required."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        name, names = str(values), recipe_names(str(self.const))
        if name not in names:
            parser.error(str(InvalidArgument("--show", f"one of {', '.join(names)}", repr(name))))
        print(recipe_text(name), end="")
        parser.exit()
