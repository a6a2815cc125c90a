"""The cases of an evaluation, by index: what images are generated from and compared to."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, overload

from PIL import Image

from nexus_adapters.conditions import extract
from nexus_adapters.data.conditioned import ConditionedSource
from nexus_adapters.data.inspection import caption_lengths, describe_captions
from nexus_adapters.data.samples import BadSample
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.held_out import TestScene, load_test_scenes
from nexus_adapters.embedded.scene import SHAPES, Scene, Split
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.progress import progress
from nexus_adapters.training.data_identity import TrainedOn
from nexus_adapters.training.recipe_samples import open_samples


@dataclass(frozen=True)
class Case:
    """A sample for which every method generates an image.

    Attributes:
        key: its name.
        prompt: the prompt for the base and for every adapter that reads the prompt.
        words: its own caption, which CLIP scores use regardless of the prompt.
        condition: RGB structure map with the size of the original.
        original: the sample's own RGB image.
        scene: the scene of a sample in the embedded world; else None.
    """

    key: str
    prompt: str
    words: str
    condition: Image.Image
    original: Image.Image
    scene: TestScene | None = None


class Cases:
    """The cases of an evaluation, which are read on demand.

    Args:
        count: number of cases.
        load: reads the case at an index.
        image_hash: returns the hash of a case's image, from its source; None for scenes, which no run was
            trained on.
    """

    def __init__(
        self, count: int, load: Callable[[int], Case], image_hash: Callable[[int], str] | None = None
    ) -> None:
        self._count, self._load, self._image_hash = count, load, image_hash

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Case]:
        return map(self.__getitem__, range(self._count))

    @overload
    def __getitem__(self, place: int) -> Case: ...
    @overload
    def __getitem__(self, place: slice) -> list[Case]: ...
    def __getitem__(self, place: int | slice) -> Case | list[Case]:
        if isinstance(place, slice):
            return [self._load(each) for each in range(*place.indices(self._count))]
        if not 0 <= place < self._count:
            raise IndexError(f"place: expected 0 to {self._count - 1}, got {place}")
        return self._load(place)

    @property
    def may_be_trained(self) -> bool:
        """Whether a run can have been trained on the samples; never for scenes."""
        return self._image_hash is not None

    def count_trained(self, record: TrainedOn) -> int:
        """Return how many of the samples are in a record. Raises `InvalidArgument` for unreadable ones."""
        if self._image_hash is None:
            return 0
        try:
            places = progress(
                range(self._count), what="comparing with trained samples", unit="sample", delay=2, leave=False
            )
            return sum(record.has(self._image_hash(place)) for place in places)
        except BadSample as error:
            raise _unreadable(error) from error


def open_cases(config: EvaluationConfig, cache_folder: Path, multiple: int) -> Cases:
    """Open the cases of a config without reading any.

    Args:
        config: the evaluation's config.
        cache_folder: where indices of tars are kept.
        multiple: the base requires sides that are multiples of this, in pixels.

    Raises:
        InvalidArgument: if the data are missing or have too few samples.
    """
    data = config.data
    if data.kind == "scenes":
        return Cases(data.count, lambda place: _of_scene(config, place))
    samples = open_samples(data, cache_folder, multiple)
    there = len(samples.source) - config.first
    if there < 1:
        raise InvalidArgument(
            "first", f"less than the number of samples, {len(samples.source)}", config.first
        )
    if there < data.count:
        raise InvalidArgument(
            "data.count", f"at most {there}, the samples from index {config.first}", data.count
        )
    captions = _Captions(samples)
    return Cases(
        data.count or there,
        lambda place: _of_sample(config, samples, captions, place),
        lambda place: samples.source.image_hash(config.first + place),
    )


def contradicting(scene: Scene) -> str:
    """Return the scene's caption with every shape replaced by one that the scene does not contain."""
    others = [shape for shape in SHAPES if all(shape != item.shape for item in scene.objects)]
    Random(f"nexus contradiction {scene!r}").shuffle(others)
    changed = [replace(item, shape=shape) for item, shape in zip(scene.objects, others, strict=False)]
    return caption(replace(scene, objects=tuple(changed)))


def content_sha256(cases: Cases, show_progress: bool = True, tokenizer: Any = None) -> str:
    """Return the SHA-256 of prompts, conditions and originals, by reading everything once.

    Warns about prompts that are longer than the limit of `tokenizer`, if there is one.

    Raises:
        InvalidArgument: for a sample that is unreadable or has no caption; an evaluation does not replace it.
    """
    digest, lengths = hashlib.sha256(), []
    for case in progress(
        cases, what="reading samples", unit="sample", total=len(cases), leave=False, shown=show_progress
    ):
        digest.update(f"{case.prompt}\n{case.words}\n".encode())
        digest.update(case.condition.tobytes())
        digest.update(case.original.tobytes())
        if case.prompt:
            lengths.append(caption_lengths([case.prompt], tokenizer))
    for line in describe_captions(lengths, tokenizer):
        warnings.warn(f"data: {line}", stacklevel=2)
    return digest.hexdigest()


def _of_scene(config: EvaluationConfig, place: int) -> Case:
    split: Split = "novel" if config.data.split == "novel" else "test"
    seed = config.first + place
    (loaded,) = load_test_scenes(1, split, seed, config.data.condition)
    prompt = loaded.prompt
    if config.prompts != "own":
        prompt = "" if config.prompts == "empty" else contradicting(loaded.scene)
    original = Image.fromarray(loaded.rendering.image)
    if config.data.condition == "canny" and config.data.extractor:  # as in training
        loaded = replace(loaded, condition=extract("canny", original, **config.data.extractor))
    return Case(f"{split} scene {seed}", prompt, loaded.prompt, loaded.condition, original, loaded)


class _Captions:
    """The captions of samples, each of which is read once."""

    def __init__(self, samples: ConditionedSource) -> None:
        self._source = samples.source
        self._known: dict[int, str] = {}

    def of(self, index: int) -> str:
        if index not in self._known:
            sample = self._source.load(index)
            self._known[index] = _words(sample.captions, sample.key)
        return self._known[index]

    def contradicting(self, index: int) -> str:
        """Return the next sample's caption that differs in more than case and whitespace.

        Raises `InvalidArgument` if all captions are the same.
        """
        own = _normalized(self.of(index))
        for step in range(1, len(self._source)):
            words = self.of((index + step) % len(self._source))
            if _normalized(words) != own:
                return words
        raise InvalidArgument(
            "prompts", "own or empty, since all samples have the same caption", "contradicting"
        )


def _normalized(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _of_sample(config: EvaluationConfig, samples: ConditionedSource, captions: _Captions, place: int) -> Case:
    index = config.first + place
    try:
        sample = samples.fit(index)
        words = _words(sample.captions, sample.key)
        prompt = words
        if config.prompts == "empty":
            prompt = ""
        elif config.prompts == "contradicting":
            prompt = captions.contradicting(index)
    except BadSample as error:
        raise _unreadable(error) from error
    return Case(sample.key, prompt, words, sample.condition, sample.image)


def _unreadable(error: BadSample) -> InvalidArgument:
    return InvalidArgument("data", "readable samples", error)


def _words(captions: Sequence[str], key: str) -> str:
    if not captions[0].strip():
        raise InvalidArgument("data", "a caption for each sample", f"none for '{key}'")
    return captions[0]
