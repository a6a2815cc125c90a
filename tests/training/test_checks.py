"""What a training refuses before it loads a model, its dry run refuses, too."""

import os
import warnings

import pytest
from tests.refusals import refused
from tests.training.runs import config, run, weightless

from nexus_adapters.bases.loading import BaseSource, open_base
from nexus_adapters.errors import MISSING
from nexus_adapters.training import distributed
from nexus_adapters.training.checks import check_recipe
from nexus_adapters.training.run import dry_run

# Changes of a recipe -> the key that is refused, and a part of what was received.
REFUSED = {
    "a repository without a name": ({"hub__repo_id": "me/"}, "hub.repo_id", "'me/'"),
    "a repository without a token": ({"hub__repo_id": "me/mine"}, "HF_TOKEN", MISSING),
    "a tracker": ({"log__trackers": ["wandb"]}, "log.trackers", "'wandb'"),
    "the optimizer": ({"training__optimizer": "adamw8bit"}, "training.optimizer", "'adamw8bit'"),
    "the precision": ({"training__mixed_precision": "fp16"}, "training.mixed_precision", "'fp16'"),
    "canny's order": ({"data__extractor": {"low": 300.0}}, "data.extractor.high", "200"),
    "canny's sign": ({"data__extractor": {"low": -1.0}}, "data.extractor.low", "-1.0"),
    "an extractor's type": ({"data__extractor": {"low": "low"}}, "data.extractor.low", "'low'"),
    "an extractor's option": ({"data__extractor": {"lo": 1.0}}, "data.extractor", "'lo'"),
    "of a map that only scores": (
        {"data__condition_column": "map", "data__extractor": {"low": -2.0}},
        "data.extractor.low",
        "-2.0",
    ),
    "sketch's range": (
        {"data__condition": "sketch", "data__extractor": {"sigma": 0.0}},
        "data.extractor.sigma",
        "0.0",
    ),
    "sketch's model": (
        {"data__condition": "sketch", "data__extractor": {"model": "{root}/images/00.png"}},
        "data.extractor.model",
        "00.png",
    ),
    "depth's model": (
        {"data__condition": "depth", "data__extractor": {"model": "{root}/base"}},
        "data.extractor.model",
        "base",
    ),
    "a way to read depth": (
        {"data__condition": "depth", "data__extractor": {"predicts": "height"}},
        "data.extractor.predicts",
        "'height'",
    ),
    "a device": (
        {"data__condition": "depth", "data__extractor": {"device": "abacus"}},
        "data.extractor.device",
        "'abacus'",
    ),
    "a palette": (
        {"data__condition": "segmentation", "data__extractor": {"palette": "mine"}},
        "data.extractor.palette",
        "'mine'",
    ),
    "a model's folder": (
        {"data__condition": "segmentation", "data__extractor": {"model": "./none"}},
        "data.extractor.model",
        "'./none'",
    ),
    "a model's file": (
        {"data__condition": "sketch", "data__extractor": {"model": "{tmp}/none.onnx"}},
        "data.extractor.model",
        "none.onnx",
    ),
    "more steps than there are": (
        {"validation": {"every_steps": 1, "num_inference_steps": 1001}},
        "validation.num_inference_steps",
        "1001",
    ),
    "too long a name": ({"output_dir": "x" * 300}, "output_dir", "too long"),
    "too long a name of a cache": ({"cache__folder": "x" * 300}, "cache.folder", "too long"),
    "a scene's extractor": (
        {"data": {"kind": "scenes", "count": 9, "condition": "depth", "extractor": {"a": 1.0}}},
        "data.extractor",
        "'a'",
    ),
    "the condition": ({"data__condition": "hedges"}, "data.condition", "'hedges'"),
    "the resolution": ({"data__resolution": 60}, "data.resolution", "60"),
    "a file for a cache": ({"cache__folder": "{tmp}/file"}, "cache.folder", "file"),
    "a cache below a file": ({"cache__folder": "{tmp}/file/a/b"}, "cache.folder", "is a file"),
    "a file for an output": ({"output_dir": "{tmp}/file"}, "output_dir", "file"),
    "an output below a file": ({"output_dir": "{tmp}/file/out"}, "output_dir", "is a file"),
    "an output below a broken link": ({"output_dir": "{tmp}/link/out"}, "output_dir", "link"),
    "another folder": ({"output_dir": "{root}/images"}, "output_dir", "images"),
    "no data": ({"data__path": "{tmp}/none"}, "data.path", "none"),
    "no tars": ({"data": {"kind": "tars", "shards": ["{tmp}/none.tar"]}}, "data.shards", "none.tar"),
    "a column": ({"data__caption_column": "title"}, "data.caption_column", "'title'"),
    "too large a batch": ({"training__batch_size": 15}, "training.batch_size", "15"),
    "no base": ({"base__path": "{tmp}/none"}, "base.path", "none"),
    "a base's variant": ({"base__variant": "bf16"}, "base.path", "'bf16'"),
    "a base's revision": ({"base": {"path": "embedded", "revision": "v2"}}, "base.revision", "'v2'"),
    "no start": ({"adapter__start_from": "{tmp}/none"}, "adapter.start_from", "none"),
    "a block": ({"adapter__block": "none"}, "adapter.block", "'none'"),
    "too little to validate": (
        {"data__count": 2, "validation": {"every_steps": 1, "early_stop_patience": 1}},
        "validation.early_stop_patience",
        "2 samples",
    ),
}


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    """Without weights: none are read."""
    return weightless(root / "base", tmp_path_factory.mktemp("checks") / "base")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_dry_run_refuses_it_too(root, base, tmp_path, monkeypatch, kind):
    changes, key, received = REFUSED[kind]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(distributed, "get_available_trackers", lambda: ["tensorboard"])
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    changes = filled(changes, root=root, tmp=tmp_path)
    if "base__path" not in changes and "base" not in changes:
        changes["base__path"] = str(base)
    before = sorted(os.listdir(tmp_path))
    for work in (run, lambda *args, **given: dry_run(config(*args, **given))):
        with refused(key, received):
            work(root, tmp_path / "out", **changes)
        assert sorted(os.listdir(tmp_path)) == before


def filled(value, **folders):
    if isinstance(value, dict):
        return {key: filled(each, **folders) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, **folders) for each in value]
    return value.format(**folders) if isinstance(value, str) else value


@pytest.mark.parametrize(("factor", "is_reported"), [(1, False), (1.5, False), (2, True)])
def test_images_far_above_the_bases_size_are_reported(root, base, tmp_path, factor, is_reported):
    native = open_base(BaseSource(str(base))).native_size()
    given = {"base__path": str(base), "data__resolution": int(factor * native)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_recipe(config(root, tmp_path / "out", **given))
    reported = [str(each.message) for each in caught if "data.resolution" in str(each.message)]
    assert len(reported) == is_reported
    assert all(f"set data.resolution={native}" in line for line in reported)
