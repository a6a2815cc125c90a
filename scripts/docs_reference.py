"""Write the pages of docs/reference that follow from the code: cli.md and recipe.md.

    python scripts/docs_reference.py

They are committed, so that they can be read on GitHub, too; a test compares them with the code. The command
line comes from the parsers, and the keys of recipes from the dataclasses and the strings below their fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import griffe

from nexus_adapters.cli import COMMANDS, build_parser
from nexus_adapters.evaluation.config import EvaluationRecipe
from nexus_adapters.methods import METHODS, AdapterOptions
from nexus_adapters.study.plan import CellGroup, MethodPlan, StudyPlan
from nexus_adapters.training.config import TrainConfig

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
NOTE = "<!-- Written by scripts/docs_reference.py: change the code, and run it again. -->"


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)


def pages() -> dict[str, str]:
    """File name -> what the file says."""
    return {"cli.md": "\n".join(command_line()), "recipe.md": "\n".join(recipes())}


# The command line.


ABOUT_COMMANDS = """
`nexus COMMAND --help` shows the same on the terminal. Bad input ends with exit status 2 and one line that
names the option.

Every command also takes `--help`; `--debug`, which shows the traceback of an error; and `--import MODULE`,
which first imports a module or .py file of yours that registers blocks, methods, bases, conditions or
metrics.
""".strip()


def command_line() -> Iterator[str]:
    """The lines of cli.md."""
    yield from ("# Command line", "", NOTE, "")
    yield ABOUT_COMMANDS
    yield from ("", "| Command | What it does |", "|---|---|")
    yield from (f"| [`nexus {name}`](#nexus-{name}) | {summary} |" for name, (_, summary) in COMMANDS.items())
    yield ""
    for name, parser in commands().items():
        yield from command(name, parser)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Name -> parser."""
    actions = build_parser()._actions  # argparse has no public list of them
    (found,) = (action for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


SHARED = {"--help", "--debug", "--import"}  # of every command: said once


def command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A command's section."""
    yield from (f"## nexus {name}", "", str(parser.description), "", "```sh")
    yield from import_module(COMMANDS[name][0]).EXAMPLES
    yield from ("```", "")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not SHARED & set(action.option_strings)]
        if not actions:
            continue
        title = {"positional arguments": "Arguments", "options": "Options"}.get(str(group.title), group.title)
        yield from (f"**{capitalized(str(title))}**", "")
        if group.description:
            yield from (group.description, "")
        yield from ("| Option | Meaning |" if title != "Arguments" else "| Argument | Meaning |", "|---|---|")
        yield from (f"| {option(action)} | {cell(meaning(action))} |" for action in actions)
        yield ""


def option(action: argparse.Action) -> str:
    """What the user types."""
    name = ", ".join(action.option_strings) or str(action.metavar)
    takes = action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
    if not action.option_strings or not takes or action.choices:
        return f"`{name}`"
    value = str(action.metavar or action.dest.upper())
    return f"`{name} {f'[{value}]' if action.nargs == '?' else value}`"


def meaning(action: argparse.Action) -> str:
    """An action's help, with its choices, and whether it has to be given."""
    text = capitalized(str(action.help))
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    is_required = action.required and bool(action.option_strings)
    return ("Required. " if is_required else "") + text + ("." if choices else "") + choices


# Recipes, evaluations and plans.

INTRODUCTION = """
A recipe is a TOML file for `nexus train`. [Training](training.md) is the guide; `nexus train --list` lists
the included recipes. A key that a recipe leaves out has the default. An unknown key or a value out of range
is an error that names the key. On the command line, `--set section.key=VALUE` overrides a key.

`nexus evaluate` and `nexus study` read TOML files, too: see [evaluations](#evaluations) and [plans](#plans).
""".strip()


