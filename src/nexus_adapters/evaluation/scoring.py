"""What a picture shows of what it was to show: every metric that its data allow, a number a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexus_adapters import embedded
from nexus_adapters.conditions import EXTRACTORS, extract, find_extractor
from nexus_adapters.conditions.palettes import PALETTES
from nexus_adapters.data.prepared_set import options_of
from nexus_adapters.evaluation.cases import Case
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.loading import source_sha256
from nexus_adapters.evaluation.provenance import versions
from nexus_adapters.evaluation.scenes import score_images
from nexus_adapters.metrics.clip_score import clip_scores
from nexus_adapters.metrics.edges import edge_f1
from nexus_adapters.metrics.structure import depth_rmse, mean_iou, ms_ssim, rank_correlation
from nexus_adapters.metrics.vision_models import FeatureModel, TransformersFeatures, load_features
from nexus_adapters.scenes.maps import BACKGROUND_COLOR, SHAPE_COLORS
from nexus_adapters.training.base import EMBEDDED

FEATURES = "features"  # beside the scores: a row a picture, for distances between sets
_MOST_CLASSES = 512
_EXACT = ("depth", "segmentation")  # of scenes, whose own maps no extractor draws unless a judge is named

Scores = dict[str, Float[np.ndarray, " n"]]
_Structure = Callable[[Image.Image, Image.Image], dict[str, float]]


class Scorer:
    """Every metric of a config. Its models are loaded when it is made.

    Raises ValueError for a model that cannot be loaded, and for options that the extractor does not have.
    """

    def __init__(self, config: EvaluationConfig, device: str = "cpu") -> None:
        self._condition = config.data.condition
        self._options = _extractor_options(config)
        self._structure = _structure(config, self._options)
        with _named("clip"):
            self._clip = TransformersFeatures(_model(config.clip), device) if config.clip else None
        self._features: FeatureModel | None = None
        if config.features:
            is_same = self._clip is not None and config.features == config.clip
            with _named("features"):
                self._features = self._clip if is_same else load_features(_model(config.features), device)

    def __call__(self, images: Sequence[Image.Image], cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Metric -> a number a picture; and `FEATURES`, a row a picture."""
        rows: list[dict[str, float]] = [  # MS-SSIM of luminance, as its authors have it
            {"ms_ssim": ms_ssim(_grey(image), _grey(case.picture))}
            for image, case in zip(images, cases, strict=True)
        ]
        if self._structure is not None:
            drawn = extract(self._condition, list(images), **self._options)
            for row, found, case in zip(rows, drawn, cases, strict=True):
                row |= self._structure(found, case.condition)
        scores = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
        scenes = [case.scene for case in cases if case.scene is not None]
        if scenes:
            of_scenes = score_images([np.asarray(image) for image in images], scenes)
            # Under canny the edges are those of the extractor with its options, as drawn above.
            scores = scores | of_scenes | (scores if self._condition == "canny" else {})
        if self._clip is not None:
            embeds = self._clip.images(images)
            texts = self._clip.texts([case.words for case in cases])
            scores["clip_score"] = clip_scores(embeds, texts).numpy()
        if self._features is not None:
            rows_of = embeds if self._features is self._clip else self._features.images(images)
            scores[FEATURES] = rows_of.numpy()
        return scores


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Let a ValueError about a model name the field that it came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}:{str(error).partition(':')[2]}") from error


def scoring_sha256(config: EvaluationConfig) -> str:
    """SHA-256 over what decides a picture's scores beside the case: metrics, models, versions."""
    options = _extractor_options(config)
    models = (config.clip, config.features, str(options.get("model", "")))
    content = [source_sha256(_model(name)) if name else "" for name in models]
    told = json.dumps([content, options, versions()], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _model(name: str) -> str:
    return str(embedded.embedded_clip()) if name == EMBEDDED else name


def _extractor_options(config: EvaluationConfig) -> dict[str, Any]:
    data = config.data
    if config.judge:
        is_scenes = data.kind == "scenes" and data.condition == "segmentation"
        return ({"palette": "voc"} if is_scenes else {}) | dict(config.judge)
    prepared = options_of(data.path, data.condition) if data.kind == "prepared" else {}
    return prepared | dict(data.extractor)


def _structure(config: EvaluationConfig, options: Mapping[str, Any]) -> _Structure | None:
    """(map of the picture, the map that it was to follow) -> scores; None where nothing draws such maps."""
    name, is_scenes = config.data.condition, config.data.kind == "scenes"
    if name not in EXTRACTORS or (is_scenes and name in _EXACT and not options.get("model")):
        if config.judge:
            raise ValueError(f"judge: expected none without an extractor for {name}; received {config.judge}")
        return None
    extractor = find_extractor(name)
    try:
        extractor.check_options(options)
    except ValueError as error:
        field = "judge" if config.judge else "data.extractor"
        raise ValueError(f"{field}: {error}") from error
    if name == "sketch":
        return lambda found, wanted: {
            "sketch_ms_ssim": ms_ssim(_grey(found), _grey(wanted)),
            "edge_f1": edge_f1(_lines(found), _lines(wanted)),
        }
    if extractor.lines:
        return lambda found, wanted: {"edge_f1": edge_f1(_lines(found), _lines(wanted))}
    if extractor.labels:
        return _segmentation_scores(str(options.get("palette", "")), is_scenes)
    return lambda found, wanted: {
        "depth_rmse": depth_rmse(_grey(found)[0], _grey(wanted)[0]),
        "depth_rank_correlation": rank_correlation(_grey(found)[0], _grey(wanted)[0]),
    }


def _segmentation_scores(palette: str, is_scenes: bool) -> _Structure:
    """Classes go by color. A judge of scenes has its classes in their order: background, then shapes."""
    theirs = np.asarray([BACKGROUND_COLOR, *SHAPE_COLORS.values()], np.uint8)

    def score(found: Image.Image, wanted: Image.Image) -> dict[str, float]:
        drawn, expected = np.asarray(found), np.asarray(wanted)
        if is_scenes:
            drawn = _recolored(drawn, PALETTES[palette], theirs)
        pixels = np.concatenate([drawn.reshape(-1, 3), expected.reshape(-1, 3)])
        values, labels = np.unique(pixels, axis=0, return_inverse=True)
        if len(values) > _MOST_CLASSES:
            raise ValueError(
                f"condition: expected segmentations of at most {_MOST_CLASSES} colors; received {len(values)}"
            )
        first, second = torch.from_numpy(labels.reshape(2, *drawn.shape[:2]))
        return {"mean_iou": mean_iou(first, second, len(values))}

    return score


def _recolored(pixels: np.ndarray, palette: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """With the first colors of a palette exchanged for others; ValueError for any other color."""
    recolored = np.zeros_like(pixels)
    known = np.zeros(pixels.shape[:2], bool)
    for old, new in zip(palette, colors, strict=False):
        here = (pixels == old).all(axis=2)
        recolored[here], known = new, known | here
    if not known.all():
        raise ValueError(
            f"judge: expected a model of {len(colors)} classes, the background and the scenes' shapes; "
            "received one that draws others"
        )
    return recolored


def _grey(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("L")))[None].float() / 255


def _lines(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) > 127
