"""Report what `nexus prepare` would make, without writing any of the set."""

from __future__ import annotations

from pathlib import Path

from nexus_adapters.data.crop import Size
from nexus_adapters.data.inspection import inspect
from nexus_adapters.data.prepared_set import INDEX, SetFolder
from nexus_adapters.data.sample_page import Row, page, read_rows
from nexus_adapters.data.samples import BadSample, Sample
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.prepare.filters import LeftOut
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.run import check_out
from nexus_adapters.prepare.worker import Worker


def describe(plan: Plan, out: Path) -> str:
    """Return what was found in the source and what would be dropped, one fact per line.

    Extractors are not run, so no model is downloaded.

    Raises:
        InvalidArgument: as `prepare` for the folder, and if none of the inspected samples can be used.
    """
    check_out(SetFolder(out), plan.settings())
    worker = Worker(plan, SetFolder(out))

    def load(index: int) -> Sample:
        try:
            return worker.load(index)
        except LeftOut as why:
            raise BadSample(f"{why.kind}: {why}") from why

    def target(size: Size) -> Size:
        return size if plan.geometry is None else plan.geometry.target(size)

    found = inspect(plan.source, range(len(plan)), load, target)
    if len(found.left_out) == found.looked_at:
        raise InvalidArgument(
            "source",
            "at least one usable sample",
            f"{found.looked_at:,} inspected, none of them usable; the first is "
            f"'{plan.key(found.left_out[0].index)}' ({plan.message(found.left_out[0].reason)})",
        )
    first = (
        f"{len(plan):,} samples in {plan.shards:,} {'shard' if plan.shards == 1 else 'shards'}, "
        f"{_size(plan)}, with maps extracted by {', '.join(plan.conditions)}"
    )
    lines = [first, *found.describe()]
    if (out / INDEX).exists():
        lines.append(f"'{out}' is already finished")
    elif plan.filters.near_duplicates is not None:
        lines.append("a dry run does not search for near-duplicates")
    return "\n".join(lines)


def preview_of(plan: Plan, out: Path) -> str:
    """Return an HTML page of samples as they would be written. As in `prepare`, extractors load their models.

    Raises:
        InvalidArgument: if there are no usable samples.
    """
    plan.try_extractors()
    worker = Worker(plan, SetFolder(out))

    def read(index: int) -> Row:
        try:
            sample, maps = worker.example(index)
        except LeftOut as why:
            raise BadSample(plan.message(str(why))) from why
        return Row({"image": sample.image, **maps}, sample.captions, plan.key(index))

    rows = read_rows("source", range(len(plan)), read)
    return page("Samples as they would be prepared", f"{len(plan):,} samples, {_size(plan)}.", rows)


def _size(plan: Plan) -> str:
    geometry = plan.geometry
    if geometry is None:
        return "in their own sizes"
    about = "of about" if geometry.buckets else "of"
    return f"{about} {geometry.width}x{geometry.height} pixels"
