"""An evaluation from end to end: every method draws every case, each picture is scored, a report is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from tqdm import tqdm

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.data.encoders import parts_sha256
from nexus_adapters.data.user_cache import user_cache
from nexus_adapters.evaluation.cases import Cases, content_sha256, open_cases
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.estimates import LEAST_FOR_DISTANCES, Measured, distances
from nexus_adapters.evaluation.loading import (
    check_adapter,
    choose_dtype,
    load_adapter,
    load_base,
    parameter_count,
)
from nexus_adapters.evaluation.methods import draw_batch
from nexus_adapters.evaluation.provenance import machine, versions
from nexus_adapters.evaluation.scoring import FEATURES, Scorer
from nexus_adapters.evaluation.store import Store, claim
from nexus_adapters.training.base import BaseShape, base_shape, check_weights
from nexus_adapters.training.output import occupied
from nexus_adapters.training.processes import leave_together

BASE, REFERENCE = "base", "reference"  # no adapter; and the data's own pictures
NAME = re.compile(r"[A-Za-z0-9][\w.+@-]*")
_SCORING_FIELDS = ("features", "clip", "judge")  # they change no picture


@dataclass(frozen=True)
class Method:
    """One way to draw, and what it cost. Times are of all processes together."""

    name: str
    source: str
    sha256: str
    parameters: int
    measured: Measured
    draw_s: float = 0.0
    score_s: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: its settings, its methods in order, and the cases that they drew."""

    settings: Mapping[str, Any]
    methods: Mapping[str, Method]
    cases: Cases
    folder: Path


def evaluate(
    config: EvaluationConfig,
    adapters: Mapping[str, str],
    out: Path,
    show_progress: bool = True,
    with_base: bool = True,
) -> Evaluation | None:
    """Draw and score what is not drawn and scored yet, by the base alone and by each adapter.

    Under `accelerate launch` the processes share the batches; each batch is drawn whole by one of them, so
    their number changes no picture.

    Args:
        config: what is drawn and how.
        adapters: name -> folder, Hub id, or beside the embedded base one of `embedded.METHODS`.
        out: a new folder, or one of an evaluation of the same settings, which goes on.
        show_progress: on the main process.
        with_base: whether the base alone draws too.

    Returns:
        What was found; None on all processes but the main one.

    Raises:
        ValueError: for data without captions or that cannot be read, too few of them for a distance, an
            adapter that does not fit, a model that is not there, or a folder of other settings: all before
            the first picture.
    """
    _check_names(adapters)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder; received '{out}', which is a file")
    shape, cases = open_evaluation(config)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    device, is_main = accelerator.device, accelerator.is_main_process
    dtype = choose_dtype(config.dtype, device)
    loaded: dict[str, Any] = {BASE: None} if with_base else {}
    for name, adapter in adapters.items():
        loaded[name] = load_adapter(name, adapter, config.data.condition, config.base)
        check_adapter(name, loaded[name], shape)
    hashes = {name: parts_sha256({"adapter": each}) for name, each in loaded.items() if each is not None}
    scorer = Scorer(config, str(device))
    data_sha256 = content_sha256(cases, show_progress and is_main)
    base = load_base(config.base, device, dtype)
    settings = _settings(config, data_sha256, parts_sha256(base.components), dtype)
    with occupied(out, "out") if is_main else nullcontext():
        if is_main:
            claim(out, settings, hashes, dataclasses.asdict(EvaluationConfig()))
        accelerator.wait_for_everyone()
        for adapter in loaded.values():
            if adapter is not None:
                nn.Module.to(adapter, device, dtype)
        stores = _stores(config, out, [REFERENCE, *loaded], data_sha256, versions()["transformers"])
        _work(config, cases, loaded, stores, base, scorer, accelerator, show_progress)
        accelerator.wait_for_everyone()
        found = None
        if is_main:
            methods = _collect(config, cases, stores, {**adapters, BASE: ""}, hashes, loaded)
            found = Evaluation(settings, methods, cases, out)
        leave_together(accelerator)
    return found


def open_evaluation(config: EvaluationConfig) -> tuple[BaseShape, Cases]:
    """The base's shape, and the cases, not yet read. ValueError where either is missing or too few."""
    shape = base_shape(config.base)
    check_weights(config.base)
    cases = open_cases(config, user_cache() / "training", shape.multiple)
    if config.features and len(cases) < LEAST_FOR_DISTANCES:
        raise ValueError(
            f"features: expected at least {LEAST_FOR_DISTANCES} samples, for distances between sets; "
            f"received {len(cases)}"
        )
    return shape, cases


