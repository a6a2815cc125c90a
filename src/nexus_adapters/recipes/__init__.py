"""The recipes that ship with the package, by name: `nexus train sd15-canny` reads `sd15-canny.toml` here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nexus_adapters.errors import InvalidArgument

_FOLDER = Path(__file__).parent
_FOR_EVALUATE = "evaluate-"  # how the names of those for `nexus evaluate` begin


def recipe_names(command: str) -> tuple[str, ...]:
    """The names of the recipes for a command, "train" or "evaluate", sorted."""
    names = sorted(file.stem for file in _FOLDER.glob("*.toml"))
    return tuple(name for name in names if name.startswith(_FOR_EVALUATE) == (command == "evaluate"))


def recipe_file(source: str | os.PathLike[str], command: str, argument: str) -> Path:
    """The file of a recipe.

    Args:
        source: the path of a TOML file or, if there is no such file, the name of a recipe that ships with the
            package.
        command: "train" or "evaluate", whose recipes have names.
        argument: what the caller's user calls `source`.

    Raises:
        InvalidArgument: if there is neither; it lists the names.
    """
    path, names = Path(source), recipe_names(command)
    if path.is_file():
        return path
    if str(source) in names and not os.path.lexists(path):
        return _FOLDER / f"{source}.toml"
    why = "is not a file" if os.path.lexists(path) else "does not exist"
    raise InvalidArgument(argument, f"a TOML file or one of {', '.join(names)}", f"'{path}', which {why}")


def recipe_text(name: str) -> str:
    """The TOML of a recipe that ships with the package, with its comments. `name`: one of `recipe_names`."""
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def recipe_title(name: str) -> str:
    """What a recipe is for: its comment up to the first period or colon. `name`: one of `recipe_names`."""
    lines = [line.removeprefix("#").strip() for line in recipe_text(name).partition("\n\n")[0].splitlines()]
    return re.split(r"[.:](?: |$)", " ".join(lines))[0]
