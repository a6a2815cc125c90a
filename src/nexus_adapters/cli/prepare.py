"""`nexus prepare`: from raw images to a training set with structure maps, on one machine or many."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.cli.checks import expect, names_as_options
from nexus_adapters.cli.extractor_options import read_pairs, without_chatter
from nexus_adapters.cli.prepare_arguments import declare

if TYPE_CHECKING:
    from nexus_adapters.data.prepare.plan import Plan
    from nexus_adapters.data.prepare.run import Result

add_arguments = declare
_TERMINATED = 128 + signal.SIGTERM


def run(args: argparse.Namespace) -> int:
    """Check, prepare, and say what is there and what was left out. The same command goes on after a stop."""
    conditions = read_conditions(args)
    expect(args.workers is None or args.workers >= 1, "--workers", "at least 1", args.workers)
    for option in ("ray_address", "gpus_each"):
        is_used = not getattr(args, option) or args.engine == "ray"
        expect(is_used, f"--{option.replace('_', '-')}", "--engine ray beside it", args.engine)
    try:
        from nexus_adapters.data.prepare.run import prepare
    except ImportError as error:
        raise ValueError(
            "prepare: expected what it needs, pip install 'nexus-adapters[data]'; received an installation "
            f"without {error.name}"
        ) from error
    with _names_arguments():
        plan = plan_of(args, conditions)
    with without_chatter(plan.uses_models()), _names_arguments(), _ended_by_sigterm():
        result = prepare(plan, Path(args.out).absolute(), engine_of(args, plan))
    _report(args, result)
    return 0


def read_conditions(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> options of each map. ValueError names the argument."""
    from nexus_adapters.conditions import EXTRACTORS

    names = [name.strip() for name in args.conditions.split(",")]
    known = ", ".join(sorted(EXTRACTORS))
    for name in names:
        expect(name in EXTRACTORS, "--conditions", f"names among {known}, with commas between", f"'{name}'")
        expect(names.count(name) == 1, "--conditions", f"{name} once", f"'{args.conditions}'")
    conditions: dict[str, dict[str, Any]] = {}
    for name in names:
        prefix = f"{name}."
        own = [pair.removeprefix(prefix) for pair in args.option if pair.startswith(prefix)]
        conditions[name] = read_pairs(own, "--option", name)
    for pair in args.option:
        fits = pair.partition(".")[0] in conditions
        expect(fits, "--option", f"NAME.KEY=VALUE, of {', '.join(names)}", f"'{pair}'")
    return conditions


def plan_of(args: argparse.Namespace, conditions: dict[str, dict[str, Any]]) -> "Plan":
    """The plan; the source is opened. ValueError names the argument."""
    from nexus_adapters.data.geometry import Geometry
    from nexus_adapters.data.prepare.filters import Filters
    from nexus_adapters.data.prepare.plan import Plan
    from nexus_adapters.data.prepare.sources import SourceOptions, open_source, source_settings

    filters = Filters(
        args.min_side, args.max_aspect, args.min_caption_length, args.max_caption_length, args.near_duplicates
    )
    expect(
        not args.aspect_buckets or args.resolution is not None,
        "--aspect-buckets",
        "--resolution beside it",
        "none",
    )
    geometry = None
    if args.resolution is not None:
        side = args.resolution
        geometry = Geometry.bucketed(side) if args.aspect_buckets else Geometry(side, side)
    options = SourceOptions(
        args.source, args.kind, args.split, args.config_name, args.revision, args.image_column,
        args.caption_column, args.count,
    )  # fmt: skip
    source, root = open_source(options)
    return Plan(
        source, conditions, geometry, args.captions, filters, args.image_format, args.shard_size,
        args.batch_size, args.seed, args.count, root, source_settings(options, source),
    )  # fmt: skip


def engine_of(args: argparse.Namespace, plan: "Plan") -> Callable[..., None]:
    """What does the work."""
    workers = args.workers
    if workers is None:
        # Models bring threads of their own, and a copy of each for every process.
        workers = 1 if plan.uses_models() else os.cpu_count() or 1
    if args.engine == "ray":
        from nexus_adapters.data.prepare.ray_engine import run_ray

        return partial(run_ray, workers=workers, address=args.ray_address, gpus_each=args.gpus_each)
    from nexus_adapters.data.prepare.local import run_local

    return partial(run_local, workers=min(workers, max(1, plan.shards)))


@contextmanager
def _names_arguments() -> Iterator[None]:
    """Let a ValueError name an argument as users wrote it, a map's option as `--option depth.model`."""
    try:
        with names_as_options():
            yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if colon and name.startswith("conditions."):
            raise ValueError(f"{name.replace('conditions.', '--option ', 1)}:{rest}") from error
        raise


def _report(args: argparse.Namespace, result: "Result") -> None:
    if result.was_finished:
        print(f"{args.prog}: {args.out} was finished already", file=sys.stderr)
    if result.skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(result.skipped.items()))
        print(f"{args.prog}: left out {counts} ({Path(args.out) / 'skipped.jsonl'})", file=sys.stderr)
    print(f"{args.out}: {result.samples} samples, {Path(args.out) / 'preview.html'} shows some")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, with the processes it has started, and with a status of its own."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # others cannot handle signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
