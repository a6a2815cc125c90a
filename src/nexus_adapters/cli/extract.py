"""`nexus extract`: extract the structure map of an image."""

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nexus_adapters import __version__
from nexus_adapters.cli import library_logs_as_warnings
from nexus_adapters.cli.options import add_options, check_output, save_png, without_folders
from nexus_adapters.errors import InvalidArgument, expect, renamed

EXAMPLES = (
    "nexus extract canny photo.jpg --out edges.png",
    "nexus extract sketch photo.jpg --option sigma=2 --out sketch.png",
)
_OWN_OPTIONS = ("low", "high")  # of canny, which have options of their own on the command line


@dataclass(frozen=True)
class ExtractorOptions:
    """What --low, --high and --option say. How the latter is read depends on the extractor."""

    low: float | None = None
    high: float | None = None
    pairs: tuple[str, ...] = ()

    def values(self, condition_name: str) -> dict[str, Any]:
        """The options for the extractor of this name. InvalidArgument names the argument."""
        given = {"low": self.low, "high": self.high}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for key, value in (read_pairs(self.pairs, "--option", condition_name) if self.pairs else {}).items():
            expect(key not in options, "--option", f"{key} once", f"{key}={value} and --{key}")
            options[key] = value
        return options


def read_pairs(pairs: Sequence[str], argument: str, condition_name: str) -> dict[str, Any]:
    """The value of each KEY=VALUE: text where the extractor takes text, else parsed as TOML."""
    from nexus_adapters.conditions import EXTRACTORS

    defaults = EXTRACTORS[condition_name].defaults() if condition_name in EXTRACTORS else {}
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
    from nexus_adapters.bases.loading import no_loading_bars

    with library_logs_as_warnings(), no_loading_bars():
        yield


@contextmanager
def running_extractor(condition_name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Around a call of an extractor: silences libraries, and lets errors name options as users write them.

    An error about `sigma` names `--option sigma`.
    """
    from nexus_adapters.conditions import EXTRACTORS

    extractor = EXTRACTORS[condition_name]
    takes = {*extractor.options(), *options}

    def as_written(argument: str) -> str:
        if argument in _OWN_OPTIONS:
            return f"--{argument}"
        if argument == "options":
            return "--option"
        return f"--option {argument}" if argument in takes else argument

    with without_chatter(bool(extractor.model or options.get("model"))), renamed(as_written):
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus extract`."""
    parser.add_argument("name", metavar="NAME", help="of the extractor; --list shows them")
    parser.add_argument("image", metavar="IMAGE", help="the image file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the map to write, a .png")
    add_options(parser, "--low", "--high", "--option", "--invert", "--max-megapixels", "--force")
    parser.add_argument("--list", action=_ListExtractors, help="show the extractors and exit")


def run(args: argparse.Namespace) -> int:
    """Extract, write the map, and print where it is."""
    from nexus_adapters.conditions import EXTRACTORS, extract, invert, load_image

    condition_name: str = args.name
    known = ", ".join(sorted(EXTRACTORS))
    expect(condition_name in EXTRACTORS, "NAME", f"one of {known}", repr(condition_name))
    check_output(args.out, ".png", args.force)
    options = ExtractorOptions(args.low, args.high, tuple(args.option)).values(condition_name)
    with renamed({"max_megapixels": "--max-megapixels"}):
        image = load_image(args.image, args.max_megapixels, argument="IMAGE")
    with running_extractor(condition_name, options), renamed({"image": "IMAGE", "name": "NAME"}):
        condition = extract(condition_name, image, **options)
    if args.invert:
        condition = invert(condition)
    settings = {
        "version": __version__,
        "command": "extract",
        "extractor": condition_name,
        "options": without_folders(EXTRACTORS[condition_name].defaults() | options),
        "inverted": bool(args.invert),
    }
    save_png(args.out, condition, settings, args.force)
    print(f"{args.out}: {condition_name}, {condition.width}x{condition.height}")
    return 0


class _ListExtractors(argparse.Action):
    """Show the table and exit, whatever else is missing, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from nexus_adapters.conditions import EXTRACTORS

        for name in sorted(EXTRACTORS):
            try:
                extractor = EXTRACTORS[name]
            except InvalidArgument as error:  # another package's, which must not hide the others
                print(f"{name:14}{error}")
                continue
            needs = f" (needs {', '.join(extractor.needs)})" if extractor.needs else ""
            print(f"{name:14}{extractor.summary}{needs}")
        parser.exit()
