"""The frame of the command line: errors, interruption, warnings, and what it imports."""

import subprocess
import sys
import warnings

import pytest

import nexus_adapters
from nexus_adapters import cli
from nexus_adapters.cli import COMMANDS, main
from nexus_adapters.errors import InvalidArgument


@pytest.fixture
def info_does(monkeypatch):
    """Replace what `nexus info PATH` does."""

    def replace(run):
        monkeypatch.setattr("nexus_adapters.cli.info.run", run)

    return replace


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: nexus {name}")


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom nexus_adapters.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'cv2', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nexus: error: the following arguments are required: COMMAND"),
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
def test_errors_are_one_line_unless_debugging(capsys, info_does, error, status):
    def run(args):
        raise error("too\n  much\tof it")

    info_does(run)
    assert main(["info", "a"]) == status
    assert capsys.readouterr().err == "nexus info: error: too much of it\n"
    for argv in (["--debug", "info", "a"], ["info", "a", "--debug"]):
        with pytest.raises(error, match="too"):
            main(argv)


@pytest.mark.parametrize(
    ("command", "argument", "typed"),
    [
        (["info", "a"], "path", "PATH"),
        (["info", "a"], "adapter", "PATH"),
        (["info", "a"], "condition", "--condition"),
        (["info", "a"], "unheard_of", "unheard_of"),
        (["generate", "--prompt", "a", "--out", "a"], "level_scales", "--level-scales"),
        (["generate", "--prompt", "a", "--out", "a"], "unet", "--base"),
        (["generate", "--prompt", "a", "--out", "a"], "--scale", "--scale"),
        (["evaluate", "--out", "a"], "num_inference_steps", "--steps"),
        (["evaluate", "--out", "a"], "guidance_scale", "--guidance"),
        (["train", "a"], "data.path", "data.path"),
        (["train", "a"], "output_dir", "output_dir"),
        (["convert", "a", "b"], "residual", "--residual"),
    ],
)
def test_an_argument_is_called_what_the_user_typed(capsys, monkeypatch, command, argument, typed):
    """And one that the user did not type keeps its name: no option is made up."""

    def run(args):
        raise InvalidArgument(argument, "little", "much", "Take less")

    monkeypatch.setattr(f"nexus_adapters.cli.{command[0]}.run", run)
    assert main(command) == 2
    expected = f"nexus {command[0]}: error: {typed}: expected little, got much. Take less\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(InvalidArgument) as caught:
        main(["--debug", *command])
    assert caught.value.name == typed


def test_bugs_keep_their_traceback(info_does):
    def run(args):
        raise RuntimeError("a bug")

    info_does(run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", "a"])


def test_interruption_is_one_line_and_130(capsys, info_does):
    def run(args):
        raise KeyboardInterrupt

    info_does(run)
    assert main(["info", "a"]) == 130
    assert capsys.readouterr().err == "nexus info: interrupted\n"


def test_warnings_are_one_line_and_do_not_outlive_the_call(capsys, info_does):
    def run(args):
        warnings.warn("mind\nthe gap", stacklevel=1)
        return 0

    info_does(run)
    shown = warnings.showwarning
    assert main(["info", "a"]) == 0
    assert capsys.readouterr().err == "nexus info: warning: mind the gap\n"
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
