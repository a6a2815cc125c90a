"""`nexus prepare`: make a training set with structure maps from images, on one machine or many."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.choices import CAPTIONS, IMAGE_FORMATS, SOURCE_KINDS, Captions, ImageFormat
from nexus_adapters.cli.options import add_options, check_preview
from nexus_adapters.errors import expect, renamed
from nexus_adapters.generation.maps import without_chatter
from nexus_adapters.generation.requests import expect_side, read_pairs
from nexus_adapters.packages import check_packages

if TYPE_CHECKING:
    from nexus_adapters.data.crop import Geometry
    from nexus_adapters.prepare.filters import Filters
    from nexus_adapters.prepare.plan import Plan
    from nexus_adapters.prepare.run import Result
    from nexus_adapters.prepare.source_kinds import SourceOptions

EXAMPLES = (
    "nexus prepare photos --conditions canny,sketch --resolution 512 --out photos-512",
    "nexus prepare photos --conditions canny --resolution 512 --out photos-512 --dry-run",
)
# Argument of a function, or name of a setting -> what the user typed.
TYPED = {
    "path": "SOURCE",
    "folder": "SOURCE",
    "annotations": "SOURCE",
    "images": "SOURCE",
    "shards": "SOURCE",
    "width": "--resolution",
    "height": "--resolution",
    "buckets": "--aspect-buckets",
    "index_folder": "XDG_CACHE_HOME",  # the environment variable that sets it
}
_GROUPS = ("source.", "geometry.", "filters.")  # prefixes of settings
_NEAR = 4  # bits, if --near-duplicates is given without a number
_TERMINATED = 128 + signal.SIGTERM


def argument_as_typed(name: str) -> str:
    """Return the argument or option behind a setting's name, such as `path` for `source.path`.

    An extractor's option keeps its name: `conditions.depth.model` is `--option depth.model`.
    """
    condition, dot, option = name.removeprefix("conditions.").partition(".")
    if name.startswith("conditions."):
        return f"--option {condition}.{option}" if dot else "--option"
    for group in _GROUPS:
        name = name.removeprefix(group)
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus prepare`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images with captions, a COCO folder, WebDataset tars, a Hugging Face dataset, a "
        "Parquet or CSV file, or scenes",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder, or the folder of a run to resume"
    )
    parser.add_argument(
        "--conditions",
        required=True,
        metavar="NAME,...",
        help="structure maps to extract; see nexus extract --list",
    )
    add_options(
        parser,
        "--option",
        metavar="NAME.KEY=VALUE",
        help="an option of an extractor, such as canny.auto=true or depth.model=FOLDER; with a single "
        "condition, NAME. may be left out (repeatable)",
    )
    _add_source(parser)
    _add_output(parser)
    _add_filters(parser)
    _add_engine(parser)
    add_options(parser, "--dry-run", "--preview")


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    add_options(group, "--kind", choices=SOURCE_KINDS)
    group.add_argument(
        "--split",
        default="",
        metavar="NAME",
        help="split of a dataset (default: train) or COCO folder (default: train2017)",
    )
    group.add_argument(
        "--config-name", default="", metavar="NAME", help="configuration of a dataset that has several"
    )
    group.add_argument("--revision", default="", metavar="NAME", help="revision of a dataset on the Hub")
    add_options(group, "--image-column", "--caption-column")
    group.add_argument(
        "--allow-outside",
        action="store_true",
        help="read files outside the source's folder: absolute paths, paths with .., captions that are links",
    )
    group.add_argument("--count", type=int, metavar="N", help="prepare only the first N samples")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="first resize and crop images to NxN pixels (default: keep their size)",
    )
    group.add_argument(
        "--aspect-buckets",
        action="store_true",
        help="keep the aspect ratio: use one of several sizes with about NxN pixels; needs --resolution",
    )
    group.add_argument(
        "--captions",
        choices=CAPTIONS,
        default="all",
        help="which captions of an image to keep; none is for images without captions (default: all)",
    )
    group.add_argument(
        "--image-format",
        choices=IMAGE_FORMATS,
        default="jpg",
        help="format of the images; png and webp are lossless (default: jpg)",
    )
    group.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="samples per tar (default: 1000)"
    )
    add_options(group, "--seed")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "filters", "Off by default. DIR/skipped.jsonl lists the samples that are left out."
    )
    group.add_argument(
        "--min-side", type=int, default=0, metavar="PX", help="minimum length of the shorter side"
    )
    group.add_argument(
        "--max-aspect",
        type=float,
        default=0.0,
        metavar="R",
        help="maximum ratio of the longer to the shorter side",
    )
    group.add_argument(
        "--min-caption-length", type=int, default=0, metavar="N", help="minimum caption length in characters"
    )
    group.add_argument(
        "--max-caption-length", type=int, default=0, metavar="N", help="maximum caption length in characters"
    )
    group.add_argument(
        "--near-duplicates",
        type=int,
        nargs="?",
        const=_NEAR,
        metavar="BITS",
        help="leave out images whose perceptual hash differs from an earlier image's in at most BITS of 64 "
        f"bits ({_NEAR} if no number is given)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="run on this machine or on a Ray cluster (default: local)",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes (default: one per core; 1 if an extractor runs a model)",
    )
    add_options(group, "--batch-size")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="address of a running Ray cluster, such as auto"
    )
    group.add_argument(
        "--gpus-each", type=float, default=0, metavar="N", help="GPUs per Ray worker, such as 0.5"
    )


@dataclass(frozen=True)
class EngineRequest:
    """What does the work. With `workers=None`, the plan decides their number."""

    name: str
    workers: int | None
    ray_address: str | None
    gpus_each: float


@dataclass(frozen=True)
class PrepareRequest:
    """What `nexus prepare` was asked to do. `conditions` maps an extractor's name to its options."""

    source: "SourceOptions"
    conditions: Mapping[str, Mapping[str, Any]]
    geometry: "Geometry | None"
    filters: "Filters"
    captions: Captions
    image_format: ImageFormat
    shard_size: int
    batch_size: int
    seed: int
    engine: EngineRequest
    out: Path


