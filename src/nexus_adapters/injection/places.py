"""Add features to a denoiser through an argument of its `forward`, or with hooks on its modules."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nexus_adapters.bases.base import Place
from nexus_adapters.bases.families import inner
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.injection.denoiser_hook import CHANGING_HOOKS


class FeaturePlaces:
    """The places of one denoiser, connected until `remove`.

    For places with a keyword, `arguments` returns the features as an argument. For places with a module,
    hooks add the features that `arguments` got last in this thread to the module's output.
    """

    def __init__(self, denoiser: nn.Module, places: Sequence[Place]) -> None:
        self._places = tuple(places)
        self._now = threading.local()
        self._handles = []
        bare = inner(denoiser)
        # Find all modules before hooking the first one, so that a missing module leaves no hooks behind.
        modules = [None if place.keyword else bare.get_submodule(place.module) for place in self._places]
        with CHANGING_HOOKS:
            for number, (place, module) in enumerate(zip(self._places, modules, strict=True)):
                if module is not None:
                    self._handles.append(module.register_forward_hook(self._adder(number, place.output)))

    def arguments(
        self, features: Sequence[Tensor], present: Mapping[str, Sequence[Tensor] | None] | None = None
    ) -> dict[str, list[Tensor]]:
        """Return the denoiser's arguments for its next call in this thread.

        Args:
            features: one (B, C, H, W) per place. They are not modified.
            present: the call's own values of these arguments, to which the features are added.
        """
        laid_out = [
            feature.flatten(2).transpose(1, 2) if place.layout == "tokens" else feature
            for feature, place in zip(features, self._places, strict=True)
        ]
        self._now.features = laid_out
        found: dict[str, list[Tensor]] = {}
        for feature, place in zip(laid_out, self._places, strict=True):
            if place.keyword:
                found.setdefault(place.keyword, []).append(feature)
        return {name: added(name, (present or {}).get(name), ours) for name, ours in found.items()}

    def keywords(self) -> tuple[str, ...]:
        """Return the names of the arguments that take features."""
        return tuple(dict.fromkeys(place.keyword for place in self._places if place.keyword))

    def clear(self) -> None:
        """Add nothing to the next call in this thread."""
        self._now.features = None

    def remove(self) -> None:
        """Remove the hooks, which restores the denoiser exactly."""
        with CHANGING_HOOKS:
            for handle in self._handles:
                handle.remove()
        self._handles = []

    def _adder(self, number: int, place: int | None) -> Any:
        def add(_: nn.Module, __: Any, output: Any) -> Any:
            features = getattr(self._now, "features", None)
            if features is None:
                return None
            if place is None:
                return output + features[number].to(output.device, output.dtype)
            parts = list(output)
            parts[place] = parts[place] + features[number].to(parts[place].device, parts[place].dtype)
            return tuple(parts)

        return add


def added(name: str, present: Sequence[Tensor] | None, ours: Sequence[Tensor]) -> list[Tensor]:
    """Add two lists of features, place by place; return a new list, since a UNet empties it.

    Raises:
        InvalidArgument: named `name`, if they cannot be added.
    """
    if present is None:
        return list(ours)
    if len(present) > len(ours):
        raise InvalidArgument(name, f"at most {len(ours)} tensors, one per place", len(present))
    for level, (theirs, mine) in enumerate(zip(present, ours, strict=False), start=1):
        if theirs.shape[1:] != mine.shape[1:] or len(theirs) not in (1, len(mine)):
            raise InvalidArgument(
                name, f"shape {tuple(mine.shape)} at place {level}", f"shape {tuple(theirs.shape)}"
            )
    return [p + o for p, o in zip(present, ours, strict=False)] + list(ours[len(present) :])