def batches(count: int, size: int) -> list[range]:
    """The places of each batch."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def result_json(found: Evaluation) -> dict[str, Any]:
    """Everything that a reader needs beside the pictures: settings, versions, machine, and every estimate."""
    return {
        "settings": found.settings,
        "methods": {
            name: {
                "adapter": method.source,
                "sha256": method.sha256,
                "parameters": method.parameters,
                "draw_s": round(method.draw_s, 2),
                "score_s": round(method.score_s, 2),
                "metrics": {
                    metric: dataclasses.asdict(estimate)
                    for metric, estimate in method.measured.estimates().items()
                },
            }
            for name, method in found.methods.items()
        },
        "versions": versions(),
        "machine": machine(),
    }


def _check_names(adapters: Mapping[str, str]) -> None:
    for name in adapters:
        if name in (BASE, REFERENCE) or not NAME.fullmatch(name):
            raise ValueError(
                f"adapter: expected a name of letters, digits and . + @ - _, other than {BASE} and "
                f"{REFERENCE}; received {name!r}"
            )


def _settings(config: EvaluationConfig, data: str, base: str, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the pictures. Paths are left out: contents count."""
    fields = dataclasses.asdict(config)
    for name in (*_SCORING_FIELDS, "dtype"):
        del fields[name]
    fields["base"], fields["data"] = (
        config.base.path,
        {
            name: value
            for name, value in fields["data"].items()
            if name in ("kind", "condition", "count", "resolution", "split")
        },
    )
    fields |= {"data_sha256": data, "base_sha256": base, "dtype": str(dtype).split(".")[1]}
    settings: dict[str, Any] = json.loads(json.dumps(fields))
    return settings


def _stores(
    config: EvaluationConfig, out: Path, names: list[str], data: str, version: str
) -> dict[str, Store]:
    scoring = {name: getattr(config, name) for name in _SCORING_FIELDS}
    key = json.dumps([scoring, dict(config.data.extractor), data, version], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {name: Store(out / name, digest) for name in names}


def _work(
    config: EvaluationConfig,
    cases: Cases,
    adapters: Mapping[str, Any],
    stores: Mapping[str, Store],
    base: Any,
    scorer: Scorer,
    accelerator: Accelerator,
    show_progress: bool,
) -> None:
    """This process's batches: every method draws the same one before the next."""
    all_batches = batches(len(cases), config.batch_size)
    mine = all_batches[accelerator.process_index :: accelerator.num_processes]
    total = sum(map(len, mine)) * len(adapters)
    is_hidden = not (show_progress and accelerator.is_main_process)
    with tqdm(total=total, unit="picture", disable=is_hidden) as bar:
        for places in mine:
            chosen = None
            for name, store in stores.items():
                if store.scores(places) is None:
                    chosen = chosen or cases[places.start : places.stop]
                    if name == REFERENCE:
                        images = [case.picture for case in chosen]
                    else:
                        images = _drawn(config, store, places, chosen, base, adapters[name])
                    started = time.perf_counter()
                    scores = scorer(images, chosen)
                    scores["score_s"] = np.array(time.perf_counter() - started)
                    store.keep_scores(places, scores)
                bar.update(0 if name == REFERENCE else len(places))
                bar.set_postfix_str(name)


def _drawn(
    config: EvaluationConfig, store: Store, places: range, chosen: Any, base: Any, adapter: Any
) -> list[Image.Image]:
    """A batch's pictures, from the folder where they are there."""
    images = store.images(places)
    if images is None:
        started = time.perf_counter()
        reads_nothing = isinstance(adapter, NexusAdapter) and not config.adapter_reads_prompt
        drawn = draw_batch(
            base,
            adapter,
            chosen,
            config.first + places.start,
            config.sampling,
            config.policy,
            [""] * len(chosen) if reads_nothing else None,
            config.scale,
        )
        images = [Image.fromarray(image) for image in drawn]
        store.keep_images(places, images, time.perf_counter() - started)
    return images


def _collect(
    config: EvaluationConfig,
    cases: Cases,
    stores: Mapping[str, Store],
    sources: Mapping[str, str],
    hashes: Mapping[str, str],
    adapters: Mapping[str, Any],
) -> dict[str, Method]:
    found: dict[str, Method] = {}
    reference: np.ndarray | None = None
    for name, store in stores.items():
        parts = [store.scores(places) for places in batches(len(cases), config.batch_size)]
        whole = [part for part in parts if part is not None]
        assert len(whole) == len(parts)
        columns = {key: np.concatenate([part[key] for part in whole]) for key in whole[0] if key != "score_s"}
        features = columns.pop(FEATURES, None)
        if name == REFERENCE:
            reference = features
        apart = {}
        if features is not None and reference is not None and name != REFERENCE:
            apart = distances(features, reference)
        draw_s = 0.0
        if name != REFERENCE:
            draw_s = sum(store.draw_s(places) for places in batches(len(cases), config.batch_size))
        found[name] = Method(
            name,
            sources.get(name, ""),
            hashes.get(name, ""),
            parameter_count(adapters.get(name)),
            Measured(columns, apart),
            draw_s,
            float(sum(part["score_s"] for part in whole)),
        )
    return found
