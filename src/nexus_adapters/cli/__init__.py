"""The command `nexus`: one module per command, listed in `COMMANDS`.

A command's module has `add_arguments(parser)`, `run(args) -> int`, and `EXAMPLES`, the command lines that
end its help. It is imported on every call, `nexus --help` included, so slow imports (above all torch)
happen inside `run`, after the arguments are checked. Bad input raises `InvalidArgument`: one line on stderr,
exit status 2. The error names a function's argument; `main` replaces it by the command's option or argument
of the same name. A module lists names that differ in `TYPED`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn, TextIO

from nexus_adapters import __version__
from nexus_adapters.errors import InvalidArgument, is_unicode, renamed, shown

# name: (module, help line), in the order of the help.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("nexus_adapters.cli.demo", "generate a sheet that shows what the embedded adapters do"),
    "generate": ("nexus_adapters.cli.generate", "generate an image from a prompt and a structure map"),
    "extract": ("nexus_adapters.cli.extract", "extract the structure map of an image"),
    "prepare": ("nexus_adapters.cli.prepare", "make a training set with structure maps from images"),
    "train": ("nexus_adapters.cli.train", "train an adapter from a recipe"),
    "evaluate": (
        "nexus_adapters.cli.evaluate",
        "generate the same samples with several adapters and score them",
    ),
    "study": ("nexus_adapters.cli.study", "train and evaluate everything that a plan compares"),
    "convert": ("nexus_adapters.cli.convert", "convert an adapter to the format of this package"),
    "info": ("nexus_adapters.cli.info", "describe a saved adapter"),
    "app": ("nexus_adapters.cli.app", "open a page in the browser to draw, type and see"),
}

EXAMPLES = (
    "nexus demo",
    'nexus generate --image photo.png --prompt "a red star" --out star.png',
    "nexus generate --help",
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and exit with status 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {_one_line(message)}\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Reject `--option=--`: argparse drops the value and would store a list in its place."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nexus` with these arguments (default: the command line) and return the exit status."""
    given = sys.argv[1:] if argv is None else argv
    if not given:
        build_parser().print_help()
        return 0
    args = build_parser().parse_args(given)
    try:
        with renamed(partial(_as_typed, args.typed)):
            _check_text(args)
        if args.imports:
            from nexus_adapters.registry import import_modules

            import_modules(args.imports, "--import")
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)  # for developers; users cannot act on it
            warnings.filterwarnings(
                "ignore", r"The `local_dir_use_symlinks`"
            )  # an argument that diffusers passes to huggingface_hub
            warnings.showwarning = _warn_in_one_line(args.prog)
            with renamed(partial(_as_typed, args.typed)):
                status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader is gone (`nexus info PATH | head -1`); Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, ValueError, OSError, MemoryError, FloatingPointError) as error:
        if args.debug:
            raise
        return _report(args.prog, error)
    return status


def _check_text(args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` for an argument that is not UTF-8, unless it is the path of a file."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_unicode(text) and not os.path.exists(text):
                typed = "--import" if name == "imports" else name
                raise InvalidArgument(typed, "text in UTF-8", ascii(text))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nexus` from the parsers of its commands."""
    parser = OneLineParser(
        prog="nexus",
        description="Text-guided adapters for frozen diffusion models.",
        epilog=_examples(EXAMPLES),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nexus-adapters {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        module = import_module(module_name)
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=_examples(getattr(module, "EXAMPLES", ())),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        # Also accepted after the command. Without SUPPRESS, the default would undo a --debug before it.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.add_argument(
            "--import",
            action="append",
            default=[],
            dest="imports",
            metavar="MODULE",
            help="first import your module or .py file, which registers blocks, methods, bases, conditions "
            "or metrics (repeatable)",
        )
        module.add_arguments(command)
        typed = {**_typed(command), **getattr(module, "TYPED", {})}
        typed.pop("imports")  # --import is handled before the command runs; recipes have a key of this name
        command.set_defaults(run=module.run, prog=command.prog, typed=typed)
    return parser


_EXAMPLES = "examples:\n"


def _examples(lines: Sequence[str]) -> str | None:
    """The end of a command's help."""
    return _EXAMPLES + "\n".join(f"  {line}" for line in lines) if lines else None


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the line breaks of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


def _as_typed(typed: Mapping[str, str], name: str) -> str:
    """Return what the user typed for an argument, or for an item of it: `low[1]` -> `--low[1]`."""
    argument, bracket, place = name.partition("[")
    return typed.get(name) or f"{typed.get(argument, argument)}{bracket}{place}"


def _typed(command: argparse.ArgumentParser) -> dict[str, str]:
    """Return name of an argument -> what the user types for it, as in `level_scales` -> `--level-scales`."""
    actions = command._actions  # argparse has no public list of them
    return {
        action.dest: action.option_strings[0] if action.option_strings else str(action.metavar)
        for action in actions
    }


# Messages for errors that Python usually raises without one.
_UNSAID: dict[type[BaseException], str] = {MemoryError: "not enough memory"}


def _report(prog: str, error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    message = _one_line(str(error)) or _UNSAID.get(type(error), type(error).__name__)
    print(f"{prog}: error: {message}", file=sys.stderr)
    return BAD_INPUT if isinstance(error, ValueError) else FAILED


def _one_line(message: str) -> str:
    return " ".join(shown(message).split())


def _warn_in_one_line(prog: str) -> Callable[..., None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"{prog}: warning: {_one_line(str(message))}", file=sys.stderr)

    return show
