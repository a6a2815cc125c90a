"""Every option of every command with values that it cannot have: one line that blames what the user typed."""

import argparse
import re
import shutil
from pathlib import Path

import pytest
from tests import tiny
from tests.prepare.sets import write_folder
from tests.study.plans import write_plan, write_world
from tests.training.runs import config
from tests.weights import use_weights

from nexus_adapters.app import models as app_models
from nexus_adapters.bases import loading
from nexus_adapters.cli import COMMANDS, build_parser, demo_sheet, main
from nexus_adapters.evaluation import run as evaluation
from nexus_adapters.prepare import engines
from nexus_adapters.study import cells
from nexus_adapters.training import run as training
from nexus_adapters.training.recipe import dump_config

# None is a value for every option; some are the name of a file that is not what it should be.
FEW = ("-1", "no/where")
MORE = (
    "nan",
    "",
    "0",
    "x",
    "x=y",
    "1e400",
    "2,3",
    "99999999999999999999",
    "low=x",
    "file.txt",
    "file.png",
    ".",
)


class ReachedError(OSError):
    """The work itself, which these tests do not do: everything has been checked by then."""


def stop(*_, **__):
    raise ReachedError("reached")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_weights):
    root = tmp_path_factory.mktemp("refusals")
    write_plan(write_world(root), "plan")
    write_folder(root / "photos", 2)
    (root / "train.toml").write_text(dump_config(config(root, root / "run")))
    (root / "file.txt").write_text("text")
    (root / "file.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    tiny.image(128, 128).save(root / "map.png")
    with pytest.MonkeyPatch.context() as patch:
        (root / "weights").symlink_to(tiny_weights)
        use_weights(patch, root / "weights")
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setattr(loading, "load_base", stop)  # for generate, which imports it when it runs
        patch.setattr(demo_sheet, "load_methods", stop)
        patch.setattr(app_models.Models, "load", stop)
        patch.setattr(evaluation, "load_base", stop)
        patch.setattr(training, "load_encoders", stop)
        patch.setattr(engines, "run_local", stop)
        patch.setattr(cells, "run_study", stop)
        yield root


def arguments(command, root, out):
    """A good call of a command: (positional arguments by name, options)."""
    return {
        "demo": ({}, ["--out", out]),
        "generate": ({}, ["--prompt", "a", "--map", root / "map.png", "--out", out / "a.png", "--steps", 1]),
        "extract": ({"name": "canny", "image": root / "map.png"}, ["--out", out / "a.png"]),
        "prepare": ({"source": root / "photos"}, ["--conditions", "canny", "--out", out / "set"]),
        "train": ({"recipe": root / "train.toml"}, []),
        "evaluate": ({}, ["--out", out / "evaluation", "--count", 2, "--adapter", "prime"]),
        "study": ({"plan": root / "plan.toml"}, ["--out", out / "study"]),
        "convert": ({"source": root / "weights" / "canny" / "prime", "dest": out / "new"}, []),
        "info": ({"path": "prime"}, []),
        "app": ({}, ["--port", 0]),
    }[command]


def parser_of(command):
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices[command]


def call(capfd, argv):
    """(status, the one line on stderr where the status is 2)."""
    capfd.readouterr()
    try:
        status = main([str(part) for part in argv])
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    assert status in (0, 1, 2), (argv, err)
    warned = f"nexus {argv[0]}: warning: "
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith(warned)]
    lines = [line for line in lines if "%|" not in line]  # a progress bar
    if status == 2:
        assert out == "", argv
        assert len(lines) == 1, (argv, err)
        return lines[0]
    if status == 1:
        assert lines[-1].endswith(": error: reached"), (argv, err)
    return None


def check(command, line, tried, value):
    """What is blamed exists, and the value that was tried is shown."""
    begin = f"nexus {command}: error: "
    assert line.startswith(begin), line
    message = line.removeprefix(begin)
    blamed = re.split(r":| is required", message)[0]
    known = {option for action in parser_of(command)._actions for option in action.option_strings}
    assert set(re.findall(r"--[\w-]+", blamed)) <= known, line
    if blamed.split(" ")[0] == tried or blamed.startswith(f"argument {tried}"):
        assert any(text in message for text in shown_as(value)), (line, value)


def shown_as(value):
    """A value as an error may show it: as it was typed, read as numbers, or as a path."""
    yield value
    yield str(Path(value).absolute())
    yield from (f"'{part}'" for part in value.split(","))
    key, equals, rest = value.partition("=")
    if equals:
        yield from (f"'{key}'", f"'{rest}'")
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return
    yield from (str(numbers[0]), str(numbers))


def sweep(command, values, root, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # where some of the values become folders
    for name in ("file.txt", "file.png"):
        shutil.copyfile(root / name, name)
    out = tmp_path / "out"
    out.mkdir()
    positional, options = arguments(command, root, out)
    refused = set()
    for action in parser_of(command)._actions:
        if action.dest in ("help", "list", "debug", "imports") or action.nargs == 0:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            continue
        for value in values:
            if action.option_strings:
                tried = action.option_strings[0]
                given = [*positional.values(), *options, f"{tried}={value}"]
            else:
                tried = action.metavar
                given = [*({**positional, action.dest: value}).values(), *options]
                if value.startswith("-"):
                    continue
            line = call(capfd, [command, *given])
            if line is not None:
                check(command, line, tried, value)
                refused.add(tried)
    return refused


@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_do_not_fit_blame_an_option_that_exists(command, root, tmp_path, monkeypatch, capfd):
    refused = sweep(command, FEW, root, tmp_path, monkeypatch, capfd)
    assert len(refused) >= {"info": 2, "study": 2, "train": 2}.get(command, 3)


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
def test_more_values_that_do_not_fit(command, root, tmp_path, monkeypatch, capfd):
    sweep(command, MORE, root, tmp_path, monkeypatch, capfd)
