"""The frame of the command line: errors, interruption, warnings, and what it imports."""

import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from types import ModuleType

import pytest

import nexus_adapters
from nexus_adapters import cli
from nexus_adapters.cli import COMMANDS, EXAMPLES, build_parser, main
from nexus_adapters.errors import InvalidArgument


@pytest.fixture
def command(monkeypatch):
    """Add a command `nexus test PATH [--level-scales N]` that does what it is given."""
    module = ModuleType("test_command")

    def add_arguments(parser):
        parser.add_argument("path", metavar="PATH")
        parser.add_argument("--level-scales")

    def does(run):
        module.run = run

    module.add_arguments = add_arguments
    module.TYPED = {"unet": "--base"}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "test", (module.__name__, "does what it is given"))
    return does


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: nexus {name}")


def examples():
    return [(name, line) for name in COMMANDS for line in import_module(COMMANDS[name][0]).EXAMPLES]


@pytest.mark.parametrize(("name", "line"), examples())
def test_the_help_of_a_command_ends_with_examples_that_it_accepts(capsys, name, line):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"\n  {line}\n" in capsys.readouterr().out.partition("\nexamples:")[2]
    program, *argv = shlex.split(line.replace("\\\n", " "))
    assert program == "nexus"
    assert build_parser().parse_args(argv).prog == f"nexus {name}"


def test_every_command_has_an_example():
    assert {name for name, _ in examples()} == set(COMMANDS)


def test_help_and_bad_arguments_import_nothing_heavy():
    code = (
        "import sys\nfrom nexus_adapters.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "argv = ['generate', '--prompt', 'a', '--map', 'none.png', '--out', 'a.png', '--scale', 'nan']\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'cv2', 'PIL', 'pydantic', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert main(argv) == 2\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, (_, summary) in COMMANDS.items():
        assert name in result.stdout
        assert summary in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nexus-adapters {nexus_adapters.__version__}\n"


def test_without_arguments_the_help_is_shown_which_ends_with_examples_that_are_accepted(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nexus"])
    assert main() == 0
    out = capsys.readouterr().out
    assert out == build_parser().format_help()
    assert out.endswith("".join(f"  {line}\n" for line in EXAMPLES))
    for line in EXAMPLES:
        if "--help" not in line:
            build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--debug"], "nexus: error: the following arguments are required: COMMAND"),
        (["draw"], "nexus: error: argument COMMAND: invalid choice: 'draw'"),
        (["info"], "nexus info: error: the following arguments are required: PATH"),
        (["info", "a", "--colour"], "nexus: error: unrecognized arguments: --colour"),
        (
            ["extract", "canny", "a.png", "--out", "b.png", "--low", "x"],
            "argument --low: invalid float value",
        ),
    ],
)
def test_usage_errors_are_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("error", "status"), [(ValueError, 2), (OSError, 1)])
def test_errors_are_one_line_unless_debugging(capsys, command, error, status):
    def run(args):
        raise error("too\n  much\tof it")

    command(run)
    assert main(["test", "a"]) == status
    assert capsys.readouterr().err == "nexus test: error: too much of it\n"
    for argv in (["--debug", "test", "a"], ["test", "a", "--debug"]):
        with pytest.raises(error, match="too"):
            main(argv)


@pytest.mark.parametrize(
    ("argument", "typed"),
    [
        ("path", "PATH"),
        ("level_scales", "--level-scales"),
        ("level_scales[1]", "--level-scales[1]"),
        ("unet", "--base"),
        ("--scale", "--scale"),
        ("data.path", "data.path"),
        ("unheard_of", "unheard_of"),
    ],
)
def test_an_argument_is_called_what_the_user_typed(capsys, command, argument, typed):
    """And one that the user did not type keeps its name: no option is made up."""

    def run(args):
        raise InvalidArgument(argument, "little", "much", "Take less")

    command(run)
    assert main(["test", "a"]) == 2
    assert capsys.readouterr().err == f"nexus test: error: {typed}: expected little, got much. Take less\n"
    with pytest.raises(InvalidArgument) as caught:
        main(["--debug", "test", "a"])
    assert caught.value.name == typed


def test_bugs_keep_their_traceback(command):
    def run(args):
        raise RuntimeError("a bug")

    command(run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["test", "a"])


def test_interruption_is_one_line_and_130(capsys, command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert main(["test", "a"]) == 130
    assert capsys.readouterr().err == "nexus test: interrupted\n"


def test_warnings_are_one_line_and_do_not_outlive_the_call(capsys, command):
    def run(args):
        warnings.warn("mind\nthe gap", stacklevel=1)
        return 0

    command(run)
    shown = warnings.showwarning
    assert main(["test", "a"]) == 0
    assert capsys.readouterr().err == "nexus test: warning: mind the gap\n"
    assert warnings.showwarning is shown


def test_closed_pipe_is_no_traceback(tmp_path):
    code = (
        "import sys, nexus_adapters.cli as cli, nexus_adapters.cli.info as info\n"
        "info.run = lambda args: [print('x' * 80) for _ in range(20000)] and 0\n"
        "sys.exit(cli.main(['info', 'a']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == cli.FAILED


NOT_UTF8 = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["generate", "--map", "a.png", "--out", "b.png", "--prompt", NOT_UTF8], "--prompt"),
        (["generate", "--prompt", "a", "--out", "b.png", "--map", NOT_UTF8], "--map"),
        (["generate", "--prompt", "a", "--map", "a.png", "--out", NOT_UTF8], "--out"),
        (["demo", "--out", NOT_UTF8], "--out"),
        (["extract", "canny", NOT_UTF8, "--out", "b.png"], "IMAGE"),
        (["train", NOT_UTF8], "RECIPE"),
        (["train", "recipe.toml", "--set", "seed=1", "--set", f"data.path={NOT_UTF8}"], "--set"),
        (["train", "recipe.toml", "--import", NOT_UTF8], "--import"),
        (["info", NOT_UTF8], "PATH"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_one_line(argv, name, capsys):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nexus {argv[0]}: error: {name}: ")
    assert "caf\\udce9" in line


def test_a_file_of_such_a_name_is_read(command, tmp_path, capsys):
    file = tmp_path / NOT_UTF8
    file.touch()
    command(lambda args: args.path == str(file))
    assert main(["test", str(file)]) == 1  # as `run` has returned


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "not enough memory"), (OSError(), "OSError"), (ValueError(""), "ValueError")],
)
def test_an_error_without_a_message_is_named(command, capsys, error, said):
    def fail(args):
        raise error

    command(fail)
    assert main(["test", "a"]) != 0
    assert capsys.readouterr().err == f"nexus test: error: {said}\n"
