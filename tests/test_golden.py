"""Files that an earlier version saved, or wrote for others to read, load and give what they gave.

The features in features.safetensors are float32 results, kept in half precision.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file
from tests.refusals import refused

from nexus_adapters import NexusAdapter, StableDiffusionNexusPipeline, load_adapter

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = ("prime", "slim", "prime-paper", "slim-paper", "prime-fading")
# What the features are called -> what is loaded.
SOURCES = {
    **{name: GOLDEN / "adapters" / name for name in ADAPTERS},
    "single file": GOLDEN / "slim.safetensors",
    "t2i": GOLDEN / "t2i",
    "t2i-converted": GOLDEN / "t2i-converted",
    "pipeline": GOLDEN / "pipeline",
}
FEATURES = {name: "slim" if name == "single file" else name for name in SOURCES}
VARIANTS = {
    "prime": "prime",
    "slim": "slim",
    "prime-paper": "prime-paper",
    "slim-paper": "slim-paper",
    "prime-fading": "prime",
    "single file": "slim",
    "t2i-converted": "prime",
}


@pytest.fixture(scope="module")
def inputs():
    return load_file(GOLDEN / "inputs.safetensors")


@pytest.fixture(scope="module")
def stored():
    return load_file(GOLDEN / "features.safetensors")


def check_features(adapter, name, inputs, stored):
    given = [inputs["condition"], inputs["prompt_embeds"]]
    with torch.no_grad():
        found = adapter(*given[: 1 if isinstance(adapter, T2IAdapter) else 2])
    expected = {key: value for key, value in stored.items() if key.rpartition(".")[0] == FEATURES[name]}
    assert len(found) == len(expected) == 4
    for level, feature in enumerate(found):
        # Half precision has eleven bits, and its least step is 2 ** -24.
        kept = expected[f"{FEATURES[name]}.{level}"].float()
        torch.testing.assert_close(feature, kept, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("name", SOURCES)
def test_it_loads_and_gives_the_features_that_it_gave(name, inputs, stored):
    adapter = load_adapter(SOURCES[name])
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float32}
    assert not adapter.training
    check_features(adapter, name, inputs, stored)
    assert getattr(adapter, "variant", None) == VARIANTS.get(name, getattr(adapter, "variant", None))


def test_features_of_different_adapters_differ(stored):
    """So that none of them can stand in for another; a converted T2I-Adapter gives what it gave before."""
    names = set(FEATURES.values()) - {"t2i-converted"}
    assert len({stored[f"{name}.0"].numpy().tobytes() for name in names}) == len(names)


@pytest.mark.parametrize("name", [*ADAPTERS, "t2i-converted"])
def test_a_folder_loads_by_from_pretrained(name, inputs, stored):
    check_features(NexusAdapter.from_pretrained(SOURCES[name]), name, inputs, stored)


def test_diffusers_t2i_adapter_loads_by_its_own_class(inputs, stored):
    check_features(T2IAdapter.from_pretrained(SOURCES["t2i"]).eval(), "t2i", inputs, stored)


def test_a_saved_pipeline_loads_by_from_pretrained(inputs, stored):
    pipe = StableDiffusionNexusPipeline.from_pretrained(GOLDEN / "pipeline")
    check_features(pipe.adapter, "pipeline", inputs, stored)


def test_an_adapters_own_exponent_is_kept():
    exponents = {name: load_adapter(SOURCES[name]).config["noise_exponent"] for name in ADAPTERS}
    assert exponents == {**dict.fromkeys(ADAPTERS, 0.0), "prime-fading": 0.5}


@pytest.mark.parametrize("name", [*ADAPTERS, "t2i-converted"])
def test_configs_from_before_blocks_and_format_versions_mean_the_first(name):
    config = json.loads((SOURCES[name] / "config.json").read_text())
    assert not {"block", "block_options", "format_version"} & set(config)
    loaded = load_adapter(SOURCES[name]).config
    assert (loaded["block"], loaded["block_options"]) == ("paper", {})


def test_a_config_of_a_newer_format_is_refused(tmp_path):
    folder = shutil.copytree(SOURCES["prime"], tmp_path / "prime")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 2}))
    with refused("adapter", "format_version: expected at most 1, got 2", hint="upgrade"):
        load_adapter(folder)
    with refused("format_version", "2", hint="upgrade"):
        NexusAdapter.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    assert load_adapter(folder).variant == "prime"
