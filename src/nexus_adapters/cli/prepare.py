"""`nexus prepare`: from raw images to a training set with structure maps, on one machine or many."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.cli.extractor_options import read_pairs, without_chatter
from nexus_adapters.cli.prepare_arguments import argument_as_typed, declare
from nexus_adapters.errors import InvalidArgument, expect, renamed

if TYPE_CHECKING:
    from nexus_adapters.data.prepare.plan import Plan
    from nexus_adapters.data.prepare.run import Result

add_arguments = declare
_TERMINATED = 128 + signal.SIGTERM


def run(args: argparse.Namespace) -> int:
    """Prepare the set, and report what is in it and what was left out. Run again, it resumes."""
    conditions = read_conditions(args)
    expect(args.workers is None or args.workers >= 1, "--workers", "at least 1", args.workers)
    for option in ("ray_address", "gpus_each"):
        value = getattr(args, option)
        received = f"{value} with --engine {args.engine}"
        expect(not value or args.engine == "ray", option, "--engine ray together with it", received)
    if find_spec("filelock") is None:  # here, since it is imported only once there is something to lock
        raise InvalidArgument("the package filelock", hint="Run pip install 'nexus-adapters[data]'")
    from nexus_adapters.data.prepare.run import prepare

    with renamed(argument_as_typed):
        plan = plan_of(args, conditions)
    with without_chatter(plan.uses_models()), renamed(argument_as_typed), _ended_by_sigterm():
        result = prepare(plan, Path(args.out).absolute(), engine_of(args, plan))
    _report(args, result)
    return 0


def read_conditions(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> options of each map. InvalidArgument names the option of the command."""
    from nexus_adapters.conditions import EXTRACTORS

    names = [name.strip() for name in args.conditions.split(",")]
    known = ", ".join(sorted(EXTRACTORS))
    for name in names:
        expect(name in EXTRACTORS, "--conditions", f"names among {known}, separated by commas", f"'{name}'")
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
    """The plan; the source is opened. InvalidArgument names the functions' arguments."""
    from nexus_adapters.data.geometry import Geometry
    from nexus_adapters.data.prepare.filters import Filters
    from nexus_adapters.data.prepare.plan import Plan
    from nexus_adapters.data.prepare.sources import SourceOptions, open_source, source_settings

    filters = Filters(
        args.min_side, args.max_aspect, args.min_caption_length, args.max_caption_length, args.near_duplicates
    )
    has_side = args.resolution is not None
    expect(has_side or not args.aspect_buckets, "--resolution", "pixels", hint="--aspect-buckets needs it")
    geometry = None
    if has_side:
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