def run(args: argparse.Namespace) -> int:
    """Prepare the set and report its content. The same command resumes an interrupted run."""
    page = None if args.preview is None else check_preview(args.preview)
    check_packages("data", "filelock")  # it is imported late, when something is locked
    with renamed(argument_as_typed):
        request = parse(args)
        plan = plan_of(request)
    if args.dry_run or page is not None:
        _dry_run(plan, request.out.absolute(), page)
        return 0
    from nexus_adapters.prepare.run import prepare

    with without_chatter(plan.uses_models()), renamed(argument_as_typed), _ended_by_sigterm():
        result = prepare(plan, request.out.absolute(), engine_of(request.engine, plan))
    _report(args.prog, request.out, result)
    return 0


def _dry_run(plan: "Plan", out: Path, page: Path | None) -> None:
    """Report what would be prepared, and write the page of samples if requested."""
    from nexus_adapters.files import write_text
    from nexus_adapters.prepare.dry_run import describe, preview_of

    with without_chatter(page is not None and plan.uses_models()), renamed(argument_as_typed):
        print(describe(plan, out))
        if page is not None:
            write_text(page, preview_of(plan, out))


def parse(args: argparse.Namespace) -> PrepareRequest:
    """Parse the arguments into a request. `InvalidArgument` names the option or a function's argument."""
    conditions = read_conditions(args.conditions, args.option)
    expect(args.workers is None or args.workers >= 1, "--workers", "at least 1", args.workers)
    expect(args.count is None or args.count >= 1, "--count", "at least 1", args.count)
    engine = EngineRequest(args.engine, args.workers, args.ray_address, args.gpus_each)
    for option, value in (("--ray-address", engine.ray_address), ("--gpus-each", engine.gpus_each)):
        received = f"{value} with --engine {engine.name}"
        expect(not value or engine.name == "ray", option, "--engine ray in addition", received)
    side: int | None = args.resolution
    has_side = side is not None
    if not args.aspect_buckets:  # buckets are rounded
        expect_side("--resolution", side)
    expect(has_side or not args.aspect_buckets, "--resolution", "pixels", hint="--aspect-buckets needs it")
    from nexus_adapters.data.crop import Geometry
    from nexus_adapters.prepare.filters import Filters
    from nexus_adapters.prepare.source_kinds import SourceOptions

    geometry = None
    if side is not None:
        geometry = Geometry.bucketed(side) if args.aspect_buckets else Geometry(side, side)
    return PrepareRequest(
        SourceOptions(
            path=args.source,
            kind=args.kind,
            split=args.split,
            config_name=args.config_name,
            revision=args.revision,
            image_column=args.image_column or "",
            caption_column=args.caption_column or "",
            count=args.count or 0,
            with_captions=args.captions != "none",
            allow_outside=args.allow_outside,
        ),
        conditions,
        geometry,
        Filters(
            min_side=args.min_side,
            max_aspect=args.max_aspect,
            min_caption_length=args.min_caption_length,
            max_caption_length=args.max_caption_length,
            near_duplicates=args.near_duplicates,
        ),
        captions=args.captions,
        image_format=args.image_format,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        seed=args.seed,
        engine=engine,
        out=Path(args.out),
    )


