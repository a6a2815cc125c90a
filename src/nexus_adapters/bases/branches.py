"""Guidance branches: which rows of a denoiser's batch read the prompt, and which the negative prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nexus_adapters.errors import InvalidArgument

# One entry per branch, in order: whether it reads the prompt (else the negative prompt).
Branches = tuple[bool, ...]

POSITIVE, NEGATIVE = "positive", "negative"


def parse_branches(names: Any) -> Branches:
    """What a user says of a pipeline's branches, such as ("negative", "positive"), as `Branches`.

    `InvalidArgument` for other names, for none, and where no branch reads the prompt.
    """
    is_list = isinstance(names, (tuple, list))
    if not is_list or not names or any(name not in (POSITIVE, NEGATIVE) for name in names):
        raise InvalidArgument("branches", f'a list of "{NEGATIVE}" and "{POSITIVE}"', repr(names))
    if POSITIVE not in names:
        raise InvalidArgument("branches", f'at least one "{POSITIVE}"', repr(names))
    return tuple(name == POSITIVE for name in names)


@dataclass(frozen=True)
class RunningPipeline:
    """A pipeline's call that is running in this thread; `pipe` is None where there is none.

    `variables`: the local variables of its `__call__`; `loop`: the dotted name of that function, which may be
    a base class's.
    """

    pipe: Any
    variables: Mapping[str, Any]
    loop: str = ""


@dataclass(frozen=True)
class CallLayout:
    """What the rows of a denoiser's call are.

    Attributes:
        text: the prompt embeddings of all branches, branch after branch, each of the same number of rows.
        branches: of the text; None where they are not known, and each row is on its own.
        called: the index of the only branch that the call has; None where it has all. A pipeline that guides
            by two calls a step has one branch in each.
    """

    text: Tensor
    branches: Branches | None
    called: int | None = None
