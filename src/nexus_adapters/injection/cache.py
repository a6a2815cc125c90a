"""Features are computed once per image, not once per step: a few are kept, until they may be stale."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

# Enough for pipelines that alternate between a few embeddings, or run a batch in slices.
MAX_ENTRIES = 4


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written in place; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Weights:
    """What an adapter's weights were, to tell later whether they have changed.

    Replaced tensors and writes in place (an optimizer's step, `load_state_dict`) are seen by identity and
    version. Writes past the version counter (`parameter.data`, as when averaged weights are swapped in; any
    write to an inference tensor) are seen in a sample of the values, one per output channel.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    sample: Tensor | None

    @classmethod
    def of(cls, adapter: nn.Module) -> Self:
        """The adapter's weights as they are now."""
        tensors = _tensors(adapter)
        return cls(tensors, tuple(map(version_of, tensors)), _sample(tensors))

    def hold(self, adapter: nn.Module, look_closely: bool) -> bool:
        """Whether the weights are still these. `look_closely` compares values, and waits for the device."""
        tensors = _tensors(adapter)
        if len(tensors) != len(self.tensors) or any(
            a is not b for a, b in zip(tensors, self.tensors, strict=True)
        ):
            return False
        if tuple(map(version_of, tensors)) != self.versions:
            return False
        if not look_closely or self.sample is None:
            return True
        sample = _sample(tensors)
        return sample is None or torch.equal(sample, self.sample)


def _tensors(adapter: nn.Module) -> tuple[Tensor, ...]:
    return tuple(chain(adapter.parameters(), adapter.buffers()))


def _sample(tensors: tuple[Tensor, ...]) -> Tensor | None:
    if not tensors or any(t.is_meta for t in tensors):  # offloaded: there is nothing to look at
        return None
    # On the CPU, since offloading moves the weights between calls.
    return torch.cat([_first_of_each_channel(t.detach()).float() for t in tensors]).cpu()


def _first_of_each_channel(tensor: Tensor) -> Tensor:
    """A view, whatever the memory format."""
    while tensor.ndim > 1:
        tensor = tensor.select(-1, 0)
    return tensor.reshape(-1)


@dataclass
class _Entry:
    key: Hashable
    text: Tensor  # a strong reference: the object's identity cannot be taken by another one
    text_version: int | None
    text_before: Tensor | None  # what an inference tensor said, whose writes do not count
    weights: Weights
    features: list[Tensor]


class FeatureCache:
    """Features by key and prompt embeddings: the same tensor object is a hit, else equal content."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=MAX_ENTRIES)

    def find(self, key: Hashable, text: Tensor, adapter: nn.Module) -> list[Tensor] | None:
        """The features kept for this key and text, or None; forgets all if the weights have changed."""
        for entry in self._entries:
            if entry.key != key or version_of(entry.text) != entry.text_version:
                continue
            same_object = entry.text is text
            if entry.text_before is not None or not same_object:
                kept = entry.text if entry.text_before is None else entry.text_before
                if not _equal(kept, text):
                    continue
            # Another object is as a rule another generation, before which weights may well have changed.
            # Within one, looking costs nothing on the CPU, but on an accelerator it would stall every step.
            look_closely = not same_object or next(adapter.parameters(), text).device.type == "cpu"
            if not entry.weights.hold(adapter, look_closely):
                self._entries.clear()
                return None
            entry.text, entry.text_version, entry.text_before = text, version_of(text), _copy_if_needed(text)
            return entry.features
        return None

    def keep(self, key: Hashable, text: Tensor, adapter: nn.Module, features: list[Tensor]) -> None:
        """Keep features, in the place of the oldest where there are too many."""
        kept = (version_of(text), _copy_if_needed(text), Weights.of(adapter), features)
        self._entries.append(_Entry(key, text, *kept))

    def clear(self) -> None:
        """Forget all, and free their memory."""
        self._entries.clear()


def _copy_if_needed(text: Tensor) -> Tensor | None:
    return text.clone() if text.is_inference() else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