def read_conditions(names_text: str, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse --conditions and --option into name of an extractor -> its options.

    Raises:
        InvalidArgument: named --conditions or --option.
    """
    from nexus_adapters.conditions import EXTRACTORS

    names = [name.strip() for name in names_text.split(",")]
    known = ", ".join(sorted(EXTRACTORS))
    for name in names:
        expect(name in EXTRACTORS, "--conditions", f"names separated by commas, out of {known}", f"'{name}'")
        expect(names.count(name) == 1, "--conditions", f"{name} once", f"'{names_text}'")
    conditions: dict[str, dict[str, Any]] = {}
    for name in names:
        prefix = f"{name}."
        own = [pair for pair in pairs if pair.startswith(prefix) or _is_short(pair, names)]
        conditions[name] = read_pairs([pair.removeprefix(prefix) for pair in own], "--option", name)
    for pair in pairs:
        fits = pair.partition(".")[0] in conditions or _is_short(pair, names)
        expect(fits, "--option", f"NAME.KEY=VALUE, NAME one of {', '.join(names)}", f"'{pair}'")
    return conditions


def _is_short(pair: str, names: Sequence[str]) -> bool:
    """Return whether the pair is KEY=VALUE without a name, which is allowed for a single condition."""
    return len(names) == 1 and "." not in pair.partition("=")[0]


def plan_of(request: PrepareRequest) -> "Plan":
    """Open the source and return the plan. `InvalidArgument` names a function's argument."""
    from nexus_adapters.prepare.plan import Plan
    from nexus_adapters.prepare.source_kinds import open_source, source_settings

    source, root = open_source(request.source)
    return Plan(
        source,
        request.conditions,
        request.geometry,
        captions=request.captions,
        filters=request.filters,
        image_format=request.image_format,
        shard_size=request.shard_size,
        batch_size=request.batch_size,
        seed=request.seed,
        count=request.source.count,
        root=root,
        source_settings=source_settings(request.source, source),
    )


def engine_of(request: EngineRequest, plan: "Plan") -> Callable[..., None]:
    """Return the function that runs the plan."""
    workers = request.workers
    if workers is None:
        # Models use threads of their own, and each process would load a copy.
        workers = 1 if plan.uses_models() else os.cpu_count() or 1
    if request.name == "ray":
        from nexus_adapters.prepare.engines import run_ray

        return partial(run_ray, workers=workers, address=request.ray_address, gpus_each=request.gpus_each)
    from nexus_adapters.prepare.engines import run_local

    return partial(run_local, workers=min(workers, max(1, plan.shards)))


def _report(prog: str, out: Path, result: "Result") -> None:
    if result.was_finished:
        print(f"{prog}: {out} was already finished", file=sys.stderr)
    if result.skipped:
        print(f"{prog}: left out {result.left_out}; see {out / 'skipped.jsonl'}", file=sys.stderr)
    print(f"{out}: {result.samples} samples; see {out / 'preview.html'} for examples")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the run and its processes, like Ctrl-C but with exit status 143."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
