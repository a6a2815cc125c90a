"""Which row of the denoiser's batch reads which condition and which text.

A pipeline passes R rows to its denoiser: g guidance branches, one after the other, with R/g images each, in
which the images of one prompt are consecutive. The number and order of branches differ between pipelines;
some call the denoiser once per branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nexus_adapters.bases.base import Base, Branches, CallingPipeline, CallLayout
from nexus_adapters.errors import InvalidArgument


def call_layout(
    base: Base, calling: CallingPipeline, policy: str, text: Tensor, declared: Branches | None = None
) -> CallLayout:
    """Return the layout of the call that a pipeline is making now with these prompt embeddings.

    `declared` holds the branches if the user declared them. For errors, see `check_policy`.
    """
    if declared is not None:
        return CallLayout(text, declared)
    layout = base.layout_of(calling, text)
    if layout is None and policy != "per_branch":
        raise _unknown_layout(calling.pipe, policy)
    return layout or CallLayout(text, None)


def check_policy(base: Base, pipe: Any, policy: str, declared: Branches | None = None) -> None:
    """Raise `InvalidArgument` if the policy needs the layout, and the pipeline is unknown or missing."""
    if policy != "per_branch" and declared is None and not base.knows(pipe):
        raise _unknown_layout(pipe, policy)


def _unknown_layout(pipe: Any, policy: str) -> InvalidArgument:
    shown = "a call without a pipeline" if pipe is None else f"a {type(pipe).__name__}"
    return InvalidArgument(
        "policy",
        f'"per_branch" for {shown}, whose guidance branches are not known',
        f'"{policy}"',
        'Or declare the branches: attach(..., branches=("negative", "positive")). Pipelines that denoise '
        "tiles are not supported: each tile would get the whole map",
    )


@dataclass(frozen=True)
class BranchPlan:
    """Which rows the adapter runs on, and how its features are distributed over the branches of a call.

    Attributes:
        first: the first row of the text that the adapter reads.
        count: the number of rows that it reads.
        repeat: how often each condition is repeated consecutively.
        tile: how often the whole block is then repeated.
        factors: factors of the features, one per branch of the call.
        kept: the rows of the features that are in the call; None for all.
    """

    first: int
    count: int
    repeat: int
    tile: int
    factors: tuple[float, ...]
    kept: slice | None = None

    @property
    def key(self) -> tuple[int, int, int, int]:
        """The values that the adapter's features depend on, as a cache key."""
        return self.first, self.count, self.repeat, self.tile


def plan_branches(policy: str, layout: CallLayout, conditions: int) -> BranchPlan:
    """Return the plan for a call with this many conditions.

    Raises:
        InvalidArgument: if the number of conditions does not divide the number of images.
    """
    rows, branches, called = len(layout.text), layout.branches, layout.called
    kept = None
    if called is not None and branches is not None:
        images = rows // len(branches)
        kept = slice(called * images, (called + 1) * images)
    if branches is None or (policy == "per_branch" and conditions == 1):
        if conditions not in (1, rows):
            raise InvalidArgument(
                "condition",
                f"1 or {rows} maps, one per row of the batch, since the layout of the rows is not known",
                conditions,
            )
        return BranchPlan(0, rows, rows // conditions, 1, (1.0,), kept)
    if rows % len(branches):
        raise InvalidArgument(
            "encoder_hidden_states",
            f"a multiple of {len(branches)} rows, the number of guidance branches",
            rows,
            'If the pipeline runs its branches in separate calls, use policy="per_branch"',
        )
    images = rows // len(branches)
    if images % conditions:
        raise InvalidArgument(
            "condition",
            f"1 map, or a number that divides the {images} images of the call (prompts times images per "
            "prompt)",
            conditions,
        )
    if policy == "per_branch":
        return BranchPlan(0, rows, images // conditions, len(branches), (1.0,), kept)
    factors = tuple(1.0 if positive or policy == "positive" else 0.0 for positive in branches)
    if called is not None:
        factors = factors[called : called + 1]
    return BranchPlan(branches.index(True) * images, images, images // conditions, 1, factors)
