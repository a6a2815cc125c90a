"""`nexus extract`: extract the structure map of an image."""

import argparse
from typing import Any

from nexus_adapters import __version__
from nexus_adapters.cli.extractor_options import (
    declare_extractor_options,
    extractor_options,
    running_extractor,
)
from nexus_adapters.errors import InvalidArgument, expect, renamed


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
    from nexus_adapters.cli.files import check_output, save_png
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
