"""The commands in shell blocks: what each line calls, and whether it can be called so."""

import re
import shlex
import tomllib
from collections.abc import Iterator

from tests.documentation.blocks import ROOT

from nexus_adapters.cli import build_parser

_EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Programs of others, whose arguments are not checked.
OTHERS = {
    "accelerate",
    "cd",
    "export",
    "git",
    "hf",
    "ls",
    "mkdir",
    "ray",
    "source",
    "torchrun",
}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without prompts, comments, and what it is chained to."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while "&&" in words:
            place = words.index("&&")
            yield words[:place]
            words = words[place + 1 :]
        if words:
            yield words


def check(words: list[str]) -> None:
    """Fails for a command that cannot be called like this."""
    program, *rest = words
    if "nexus_adapters.cli" in words:  # under a launcher
        program, rest = "nexus", words[words.index("nexus_adapters.cli") + 1 :]
    if program == "nexus":
        build_parser().parse_args(rest)
    elif program in ("make",):
        unknown = [word for word in rest if "=" not in word and word not in _TARGETS]
        assert not unknown, f"no such target: {unknown}"
    elif program in ("python", "python3", ".venv/bin/python"):
        assert rest[0] in ("-m", "-c") or (ROOT / rest[0]).is_file(), f"no such file: {rest[0]}"
    elif program in ("pip", "uv"):
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= _EXTRAS, f"no such extra: {extras}"
    else:
        assert program in OTHERS, f"unknown program: {program}"
