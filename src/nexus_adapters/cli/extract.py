"""`nexus extract`: extract the structure map of an image."""

import argparse
from typing import Any

from nexus_adapters import __version__
from nexus_adapters.cli.options import add_options, as_option, check_output, save_png
from nexus_adapters.errors import InvalidArgument, expect, renamed
from nexus_adapters.generation.maps import running_extractor
from nexus_adapters.generation.requests import ExtractorOptions
from nexus_adapters.generation.settings import without_folders

EXAMPLES = (
    "nexus extract canny photo.jpg --out edges.png",
    "nexus extract sketch photo.jpg --option sigma=2 --out sketch.png",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus extract`."""
    parser.add_argument("name", metavar="NAME", help="name of the extractor; see --list")
    parser.add_argument("image", metavar="IMAGE", help="the image file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the map to write, a .png file")
    add_options(parser, "--low", "--high", "--option", "--invert", "--max-megapixels", "--force")
    parser.add_argument("--list", action=_ListExtractors, help="list the extractors and exit")


def run(args: argparse.Namespace) -> int:
    """Extract the map, write it, and print its path."""
    from nexus_adapters.conditions import EXTRACTORS, extract, invert, load_image

    condition_name: str = args.name
    known = ", ".join(sorted(EXTRACTORS))
    expect(condition_name in EXTRACTORS, "NAME", f"one of {known}", repr(condition_name))
    check_output(args.out, ".png", args.force)
    options = ExtractorOptions(args.low, args.high, tuple(args.option)).values(condition_name)
    image = load_image(args.image, args.max_megapixels, argument="IMAGE")
    with renamed(as_option), running_extractor(condition_name, options):
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
    """Print the table and exit, like --help, even if required arguments are missing."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from nexus_adapters.conditions import EXTRACTORS

        for name in sorted(EXTRACTORS):
            try:
                extractor = EXTRACTORS[name]
            except InvalidArgument as error:  # from another package; it must not hide the other extractors
                print(f"{name:14}{error}")
                continue
            needs = f" (needs {', '.join(extractor.needs)})" if extractor.needs else ""
            print(f"{name:14}{extractor.summary}{needs}")
        parser.exit()
