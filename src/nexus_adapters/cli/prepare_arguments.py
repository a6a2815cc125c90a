"""The arguments of `nexus prepare`."""

import argparse

# As in data.prepare, which is slower to import.
KINDS = ("auto", "folder", "coco", "table", "tars", "scenes")
CAPTIONS = ("all", "first", "random")
IMAGE_FORMATS = ("jpg", "png", "webp")
_NEAR = 4  # bits, where --near-duplicates is given without a number


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images with captions, a COCO folder, tars, a Hugging Face data set, or scenes",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or one to go on with")
    parser.add_argument("--conditions", required=True, metavar="NAME,...", help="maps; nexus extract --list")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="of an extractor, such as canny.auto=true or depth.model=FOLDER; may be repeated",
    )
    _add_source(parser)
    _add_output(parser)
    _add_filters(parser)
    _add_engine(parser)


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--kind", choices=KINDS, default="auto", help="of SOURCE (default: look)")
    group.add_argument("--split", default="", help="of a data set (default train), or COCO's (train2017)")
    group.add_argument("--config-name", default="", metavar="NAME", help="of a data set that has several")
    group.add_argument("--revision", default="", metavar="NAME", help="of a data set on the Hub")
    group.add_argument(
        "--image-column", default="", metavar="NAME", help="column or tar member of the images"
    )
    group.add_argument("--caption-column", default="", metavar="NAME", help="of the captions")
    group.add_argument("--count", type=int, default=0, metavar="N", help="only the first N samples")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="fit images to NxN first (default: leave them as they are)",
    )
    group.add_argument(
        "--aspect-buckets", action="store_true", help="to sizes of their aspect and NxN's area"
    )
    group.add_argument("--captions", choices=CAPTIONS, default="all", help="which are kept (default all)")
    group.add_argument("--image-format", choices=IMAGE_FORMATS, default="jpg", help="png, webp: without loss")
    group.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples of SOURCE to a tar")
    group.add_argument("--seed", type=int, default=0, help="of random captions (default 0)")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("filters", "All off unless given. What is left out: DIR/skipped.jsonl.")
    group.add_argument("--min-side", type=int, default=0, metavar="PX", help="of the shorter side")
    group.add_argument("--max-aspect", type=float, default=0.0, metavar="R", help="longer to shorter side")
    group.add_argument("--min-caption-length", type=int, default=0, metavar="N", help="in characters")
    group.add_argument("--max-caption-length", type=int, default=0, metavar="N", help="in characters")
    group.add_argument(
        "--near-duplicates",
        type=int,
        nargs="?",
        const=_NEAR,
        metavar="BITS",
        help=f"drop images whose perceptual hash is so near an earlier one's (default {_NEAR} of 64)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="one machine, or many")
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core; with models 1)"
    )
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once for a model")
    group.add_argument("--ray-address", metavar="ADDRESS", help="of a running Ray cluster, such as auto")
    group.add_argument(
        "--gpus-each", type=float, default=0, metavar="N", help="of each Ray worker, such as 0.5"
    )
