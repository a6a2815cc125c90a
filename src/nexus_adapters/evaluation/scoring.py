"""The scores of generated images: one number per image and metric that the data allow."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from nexus_adapters.bundled import EMBEDDED
from nexus_adapters.conditions import EXTRACTORS, extract, find_extractor
from nexus_adapters.conditions.extractor import Compare
from nexus_adapters.conditions.segmentation import PALETTES
from nexus_adapters.data.conditioned import options_for
from nexus_adapters.data.prepared_set import options_of
from nexus_adapters.embedded.held_out import score_images
from nexus_adapters.embedded.maps import BACKGROUND_COLOR, SHAPE_COLORS
from nexus_adapters.embedded.pipeline import embedded_clip
from nexus_adapters.errors import InvalidArgument, renamed
from nexus_adapters.evaluation.cases import Case
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.provenance import source_sha256, versions
from nexus_adapters.metrics import METRICS, Generated, Metric
from nexus_adapters.metrics.learned_features import (
    FeatureModel,
    TransformersFeatures,
    clip_scores,
    load_features,
)
from nexus_adapters.registry import source_of

FEATURES = "features"  # stored with the scores: one row per image, for distances between sets
_EXACT = ("depth", "segmentation")  # maps of scenes that only an extractor with a judge model can compare


class Scorer:
    """Computes all metrics of a config. Creating it loads its models.

    Raises:
        InvalidArgument: for a model that cannot be loaded, and for options that the extractor does not have.
    """

    def __init__(self, config: EvaluationConfig, device: str = "cpu") -> None:
        self._condition_name = config.data.condition
        self._options = _extractor_options(config)
        self._compare = _comparison(config, self._options)
        self._functions = _functions(self._condition_name)
        with renamed({"model": "clip"}):
            self._clip = TransformersFeatures(_model(config.clip), device) if config.clip else None
        self._features: FeatureModel | None = None
        if config.features:
            is_same = self._clip is not None and config.features == config.clip
            with renamed({"model": "features"}):
                self._features = self._clip if is_same else load_features(_model(config.features), device)

    def __call__(self, images: Sequence[Image.Image], cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Return metric -> one number per image, and `FEATURES` -> one row per image.

        Raises:
            InvalidArgument: for a metric whose function does not return a finite number.
        """
        shown = [
            Generated(image, case.original, case.condition, case.words)
            for image, case in zip(images, cases, strict=True)
        ]
        rows = [{metric.name: _value(metric, each) for metric in self._functions} for each in shown]
        if self._compare is not None:
            maps = extract(self._condition_name, list(images), **self._options)
            for row, found, case in zip(rows, maps, cases, strict=True):
                row |= self._compare(found, case.condition)
        scores = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
        scenes = [case.scene for case in cases if case.scene is not None]
        if scenes:
            of_scenes = score_images([np.asarray(image) for image in images], scenes)
            # For canny, the edges are those of the extractor with its options, compared above.
            scores = scores | of_scenes | (scores if self._condition_name == "canny" else {})
        if self._clip is not None:
            embeds = self._clip.images(images)
            texts = self._clip.texts([case.words for case in cases])
            scores["clip_score"] = clip_scores(embeds, texts).numpy()
        if self._features is not None:
            rows_of = embeds if self._features is self._clip else self._features.images(images)
            scores[FEATURES] = rows_of.numpy()
        return scores


