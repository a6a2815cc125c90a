"""The arguments of `nexus prepare`."""

import argparse

# As in data.prepare, which is slower to import.
KINDS = ("auto", "folder", "coco", "table", "tars", "scenes")
CAPTIONS = ("all", "first", "random")
IMAGE_FORMATS = ("jpg", "png", "webp")
# Arguments of the functions that prepare a set, and names of its settings -> what the user typed.
_AS_TYPED = {
    "source": "SOURCE",
    "path": "SOURCE",
    "folder": "SOURCE",
    "annotations": "SOURCE",
    "images": "SOURCE",
    "shards": "SOURCE",
    "out": "--out",
    "conditions": "--conditions",
    "kind": "--kind",
    "split": "--split",
    "config_name": "--config-name",
    "revision": "--revision",
    "image_column": "--image-column",
    "caption_column": "--caption-column",
    "count": "--count",
    "resolution": "--resolution",
    "width": "--resolution",
    "height": "--resolution",
    "buckets": "--aspect-buckets",
    "captions": "--captions",
    "image_format": "--image-format",
    "shard_size": "--shard-size",
    "seed": "--seed",
    "min_side": "--min-side",
    "max_aspect": "--max-aspect",
    "min_caption_length": "--min-caption-length",
    "max_caption_length": "--max-caption-length",
    "near_duplicates": "--near-duplicates",
    "engine": "--engine",
    "batch_size": "--batch-size",
    "index_folder": "XDG_CACHE_HOME",  # the only way to choose it
}
_GROUPS = ("source.", "geometry.", "filters.")  # of settings
_NEAR = 4  # bits, where --near-duplicates is given without a number


def argument_as_typed(name: str) -> str:
    """What the user knows a function's argument by: `path` as SOURCE, `conditions.depth.model` as `--option`.

    An option of a map keeps its name: `--option depth.model`. Unknown names are returned as they are.
    """
    condition, dot, option = name.removeprefix("conditions.").partition(".")
    if name.startswith("conditions."):
        return f"--option {condition}.{option}" if dot else "--option"
    for group in _GROUPS:
        name = name.removeprefix(group)
    return _AS_TYPED.get(name, name)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images with captions, a COCO folder, tars, a Hugging Face data set, or scenes",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or one to resume")
    parser.add_argument(
        "--conditions", required=True, metavar="NAME,...", help="kinds of map; see nexus extract --list"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="an option of an extractor, such as canny.auto=true or depth.model=FOLDER (repeatable)",
    )
    _add_source(parser)
    _add_output(parser)
    _add_filters(parser)
    _add_engine(parser)


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--kind", choices=KINDS, default="auto", help="what SOURCE is (default: detected)")
    group.add_argument(
        "--split", default="", help="of a data set (default: train) or COCO folder (default: train2017)"
    )
    group.add_argument("--config-name", default="", metavar="NAME", help="of a data set that has several")
    group.add_argument("--revision", default="", metavar="NAME", help="of a data set on the Hub")
    group.add_argument(
        "--image-column", default="", metavar="NAME", help="column or tar member of the images"
    )
    group.add_argument(
        "--caption-column", default="", metavar="NAME", help="column or tar member of the captions"
    )
    group.add_argument("--count", type=int, default=0, metavar="N", help="prepare only the first N samples")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="resize and crop images to NxN pixels first (default: keep their size)",
    )
    group.add_argument(
        "--aspect-buckets",
        action="store_true",
        help="keep the aspect ratio: one of several sizes of about the same area",
    )
    group.add_argument(
        "--captions", choices=CAPTIONS, default="all", help="which captions to keep (default: all)"
    )
    group.add_argument(
        "--image-format",
        choices=IMAGE_FORMATS,
        default="jpg",
        help="png and webp are lossless (default: jpg)",
    )
    group.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="samples per tar (default: 1000)"
    )
    group.add_argument("--seed", type=int, default=0, help="for random captions (default: 0)")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "filters", "Off by default. DIR/skipped.jsonl lists the samples that are left out."
    )
    group.add_argument(
        "--min-side", type=int, default=0, metavar="PX", help="smallest length of the shorter side"
    )
    group.add_argument(
        "--max-aspect",
        type=float,
        default=0.0,
        metavar="R",
        help="largest ratio of the longer to the shorter side",
    )
    group.add_argument(
        "--min-caption-length", type=int, default=0, metavar="N", help="shortest, in characters"
    )
    group.add_argument(
        "--max-caption-length", type=int, default=0, metavar="N", help="longest, in characters"
    )
    group.add_argument(
        "--near-duplicates",
        type=int,
        nargs="?",
        const=_NEAR,
        metavar="BITS",
        help=f"drop images whose perceptual hash differs from an earlier one's by at most BITS of 64 "
        f"({_NEAR} without a number)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="one machine or many (default: local)"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="number of processes (default: one per core; 1 with models)"
    )
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images per call of a model (default: 8)"
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="address of a running Ray cluster, such as auto"
    )
    group.add_argument(
        "--gpus-each", type=float, default=0, metavar="N", help="GPUs per Ray worker, such as 0.5"
    )