def recipes() -> Iterator[str]:
    """The lines of recipe.md."""
    yield from ("# Recipe keys", "", NOTE, "", INTRODUCTION, "", "## Top level", "")
    sections = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    hints = get_type_hints(TrainConfig)
    nested = [name for name in sections if dataclasses.is_dataclass(hints[name])]
    yield from table(TrainConfig, without={*nested, "adapter"})
    for name in sections:
        if name == "adapter":
            yield from adapter_section()
        elif name in nested:
            yield from section(f"[{name}]", hints[name])
    yield from ("## Evaluations", "", "The keys of a file for `nexus evaluate`.", "")
    yield "`[base]` and `[data]` are as in a recipe."
    yield from ("", *table(EvaluationRecipe, without={"base", "data"}))
    yield from ("## Plans", "", "The keys of a file for `nexus study`.", "", *table(StudyPlan))
    yield from section("[methods.NAME]", MethodPlan)
    yield from section("[[cells]]", CellGroup)


def section(title: str, kind: type) -> Iterator[str]:
    """A table of a TOML file."""
    yield from (f"## `{title}`", "", summary_of(kind), "", *table(kind))


def adapter_section() -> Iterator[str]:
    """The keys that every method has, and those of each."""
    yield from ("## `[adapter]`", "", summary_of(AdapterOptions), "", *table(AdapterOptions))
    common = {field.name for field in dataclasses.fields(AdapterOptions)}
    by_options: dict[type, list[str]] = {}
    for name in METHODS:
        by_options.setdefault(METHODS[name].Options, []).append(f'"{name}"')
    for kind, names in by_options.items():
        if {field.name for field in dataclasses.fields(kind)} - common:
            yield from (f"**For method {', '.join(names)}**", "", *table(kind, without=common))


def summary_of(kind: type) -> str:
    """The first line of a class's docstring, without the section that it begins with."""
    line = inspect.cleandoc(str(kind.__doc__)).splitlines()[0]
    head, colon, rest = line.partition("`: ")
    return capitalized(rest if colon and head.startswith("`[") else line)


def table(kind: type, without: set[str] | frozenset[str] = frozenset()) -> Iterator[str]:
    """A row per field, those of a parent included."""
    hints, texts = get_type_hints(kind, include_extras=True), descriptions(kind)
    yield from ("| Key | Value | Default | Meaning |", "|---|---|---|---|")
    for field in dataclasses.fields(kind):
        if field.name not in without:
            value = f"{cell(values(hints[field.name]))} | {cell(default(field))}"
            yield f"| `{field.name}` | {value} | {cell(texts[field.name])} |"
    yield ""


def descriptions(kind: type) -> dict[str, str]:
    """Field -> the string below it, in the class or a parent."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            file = Path(inspect.getfile(base))
            members = griffe.visit(base.__module__, filepath=file, code=file.read_text())[
                base.__name__
            ].members
            found |= {name: member.docstring.value for name, member in members.items() if member.docstring}
    return {name: " ".join(text.split()) for name, text in found.items()}


def default(field: dataclasses.Field[Any]) -> str:
    """As TOML has it."""
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return "required"
    return toml(field.default)


def toml(value: Any) -> str:
    """A default value in TOML, or in words."""
    if value is None or value == "" or value == ():
        return "unset" if value is None else "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value!r}`".replace("'", '"')


WORDS = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", Any: "any value"}


def values(hint: Any) -> str:
    """What a field takes, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([values(arguments[0]), limits(arguments[1:])]).strip()
    if origin is Literal:
        return ", ".join(f'`"{choice}"`' for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(values(each) for each in arguments if each is not type(None)))
    if origin is tuple:
        return f"list: {values(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} numbers"
    if origin is dict or hint is dict:
        return "table"
    return WORDS.get(hint) or ("table" if dataclasses.is_dataclass(hint) else str(hint))


NO_LIMIT = 1e9  # larger bounds only keep slips out


def limits(annotations: tuple[Any, ...]) -> str:
    """The bounds of pydantic's `Field`, in words."""
    found = {
        name: getattr(bound, name)
        for annotation in annotations
        for bound in getattr(annotation, "metadata", ())
        for name in ("ge", "gt", "le", "lt")
        if getattr(bound, name, NO_LIMIT) < NO_LIMIT
    }
    if found.keys() == {"ge", "le"}:
        return f"from {found['ge']:g} to {found['le']:g}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " and ".join(f"{signs[name]} {limit:g}" for name, limit in found.items())


def capitalized(text: str) -> str:
    """The text with its first letter in uppercase."""
    return text[:1].upper() + text[1:]


def cell(text: str) -> str:
    """Text as a table has it."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
