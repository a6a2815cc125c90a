"""Scenes of the embedded world as samples."""

from __future__ import annotations

import hashlib
from functools import cached_property

from PIL import Image

from nexus_adapters.data.samples import Sample
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.maps import MAPS, draw_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import SIZE, draw_scene
from nexus_adapters.errors import InvalidArgument

_WITNESSES = range(8)  # seeds of the scenes that tell whether drawing is still the same


class SceneSource:
    """Scenes of the training split.

    Args:
        count: how many.
        first_seed: of the first one; the others follow.
        phrasings: captions of each scene.
        condition: the structure map that comes with each, one of `scenes.maps.MAPS`; None for none, which
            leaves it to an extractor.

    Raises:
        InvalidArgument: for a count or phrasings below 1, a seed below 0, or an unknown condition.
    """

    def __init__(
        self, count: int, first_seed: int = 0, phrasings: int = 3, condition: str | None = None
    ) -> None:
        least = {"count": (count, 1), "first_seed": (first_seed, 0), "phrasings": (phrasings, 1)}
        for argument, (received, expected) in least.items():
            if received < expected:
                raise InvalidArgument(argument, f"at least {expected}", received)
        if condition is not None and condition not in MAPS:
            raise InvalidArgument("condition", f"one of {', '.join(MAPS)}", repr(condition))
        self.count, self.first_seed, self.phrasings = count, first_seed, phrasings
        self.condition = condition

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        """The scene's seed, in words."""
        return f"scene {self._seed(index)}"

    def content_hash(self, index: int) -> str:
        """SHA-256 over the seed, the phrasings, and what drawing gives: other code, other hashes."""
        made_of = f"{self._drawing} {self._seed(index)} {self.phrasings}"
        if self.condition is not None:
            made_of += f" {self.condition}"
        return hashlib.sha256(made_of.encode()).hexdigest()

    def stamp(self, index: int) -> None:
        """None: the hash takes no longer."""

    def size(self, index: int) -> tuple[int, int]:
        """(width, height), always the same."""
        return SIZE, SIZE

    def load(self, index: int) -> Sample:
        """Draw a scene."""
        scene = draw_scene(self._seed(index))
        captions = tuple(caption(scene, phrasing) for phrasing in range(self.phrasings))
        rendering = render(scene)
        condition = None if self.condition is None else draw_map(self.condition, scene, rendering)
        return Sample(self.key(index), Image.fromarray(rendering.image), condition, captions)

    def _seed(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0 to {self.count - 1}, got {index}")
        return self.first_seed + index

    @cached_property
    def _drawing(self) -> str:
        digest = hashlib.sha256()
        for seed in _WITNESSES:
            scene = draw_scene(seed)
            rendering = render(scene)
            digest.update(rendering.image.tobytes())
            if self.condition is not None:
                digest.update(draw_map(self.condition, scene, rendering).tobytes())
            digest.update("\n".join(caption(scene, phrasing) for phrasing in range(3)).encode())
        return digest.hexdigest()
