"""Command lines at random, seeded: each is one line on stderr and a status, and nothing wrong is accepted."""

import argparse
import random

import pytest
from PIL import Image
from tests.weights import hide_weights

from nexus_adapters.cli import COMMANDS, build_parser, main

# What no option takes that wants a number, and what options may make of numbers, texts and paths.
NO_NUMBERS = ["", "x", "nan", "NaN", "1e999", "-inf", "1,2,", "0x10", "--", "None", "1 2", "\x00", "½"]
NUMBERS = ["0", "-1", "1", "1.5", "7", "1e3", "99999999999999999999", "-0", "1e-300", "1_0"]
WORDS = ["", " ", "0", "-1", "a=b", "=", "a=", "=b", "a=b=c", "null", "embedded", "canny", "depth", "prime"]
PATTERNS = ["[", "]", "{", "{0..3}", "{3..0}", "{0..}", "*", "?"]
PATHS = ["/", "..", ".", "~", "no/where", "no/where.toml", "\\\\host\\x", "C:\\x", "folder", "folder/"]
FILES = ["image.png", "image.png/x", "empty.png", "text.toml", "empty.toml", "latin.toml", "junk.safetensors"]
URLS = ["https://u:secret@localhost:1/x", "s3://secret@x/y"]
ODD = ["c\x1b[2Jd", "e\nf", "g\udcff", "h\u202ei", "j" * 3000, "nul\x00l"]
TEXTS = [*WORDS, *PATTERNS, *PATHS, *FILES, *URLS, *ODD]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with files of all kinds, and no base, network, code or terminal."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "image.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "empty.toml").touch()
    (tmp_path / "text.toml").write_text("a = [1, {b = 2}]\n[data]\npath = 3\n")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hide_weights(monkeypatch)
    return tmp_path


def actions_of(command):
    """The arguments that a command's parser declares."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    left_out = ("help", "imports", "debug")  # which import any module, and show tracebacks
    return [action for action in commands.choices[command]._actions if action.dest not in left_out]


def value(action, draw):
    """A value of an option, and whether it cannot be accepted."""
    if action.choices is not None and draw.random() < 0.6:
        return str(draw.choice(list(action.choices))), False
    if action.type in (int, float):
        is_wrong = draw.random() < 0.3
        return draw.choice(NO_NUMBERS if is_wrong else NUMBERS), is_wrong
    return draw.choice(TEXTS), False


def shows_and_exits(argv):
    """Whether an option prints what it is asked for when it is parsed, whatever else is there."""
    return any(text.partition("=")[0] in ("--list", "--show") for text in argv)


def command_line(draw):
    """One, and whether it must be refused."""
    command = draw.choice(list(COMMANDS))
    argv, is_wrong = [], False
    for action in actions_of(command):
        is_needed = action.required or not action.option_strings
        if draw.random() > (0.85 if is_needed else 0.12):
            continue
        name = [draw.choice(action.option_strings)] if action.option_strings else []
        if action.nargs == 0:
            argv += name
            continue
        text, wrong = value(action, draw)
        argv += [f"{name[0]}={text}"] if name and draw.random() < 0.5 else [*name, text]
        is_wrong |= wrong
    if draw.random() < 0.1:
        argv.insert(draw.randrange(len(argv) + 1), draw.choice(["--nonsense", "-x", "--", *TEXTS]))
    return [command, *argv], is_wrong


def check(seed, capsys):
    argv, is_wrong = command_line(random.Random(seed))
    try:
        status = main(argv)
    except SystemExit as stop:  # of argparse
        status = stop.code
    out, err = capsys.readouterr()
    assert status in ((1, 2) if is_wrong and not shows_and_exits(argv) else (0, 1, 2)), argv
    errors = [line for line in err.splitlines() if "warning: " not in line]
    if status:
        assert len(errors) == 1, (argv, err)
        assert errors[0].startswith("nexus"), (argv, err)
        assert "error: " in errors[0], (argv, err)
    if not shows_and_exits(argv):
        assert "secret" not in out + err, argv
    assert not {"\x1b", "\x00", "\u202e"} & set(err), argv


@pytest.mark.parametrize("part", range(3))
def test_any_command_line_is_answered_in_one_line(part, capsys):
    for seed in range(part * 70, (part + 1) * 70):
        check(seed, capsys)


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_command_lines(part, capsys):
    for seed in range(1000 + part * 400, 1000 + (part + 1) * 400):
        check(seed, capsys)