def scoring_sha256(config: EvaluationConfig) -> str:
    """Return the SHA-256 of all that determines scores besides images: metrics, models and versions."""
    options = _extractor_options(config)
    models = (config.clip, config.features, str(options.get("model", "")))
    content = [source_sha256(_model(name)) if name else "" for name in models]
    decisive: list[Any] = [content, options, versions()]
    if own := _users_code(config.data.condition):
        decisive.append(own)
    text = json.dumps(decisive, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _functions(condition_name: str) -> list[Metric]:
    """The metrics that are computed for each image separately."""
    return [
        metric
        for metric in METRICS.values()
        if metric.function is not None and (not metric.applies_to or condition_name in metric.applies_to)
    ]


def _value(metric: Metric, generated: Generated) -> float:
    assert metric.function is not None
    value: object = metric.function(generated)
    try:
        number = float(value)  # type: ignore[arg-type]  # checked by trying
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidArgument(f"metric {metric.name}", "a function that returns a finite number", repr(value))
    return number


def _users_code(condition_name: str) -> dict[str, str]:
    """SHA-256 of code outside this package: of registered metrics and of the condition's extractor.

    This package's own code is identified by its version.
    """
    calls: dict[str, Callable[..., object] | None] = {
        f"metric {metric.name}": metric.function for metric in _functions(condition_name)
    }
    if condition_name in EXTRACTORS:
        extractor = find_extractor(condition_name)
        calls |= {
            "draw": extractor.extract,
            "draw_many": extractor.extract_many,
            "compare": extractor.compare,
        }
    ours = __name__.partition(".")[0]
    return {
        name: hashlib.sha256(source_of(call).encode()).hexdigest()
        for name, call in calls.items()
        if call is not None and str(getattr(call, "__module__", "")).partition(".")[0] != ours
    }


def _model(name: str) -> str:
    return str(embedded_clip()) if name == EMBEDDED else name


def _extractor_options(config: EvaluationConfig) -> dict[str, Any]:
    data = config.data
    if config.judge:
        is_scenes = data.kind == "scenes" and data.condition == "segmentation"
        return ({"palette": "voc"} if is_scenes else {}) | dict(config.judge)
    prepared = options_of(data.path, data.condition) if data.kind == "prepared" else {}
    return options_for(data.condition, prepared | dict(data.extractor))[1]


def _comparison(config: EvaluationConfig, options: Mapping[str, Any]) -> Compare | None:
    """How a generated image's map is compared to the condition; None if that is impossible.

    No extractor reproduces the exact maps of scenes, and not every condition has a comparison.
    """
    name, is_scenes = config.data.condition, config.data.kind == "scenes"
    if is_scenes and name in _EXACT and not options.get("model"):
        if config.judge:
            raise InvalidArgument("judge", f"a model option for the {name} of scenes", config.judge)
        return None
    extractor = find_extractor(name) if name in EXTRACTORS else None
    if config.judge and (extractor is None or extractor.compare is None):
        expected = f"no judge for '{name}', since its maps cannot be extracted and compared"
        raise InvalidArgument("judge", expected, config.judge)
    if extractor is None:
        return None
    field = "judge" if config.judge else "data.extractor"
    with renamed(lambda option: field if option == "options" else f"{field}.{option}"):
        extractor.check_options(options)
    if extractor.compare is not None and is_scenes and extractor.kind == "labels":
        return _of_scene_labels(extractor.compare, str(options.get("palette", "")))
    return extractor.compare


def _of_scene_labels(compare: Compare, palette: str) -> Compare:
    """For judges of scenes: classes are in the order of scenes, background first, in a palette's colors."""
    theirs = np.asarray([BACKGROUND_COLOR, *SHAPE_COLORS.values()], np.uint8)

    def of_scenes(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
        recolored = _recolored(np.asarray(found), PALETTES[palette], theirs)
        return compare(Image.fromarray(recolored), wanted)

    return of_scenes


def _recolored(pixels: np.ndarray, palette: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Replace the first colors of a palette by `colors`. Raises `InvalidArgument` for any other color."""
    recolored = np.zeros_like(pixels)
    known = np.zeros(pixels.shape[:2], bool)
    for old, new in zip(palette, colors, strict=False):
        here = (pixels == old).all(axis=2)
        recolored[here], known = new, known | here
    if not known.all():
        expected = f"a model with {len(colors)} classes, the background and the scenes' shapes"
        raise InvalidArgument("judge", expected, "a model with other classes")
    return recolored
