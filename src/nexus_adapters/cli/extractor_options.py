"""An extractor's options on the command line: `--option KEY=VALUE`, and canny's `--low` and `--high`."""

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nexus_adapters.errors import expect, renamed

_OWN_FLAGS = ("low", "high")


def declare_extractor_options(parser: Any) -> None:
    """Declare them on a parser or one of its groups."""
    parser.add_argument("--low", type=float, help="canny: lower threshold (default: 100)")
    parser.add_argument("--high", type=float, help="canny: upper threshold (default: 200)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the extractor, such as auto=true, sigma=2 or model=FOLDER (repeatable)",
    )


def extractor_options(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The options that were given to the extractor of this name. InvalidArgument names the argument."""
    options = {flag: getattr(args, flag) for flag in _OWN_FLAGS if getattr(args, flag) is not None}
    for key, value in read_pairs(args.option, "--option", name).items():
        expect(key not in options, "--option", f"{key} once", f"{key}={value} and --{key}")
        options[key] = value
    return options


def read_pairs(pairs: Sequence[str], argument: str, name: str) -> dict[str, Any]:
    """The value of each KEY=VALUE: text where the extractor takes text, else parsed as TOML."""
    from nexus_adapters.conditions import EXTRACTORS

    defaults = EXTRACTORS[name].defaults() if name in EXTRACTORS else {}
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        expect(bool(equals and key), argument, "KEY=VALUE", f"'{pair}'")
        expect(key not in found, argument, f"{key} once", f"{key} twice, the second as '{pair}'")
        found[key] = text if isinstance(defaults.get(key), str) else _by_toml(text)
    return found


def _by_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@contextmanager
def without_chatter(uses_models: bool) -> Iterator[None]:
    """Silence messages and progress bars of model libraries; they are imported only where models are used."""
    if not uses_models:
        yield
        return
    from nexus_adapters.bases.source import no_loading_bars
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    with library_logs_as_warnings(), no_loading_bars():
        yield


@contextmanager
def running_extractor(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Around a call of an extractor: silences libraries, and lets errors name options as users write them.

    An error about `sigma` names `--option sigma`.
    """
    from nexus_adapters.conditions import EXTRACTORS

    takes = {*EXTRACTORS[name].options(), *options}

    def as_written(argument: str) -> str:
        if argument in _OWN_FLAGS:
            return f"--{argument}"
        if argument == "options":
            return "--option"
        return f"--option {argument}" if argument in takes else argument

    with without_chatter(_loads_model(name, options)), renamed(as_written):
        yield


def _loads_model(name: str, options: Mapping[str, Any]) -> bool:
    from nexus_adapters.conditions import EXTRACTORS

    return bool(EXTRACTORS[name].model or options.get("model"))
