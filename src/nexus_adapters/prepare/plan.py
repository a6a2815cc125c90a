"""A plan: all settings that determine the bytes of a prepared set."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from nexus_adapters import __version__
from nexus_adapters.choices import CAPTIONS, IMAGE_FORMATS, Captions, ImageFormat
from nexus_adapters.conditions import find_extractor
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.samples import Source
from nexus_adapters.errors import InvalidArgument, in_utf8, renamed
from nexus_adapters.files import file_sha256
from nexus_adapters.packages import check_packages
from nexus_adapters.prepare.filters import Filters

FORMAT = 1  # format of prepared sets; those with another number cannot be resumed
_PROBE = (64, 64)  # size of the image on which every extractor is tested before the work begins


@dataclass(frozen=True)
class Plan:
    """A source and the set to make from it. It can be pickled for other processes and machines.

    Attributes:
        source: the samples; their own maps are not read.
        conditions: name of an extractor -> its options. Each one makes a PNG next to the image.
        geometry: the sizes that images are resized to before maps are extracted; None keeps their sizes.
        captions: which captions of a sample to keep. "random" keeps one, chosen by seed and sample; "none"
            replaces all by the empty caption.
        filters: which samples to drop.
        image_format: "jpg" (quality 95, full color resolution), or "png" or "webp", which are lossless.
        shard_size: samples of the source per shard, including those that are dropped.
        batch_size: number of images passed to an extractor at a time.
        seed: seed of all randomness.
        count: number of samples to use, starting with the first; 0 for all.
        root: a prefix, such as a folder's path, that is removed from keys when they are written.
        source_settings: what else identifies the samples, as JSON values: columns, splits, listings.

    Raises:
        InvalidArgument: for values out of range, unknown extractors or options, or no conditions.
    """

    source: Source
    conditions: Mapping[str, Mapping[str, Any]]
    geometry: Geometry | None = None
    captions: Captions = "all"
    filters: Filters = field(default_factory=Filters)
    image_format: ImageFormat = "jpg"
    shard_size: int = 1000
    batch_size: int = 8
    seed: int = 0
    count: int = 0
    root: str = ""
    source_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.conditions:
            raise InvalidArgument("conditions", hint="Choose at least one extractor, such as canny")
        # Sorted, since this is the order of the files in a shard.
        object.__setattr__(self, "conditions", dict(sorted(self.conditions.items())))
        for name, options in self.conditions.items():
            with renamed({"name": "conditions"}):
                extractor = find_extractor(name)
            with renamed(partial(_condition_argument, name, options)):
                extractor.check_options(options)
        if self.filters.near_duplicates is not None:
            check_packages("data", "imagehash")
        for argument, known in (("captions", CAPTIONS), ("image_format", IMAGE_FORMATS)):
            if getattr(self, argument) not in known:
                raise InvalidArgument(argument, f"one of {', '.join(known)}", repr(getattr(self, argument)))
        for argument in ("min_caption_length", "max_caption_length"):
            if self.captions == "none" and (length := getattr(self.filters, argument)):
                raise InvalidArgument(argument, "no value, since captions are not read", length)
        for argument, least in (("shard_size", 1), ("batch_size", 1), ("seed", 0), ("count", 0)):
            if getattr(self, argument) < least:
                raise InvalidArgument(argument, f"at least {least}", getattr(self, argument))

    def __len__(self) -> int:
        """Return how many samples of the source are read."""
        return min(self.count, len(self.source)) if self.count else len(self.source)

    @property
    def shards(self) -> int:
        """Number of shards, including those without samples, which are not written."""
        return -(-len(self) // self.shard_size)

    def indices(self, shard: int) -> range:
        """Return the indices of the source's samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self)))

    def key(self, index: int) -> str:
        """Return a sample's key as it is written: without the source's location, in UTF-8."""
        return in_utf8(self.source.key(index).removeprefix(self.root))

    def message(self, text: str) -> str:
        """Return a message as it is written, in which quoted keys are like those of `key`."""
        return in_utf8(text.replace(f"'{self.root}", "'") if self.root else text)

    def choose(self, captions: tuple[str, ...], index: int) -> tuple[str, ...]:
        """Return the captions of a sample that are kept."""
        if self.captions == "none":
            return ("",)
        if self.captions == "all":
            return captions
        if self.captions == "first":
            return captions[:1]
        return (random.Random(f"caption {self.seed} {index}").choice(captions),)

    def uses_models(self) -> bool:
        """Whether any extractor loads a model."""
        return any(
            find_extractor(name).model or options.get("model") for name, options in self.conditions.items()
        )

    def try_extractors(self) -> None:
        """Run each extractor once, so that a missing model is reported before the work begins.

        Raises:
            InvalidArgument: named "conditions" or an option such as "conditions.depth.model".
        """
        for name, options in self.conditions.items():
            with renamed(partial(_condition_argument, name, options)):
                find_extractor(name).extract_all([Image.new("RGB", _PROBE)], options)

    def settings(self) -> dict[str, Any]:
        """Return all that determines the set, as JSON values. Equal settings and sources give equal bytes."""
        conditions = {
            name: find_extractor(name).defaults() | dict(options) for name, options in self.conditions.items()
        }
        settings = {
            "format": FORMAT,
            "version": __version__,
            "source": {"samples": len(self), "keys_sha256": self._keys_hash(), **self.source_settings},
            "conditions": conditions,
            "models": {
                n: _weights_hash(o.get("model")) for n, o in conditions.items() if _is_folder(o.get("model"))
            },
            "geometry": None if self.geometry is None else asdict(self.geometry),
            "captions": self.captions,
            "filters": asdict(self.filters),
            "image_format": self.image_format,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        read_back: dict[str, Any] = json.loads(json.dumps(settings, default=str))  # tuples are lists in JSON
        return read_back

    def _keys_hash(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.key(index).encode() + b"\0")
        return digest.hexdigest()


def _condition_argument(name: str, options: Mapping[str, Any], argument: str) -> str:
    """The name of an extractor's argument in a plan, such as `conditions.depth.model` for `model`."""
    if argument in options or argument in find_extractor(name).options():
        return f"conditions.{name}.{argument}"
    return f"conditions.{name}" if argument == "options" else "conditions"


def _is_folder(model: object) -> bool:
    return isinstance(model, str) and model != "" and Path(model).exists()


def _weights_hash(model: object) -> str:
    """SHA-256 of a local model's files, since the path does not identify their content."""
    place = Path(str(model))
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    digests = []
    for file in files:
        name = file.relative_to(place).as_posix() if place.is_dir() else file.name
        digests.append([name, file_sha256(file)])
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
