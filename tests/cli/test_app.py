"""`nexus app`: its options, checked before anything is loaded."""

import sys

import pytest

from nexus_adapters import packages
from nexus_adapters.cli import build_parser, main
from nexus_adapters.cli.app import models_of


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port"),
        (["--max-queue", "0"], "--max-queue"),
        (["--base", "org/sd"], "--adapter"),
        (["--condition", "canny"], "--condition"),
        (["--adapter", "prime", "--condition", "fog"], "--condition"),
        (
            ["--adapter", "prime", "--adapter", "slim", "--condition", "canny"]
            + ["--condition", "depth"] * 2,
            "--condition",
        ),
        (["--adapter", "no-such-adapter"], "--adapter"),
    ],
)
def test_bad_options_are_one_line(arguments, words, module_weights, capsys):
    pytest.importorskip("gradio")
    assert main(["app", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nexus app: error: {words}")


def test_a_missing_gradio_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(packages, "is_installed", lambda module: module != "gradio")
    assert main(["app"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_adapters_are_paired_with_their_conditions(module_weights):
    pytest.importorskip("gradio")
    options = ["--adapter", "prime", "--adapter", "slim", "--condition", "canny", "--condition", "depth"]
    models = models_of(build_parser().parse_args(["app", *options]))
    assert [(each.source, each.condition) for each in models.sources] == [
        ("prime", "canny"),
        ("slim", "depth"),
    ]
    assert models_of(build_parser().parse_args(["app"])).sources == ()


def test_help_needs_no_gradio():
    assert "gradio" not in {name for name in sys.modules if name == "nexus_adapters.app.page"}
    with pytest.raises(SystemExit) as status:
        main(["app", "--help"])
    assert status.value.code == 0
