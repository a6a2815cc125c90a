"""`nexus extract`: extract the structure map of an image."""

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nexus_adapters import __version__
from nexus_adapters.errors import InvalidArgument, expect, renamed

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
    from nexus_adapters.bases.loading import no_loading_bars
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus extract`."""
    parser.add_argument("name", metavar="NAME", help="of the extractor; --list shows them")
    parser.add_argument("image", metavar="IMAGE", help="the image file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the map, a .png")
    declare_extractor_options(parser)
    parser.add_argument("--invert", action="store_true", help="exchange light and dark in the map")
    parser.add_argument(
        "--max-megapixels", type=float, default=64, metavar="N", help="refuse larger images (default: 64)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--list", action=_ListExtractors, help="show the extractors and exit")


def run(args: argparse.Namespace) -> int:
    """Extract, write the map, and print where it is."""
    from nexus_adapters.cli.options import check_output, save_png
    from nexus_adapters.conditions import EXTRACTORS, extract, invert, load_image

    expect(args.name in EXTRACTORS, "NAME", f"one of {', '.join(sorted(EXTRACTORS))}", repr(args.name))
    check_output(args.out, ".png", args.force)
    options = extractor_options(args, args.name)
    with renamed({"max_megapixels": "--max-megapixels"}):
        image = load_image(args.image, args.max_megapixels, argument="IMAGE")
    with running_extractor(args.name, options), renamed({"image": "IMAGE", "name": "NAME"}):
        condition = extract(args.name, image, **options)
    if args.invert:
        condition = invert(condition)
    settings = {
        "version": __version__,
        "command": "extract",
        "extractor": args.name,
        "options": EXTRACTORS[args.name].defaults() | options,
        "inverted": args.invert,
    }
    save_png(args.out, condition, settings, args.force)
    print(f"{args.out}: {args.name}, {condition.width}x{condition.height}")
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
