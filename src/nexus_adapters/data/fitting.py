"""Samples of a source as training reads them: fitted, with a structure map, by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from nexus_adapters.data.conditioned import FittedSample, fit_sample
from nexus_adapters.data.geometry import Geometry
from nexus_adapters.data.known_hashes import KnownHashes
from nexus_adapters.data.samples import Source


@dataclass(frozen=True)
class Fitting:
    """How a source's samples are fitted.

    Attributes:
        source: the samples.
        geometry: what sizes they are fitted to.
        extractor: what draws the structure maps that the source has not.
        options: of the extractor.
    """

    source: Source
    geometry: Geometry
    extractor: str
    options: Mapping[str, object] = field(default_factory=dict)

    def fit(self, index: int) -> FittedSample:
        """The sample; BadSample where it cannot be read."""
        return fit_sample(self.source, index, self.geometry, self.extractor, self.options)

    def target(self, index: int) -> tuple[int, int]:
        """(width, height) that the sample is fitted to; BadSample where its size cannot be read."""
        return self.geometry.target(self.source.size(index))

    def content_hash(self, index: int, known: KnownHashes) -> str:
        """SHA-256 over all that `fit` makes the sample of; BadSample where it cannot be read."""
        made_of = [
            known.content_hash(self.source, index),
            repr(self.geometry),
            self.extractor,
            sorted(self.options.items()),
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
