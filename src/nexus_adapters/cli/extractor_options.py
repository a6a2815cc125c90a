"""An extractor's options on the command line: `--option KEY=VALUE`, and canny's `--low` and `--high`."""

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nexus_adapters.cli.checks import expect

_OWN_FLAGS = ("low", "high")


def declare_extractor_options(parser: Any) -> None:
    """Declare them, to a parser or a group of one."""
    parser.add_argument("--low", type=float, help="canny: lower threshold (default 100)")
    parser.add_argument("--high", type=float, help="canny: upper threshold (default 200)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the extractor, such as auto=true, sigma=2 or model=FOLDER; may be repeated",
    )


def extractor_options(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The options that were given to the extractor of this name. ValueError names the argument."""
    options = {flag: getattr(args, flag) for flag in _OWN_FLAGS if getattr(args, flag) is not None}
    for key, value in read_pairs(args.option, "--option", name).items():
        expect(key not in options, "--option", f"no {key} beside --{key}", f"{key}={value}")
        options[key] = value
    return options


def read_pairs(pairs: Sequence[str], argument: str, name: str) -> dict[str, Any]:
    """Of each KEY=VALUE the value: text where the extractor takes text, else what TOML has it for."""
    from nexus_adapters.conditions import EXTRACTORS

    defaults = EXTRACTORS[name].defaults()
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        expect(bool(equals and key), argument, "KEY=VALUE", f"'{pair}'")
        expect(key not in found, argument, f"{key} once", f"'{pair}' as well")
        found[key] = text if isinstance(defaults.get(key), str) else _by_toml(text)
    return found


def _by_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@contextmanager
def without_chatter(uses_models: bool) -> Iterator[None]:
    """Without the words and bars of model libraries; where no models are used, these are not imported."""
    if not uses_models:
        yield
        return
    from nexus_adapters.cli.library_logs import library_logs_as_warnings
    from nexus_adapters.embedded import no_loading_bars

    with library_logs_as_warnings(), no_loading_bars():
        yield


@contextmanager
def running_extractor(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Around a call: without the chatter of libraries, and with errors that name options as users wrote them.

    So `sigma` is `--option sigma`.
    """
    try:
        with without_chatter(_loads_model(name, options)):
            yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if colon and name.isidentifier() and name.islower():
            flags = {"options": "--option", "low": "--low", "high": "--high", "name": "NAME"}
            raise ValueError(f"{flags.get(name, f'--option {name}')}:{rest}") from error
        raise


def _loads_model(name: str, options: Mapping[str, Any]) -> bool:
    from nexus_adapters.conditions import EXTRACTORS

    return bool(EXTRACTORS[name].model or options.get("model"))
