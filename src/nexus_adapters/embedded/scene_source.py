"""Scenes of the training split as samples of a dataset."""

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

_WITNESSES = range(8)  # seeds of the scenes used to detect changed rendering code


class SceneSource:
    """Scenes of the training split, rendered when they are loaded.

    Args:
        count: number of scenes.
        first_seed: seed of the first scene; the others have the following seeds.
        phrasings: number of captions per scene.
        condition_name: the exact structure map of each sample, one of `embedded.maps.MAPS`. With None,
            samples have no map, so an extractor makes it from the image.

    Raises:
        InvalidArgument: for a count or phrasings below 1, a seed below 0, or an unknown `condition_name`.
    """

    def __init__(
        self, count: int, first_seed: int = 0, phrasings: int = 3, condition_name: str | None = None
    ) -> None:
        least = {"count": (count, 1), "first_seed": (first_seed, 0), "phrasings": (phrasings, 1)}
        for argument, (received, expected) in least.items():
            if received < expected:
                raise InvalidArgument(argument, f"at least {expected}", received)
        if condition_name is not None and condition_name not in MAPS:
            raise InvalidArgument("condition_name", f"one of {', '.join(MAPS)}", repr(condition_name))
        self.count, self.first_seed, self.phrasings = count, first_seed, phrasings
        self.condition_name = condition_name

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        """Return the scene's seed as text."""
        return f"scene {self._seed(index)}"

    def content_hash(self, index: int) -> str:
        """Return the SHA-256 of seed, phrasings and sample renderings. It changes if rendering does."""
        made_of = f"{self._drawing} {self._seed(index)} {self.phrasings}"
        if self.condition_name is not None:
            made_of += f" {self.condition_name}"
        return hashlib.sha256(made_of.encode()).hexdigest()

    def image_hash(self, index: int) -> str:
        """Return the SHA-256 of the rendered pixels."""
        return hashlib.sha256(render(draw_scene(self._seed(index))).image.tobytes()).hexdigest()

    def stamp(self, index: int) -> None:
        """Return None, since hashing a scene is as cheap as a stamp would be."""

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height), which is the same for all scenes."""
        return SIZE, SIZE

    def load(self, index: int) -> Sample:
        """Render a scene."""
        scene = draw_scene(self._seed(index))
        captions = tuple(caption(scene, phrasing) for phrasing in range(self.phrasings))
        rendering = render(scene)
        name = self.condition_name
        condition = None if name is None else draw_map(name, scene, rendering)
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
            if self.condition_name is not None:
                digest.update(draw_map(self.condition_name, scene, rendering).tobytes())
            digest.update("\n".join(caption(scene, phrasing) for phrasing in range(3)).encode())
        return digest.hexdigest()
