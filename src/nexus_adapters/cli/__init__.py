"""The command `nexus`: one module a command, found in `COMMANDS`.

A command's module has `add_arguments(parser)`, `run(args) -> int`, and `EXAMPLES`, the command lines that end
its help. It is imported for every call, `nexus --help` included, so whatever is slow to import (torch above
all) is imported inside `run`, and only once the arguments have been checked. Bad input is an
`InvalidArgument`: one line on stderr, exit status 2. Its name is that of a function's argument; `main` shows
the command's option or argument of the same name in its place. A module lists names that differ in `TYPED`.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    "prepare": ("nexus_adapters.cli.prepare", "make a training set of images, with structure maps"),
    "train": ("nexus_adapters.cli.train", "train an adapter from a recipe"),
    "evaluate": (
        "nexus_adapters.cli.evaluate",
        "generate the same samples with several adapters and score them",
    ),
    "study": ("nexus_adapters.cli.study", "train and evaluate everything that a plan compares"),
    "convert": ("nexus_adapters.cli.convert", "convert an adapter to the format of this package"),
    "info": ("nexus_adapters.cli.info", "describe a saved adapter"),
}

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {_one_line(message)}\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Of `--option=--` argparse drops the value, and stores a list where a text or a number belongs."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nexus` with these arguments (by default the process's) and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        with renamed(partial(_as_typed, args.typed)):
            _check_text(args)
        if args.imports:
            from nexus_adapters.registry import import_modules

            import_modules(args.imports, "--import")
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)  # libraries to developers; users cannot act on it
            warnings.filterwarnings(
                "ignore", r"The `local_dir_use_symlinks`"
            )  # diffusers to the Hub's client
            warnings.showwarning = _warn_in_one_line(args.prog)
            with renamed(partial(_as_typed, args.typed)):
                status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`nexus info PATH | head -1`); python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, ValueError, OSError, MemoryError, FloatingPointError) as error:
        if args.debug:
            raise
        return _report(args.prog, error)
    return status


def _check_text(args: argparse.Namespace) -> None:
    """`InvalidArgument` for an argument that is not UTF-8, unless it names a file that exists."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_unicode(text) and not os.path.exists(text):
                typed = "--import" if name == "imports" else name
                raise InvalidArgument(typed, "text in UTF-8", ascii(text))


def build_parser() -> argparse.ArgumentParser:
    """Assemble the parser of `nexus` from the commands' own."""
    parser = OneLineParser(
        prog="nexus", description="Text-guided adapters for frozen diffusion models.", allow_abbrev=False
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
        # Also accepted behind the command; SUPPRESS, or its default would undo the one given before.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.add_argument(
            "--import",
            action="append",
            default=[],
            dest="imports",
            metavar="MODULE",
            help="a module or .py file of yours to import first; it registers blocks, methods, bases, "
            "conditions or metrics (repeatable)",
        )
        module.add_arguments(command)
        typed = {**_typed(command), **getattr(module, "TYPED", {})}
        typed.pop("imports")  # --import is done before the command runs; a recipe has a key of this name
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
    """What the user typed for an argument, or for a place in it: `level_scales[1]` is `--level-scales[1]`."""
    argument, bracket, place = name.partition("[")
    return typed.get(name) or f"{typed.get(argument, argument)}{bracket}{place}"


def _typed(command: argparse.ArgumentParser) -> dict[str, str]:
    """Name of an argument -> what the user types for it: `level_scales` -> `--level-scales`."""
    actions = command._actions  # argparse has no public list of them
    return {
        action.dest: action.option_strings[0] if action.option_strings else str(action.metavar)
        for action in actions
    }


# What errors mean that Python most often raises without a message.
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


_LIBRARIES = ("diffusers", "transformers", "huggingface_hub")
# The tokenizer warns of indexing errors, but the pipeline truncates long prompts, and logs what it cuts.
# Processors log that they use Pillow, as all do here: torchvision is not required.
_MISLEADING = ("Token indices sequence length is longer", "requires torchvision (not installed)")


@contextmanager
def library_logs_as_warnings() -> Iterator[None]:
    """Collect what diffusers and the libraries below it log; if the block succeeds, warn of each line once.

    What they log before they raise is dropped, since the exception says it. So is what they log when they are
    imported, which happens here first: it concerns options that are not used.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    # Both set up their logger, with a handler to stderr, when it is first asked for.
    diffusers.utils.logging.get_logger()
    transformers.utils.logging.get_logger()
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [collector], False
        import_module("nexus_adapters.methods")
        collector.lines.clear()
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
    for line in dict.fromkeys(collector.lines):
        warnings.warn(line, stacklevel=3)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if not any(words in line for words in _MISLEADING):
            self.lines.append(line)
