"""What the shipped weights can do, in small, and that the committed results are theirs."""

import csv
import hashlib
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import BUNDLED, WEIGHTS
from nexus_adapters.embedded.held_out import METRICS, load_test_scenes, score_images
from nexus_adapters.embedded.pipeline import EMBEDDED_GUIDANCE
from nexus_adapters.evaluation.generation import Sampling, generate, reconstruct
from nexus_adapters.methods import GenerationSettings
from nexus_adapters.metrics.psnr import psnr_db

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ADAPTERS = BUNDLED["embedded"].adapters
VARIANTS = ("prime", "slim")


def test_the_shipped_autoencoder_keeps_what_is_scored():
    """A part of what benchmarks/canny.py measures on 500."""
    scenes = load_test_scenes(40)
    images = reconstruct(load_base().vae, scenes)
    psnr = [psnr_db(image, scene.rendering.image) for image, scene in zip(images, scenes, strict=True)]
    scores = {name: values.mean() for name, values in score_images(images, scenes).items()}
    assert np.mean(psnr) >= 28
    assert min(scores["binding_color"], scores["binding_material"], scores["background"]) >= 0.95
    assert scores["edge_f1"] >= 0.85


@pytest.mark.parametrize(
    ("condition", "least"), [("canny", 0.1), ("sketch", 0.05), ("segmentation", 0.1), ("depth", 0.02)]
)
def test_the_shipped_prime_reads_the_prompt(condition, least):
    """The base's text unchanged, the adapter handed another scene's: fewer objects have their color."""
    scenes = load_test_scenes(24, condition=condition)
    base = load_base()
    adapter = load_adapter("prime", condition)
    others = [scene.prompt for scene in scenes[1:] + scenes[:1]]
    own, swapped = (
        score_images(
            generate(base, adapter, scenes, Sampling(steps=10), GenerationSettings(adapter_prompts=prompts)),
            scenes,
        )
        for prompts in (None, others)
    )
    assert own["binding_color"].mean() > swapped["binding_color"].mean() + least


def result(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def rows_of(name):
    with (BENCHMARKS / "results" / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def row(name, method, metric, policy="positive"):
    (found,) = (
        row
        for row in rows_of(name)
        if (row["method"], row["policy"], row["metric"]) == (method, policy, metric)
    )
    return {key: float(found[key]) for key in ("value", "low", "high")}


def label(variant):
    """What the tables call the adapter that users get by this name."""
    return f"{variant}+residual"


def test_the_committed_results_are_of_these_weights(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    settings = result("canny")
    folder_hash = import_module("machine").folder_hash
    assert settings["base_sha256"] == folder_hash(BUNDLED["embedded"].folder)
    assert settings["adapters_sha256"] == {
        folder.name: folder_hash(folder) for folder in ADAPTERS["canny"].values()
    }
    for name in ("guidance", "balances", "fading", "ways"):
        digests = result(name)["settings"]["weights_sha256"]
        assert digests == {part: folder_hash(WEIGHTS / part) for part in digests}
        assert set(digests) == {"base", *(ADAPTERS if name == "ways" else ["canny"])}


def test_the_committed_results_are_of_the_shipped_settings():
    sampling = result("canny")["sampling"]
    assert (sampling["steps"], sampling["guidance_scale"], sampling["seed"]) == (20, EMBEDDED_GUIDANCE, 0)
    assert result("guidance")["measured"]["guidance_scale"] == EMBEDDED_GUIDANCE


def test_the_shipped_adapters_are_those_that_were_chosen(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    folder_hash, chosen = import_module("machine").folder_hash, result("chosen")
    assert chosen["measured"]["form"] == {variant: ADAPTERS["canny"][variant].name for variant in VARIANTS}
    assert chosen["settings"]["package_sha256"] == {
        condition: {folder.name: folder_hash(folder) for folder in adapters.values()}
        for condition, adapters in ADAPTERS.items()
    }


@pytest.mark.parametrize("condition", ADAPTERS)
def test_a_name_is_its_configuration_and_the_residual_form_has_eight_heads(condition):
    for name in ADAPTERS[condition]:
        adapter = load_adapter(name, condition)
        if name == "t2i":
            continue
        assert adapter.variant == name
        if name in VARIANTS:
            config = adapter.config
            assert (config.residual, config.heads, config.head_width) == (True, 8, 8)


def test_the_committed_tables_belong_together():
    digests = result("canny")["tables_sha256"]
    assert set(digests) == {"canny.csv", "canny_text.csv", "canny.md"}
    for name, digest in digests.items():
        assert hashlib.sha256((BENCHMARKS / "results" / name).read_bytes()).hexdigest() == digest


def test_the_committed_results_are_complete():
    rows = rows_of("canny.csv")
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


def test_the_autoencoder_is_good_enough_on_all_test_scenes():
    assert result("canny")["autoencoder_psnr_db"] >= 28
    for metric in ("binding_color", "binding_material", "background"):
        assert row("canny.csv", "autoencoder", metric, "none")["value"] >= 0.95
    assert row("canny.csv", "autoencoder", "edge_f1", "none")["value"] >= 0.85


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_form_that_users_get_is_ahead_of_t2i_in_colors(variant):
    assert row("canny.csv", label(variant), "binding_color_minus_t2i")["low"] > 0


@pytest.mark.xfail(strict=True, reason="81.5 %: docs/decisions.md says what was looked at")
def test_prime_reaches_its_goal_in_colors():
    assert row("canny.csv", label("prime"), "binding_color")["value"] >= 0.85


def test_prime_reaches_its_goal_in_edges():
    assert row("canny.csv", label("prime"), "edge_f1")["value"] >= 0.75


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_prompt_for_the_adapter_alone_costs_colors(variant):
    assert row("canny_text.csv", label(variant), "binding_color_minus_own_prompt")["high"] < 0
