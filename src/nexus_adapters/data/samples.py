"""What a data set is to training: samples by index, each decoded when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image


class BadSample(ValueError):  # noqa: N818  # it is about a sample, and most often no program's fault
    """One sample that cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """One sample, decoded.

    Attributes:
        key: names it in messages and reports: a path, or such as "shard.tar/00012".
        image: RGB, upright.
        condition: its structure map, RGB; None where the data set has none, and an extractor is to draw it.
        captions: at least one; "" is allowed.
    """

    key: str
    image: Image.Image
    condition: Image.Image | None
    captions: tuple[str, ...]


@runtime_checkable
class Source(Protocol):
    """A data set. Can be handed to other processes; always in the same order; opens files when it needs them.

    It knows nothing of geometry, extractors or training. What is wrong with the whole of it is an
    InvalidArgument when it is made; what is wrong with one sample is a BadSample when that one is read.
    """

    def __len__(self) -> int:
        """How many samples there are, readable or not."""
        ...

    def key(self, index: int) -> str:
        """What names a sample in messages and reports."""
        ...

    def content_hash(self, index: int) -> str:
        """SHA-256, in hex, over all that `load` reads: image, condition, captions. BadSample."""
        ...

    def stamp(self, index: int) -> str | None:
        """What changes when any of that may have, told without reading it; None where nothing tells."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of the image as `load` gives it, upright, from the header alone. BadSample."""
        ...

    def load(self, index: int) -> Sample:
        """Read and decode a sample. BadSample for what cannot be."""
        ...
