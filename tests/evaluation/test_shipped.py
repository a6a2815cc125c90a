"""What the shipped weights can do, in small, and that the committed results are theirs."""

import csv
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from tests.weights import needs_base, needs_weights

from nexus_adapters import embedded
from nexus_adapters.embedded import load_embedded_base
from nexus_adapters.evaluation.methods import Sampling, generate, reconstruct
from nexus_adapters.evaluation.scenes import METRICS, load_test_scenes, score_images
from nexus_adapters.metrics.psnr import psnr_db

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@needs_base
def test_the_shipped_autoencoder_keeps_what_is_scored():
    """A part of what benchmarks/canny.py measures on 500."""
    scenes = load_test_scenes(40)
    images = reconstruct(load_embedded_base().vae, scenes)
    psnr = [psnr_db(image, scene.rendering.image) for image, scene in zip(images, scenes, strict=True)]
    scores = {name: values.mean() for name, values in score_images(images, scenes).items()}
    assert np.mean(psnr) >= 28
    assert min(scores["binding_color"], scores["binding_material"], scores["background"]) >= 0.95
    assert scores["edge_f1"] >= 0.85


@needs_weights
def test_the_shipped_prime_reads_the_prompt():
    """The base's text unchanged, the adapter handed another scene's: fewer objects have their color."""
    scenes = load_test_scenes(24)
    base, adapter = load_embedded_base(), embedded.embedded_adapter(embedded.BETTER_FORM["prime"])
    others = [scene.prompt for scene in scenes[1:] + scenes[:1]]
    own, swapped = (
        score_images(generate(base, adapter, scenes, Sampling(steps=10), adapter_prompts=prompts), scenes)
        for prompts in (None, others)
    )
    assert own["binding_color"].mean() > swapped["binding_color"].mean() + 0.1


@needs_weights
def test_the_committed_results_are_of_these_weights(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    settings = json.loads((BENCHMARKS / "results" / "canny.json").read_text())
    folder_hash = import_module("canny").folder_hash
    assert settings["base_sha256"] == folder_hash(embedded.WEIGHTS / "base")
    assert settings["adapters_sha256"] == {
        method: folder_hash(embedded.WEIGHTS / "canny" / method) for method in embedded.METHODS["canny"]
    }


@needs_weights
def test_the_committed_results_are_complete():
    with (BENCHMARKS / "results" / "canny.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["method", "policy", "metric", "value", "low", "high", "n", "seed"]
    nexus = ["prime", "slim", "prime+residual", "slim+residual"]
    cells = {("autoencoder", "none"), ("base", "none"), ("t2i", "positive")}
    cells |= {(method, policy) for method in nexus for policy in ("positive", "per_branch")}
    expected = {(*cell, metric) for cell in cells for metric in METRICS}
    expected |= {(*cell, f"{m}_minus_t2i") for cell in cells - {("t2i", "positive")} for m in METRICS}
    assert {(row["method"], row["policy"], row["metric"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["n"] == "500"
        least = -1 if row["metric"].endswith("_minus_t2i") else 0
        assert least <= float(row["low"]) <= float(row["value"]) <= float(row["high"]) <= 1


def value(method, metric):
    with (BENCHMARKS / "results" / "canny.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if (row["method"], row["policy"], row["metric"]) == (method, "positive", metric):
                return float(row["value"])
    raise AssertionError((method, metric))


@needs_weights
@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_the_form_that_users_get_is_the_better_one(variant):
    """By objects in their color and edges where the map has them, under the default policy."""
    names = {variant: variant, f"{variant}-residual": f"{variant}+residual"}
    found = {stored: value(name, "binding_color") + value(name, "edge_f1") for stored, name in names.items()}
    assert embedded.BETTER_FORM[variant] == max(found, key=found.__getitem__)
