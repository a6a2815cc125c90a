"""The embedded model: its layout, its precision, and that it never uses the network."""

import re
import socket
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, T2IAdapter
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import safe_open
from tests import tiny
from tests.refusals import refused
from tests.weights import NAMES, use_weights, write_tiny
from transformers.utils import logging as transformers_logging

import nexus_adapters
from nexus_adapters import Control, NexusAdapter, load_adapter, load_base, load_embedded
from nexus_adapters.bundled import BUNDLED, weights_folder
from nexus_adapters.embedded import pipeline
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.scene import draw_scene


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def weights(tiny_weights, monkeypatch):
    use_weights(monkeypatch, tiny_weights)
    return tiny_weights


def dtypes(pipe):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [{tensor.dtype for tensor in module.parameters()} for module in modules]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_parts_have_the_dtype_that_was_asked_for(weights, dtype):
    assert dtypes(load_embedded(torch_dtype=dtype)) == [{dtype}] * 4  # vae, text encoder, unet, adapter
    assert dtypes(load_base(dtype=dtype)) == [{dtype}] * 3
    assert {weight.dtype for weight in load_adapter("slim", dtype=dtype).parameters()} == {dtype}


def test_float32_on_the_cpu_is_the_default(weights):
    pipe = load_embedded()
    assert dtypes(pipe) == [{torch.float32}] * 4
    assert pipe.device.type == "cpu"
    assert not any(part.training for part in pipe.components.values() if isinstance(part, torch.nn.Module))


def test_it_generates(weights):
    pipe = tiny.quiet(load_embedded(condition="canny", variant="slim"))
    condition = tiny.image(128, 128)
    images = [
        pipe("a red star", image=condition, num_inference_steps=1, generator=tiny.generators(1)[0]).images[0]
        for _ in range(2)
    ]
    assert images[0].size == (128, 128)
    assert images[0].tobytes() == images[1].tobytes()


def test_a_photo_in_place_of_lines_is_reported(weights):
    photo = Image.linear_gradient("L")
    with pytest.warns(UserWarning, match="looks like a photo"):
        Control(load_embedded("canny").adapter, photo)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for adapter in (load_embedded("depth").adapter, load_adapter("slim")):  # other maps; unknown ones
            Control(adapter, photo)


@pytest.mark.parametrize(
    ("variant", "groups", "residual"),
    [("prime", 1, True), ("slim", 2, True), ("prime-paper", 1, False), ("slim-paper", 2, False)],
)
def test_a_name_means_its_configuration(weights, variant, groups, residual):
    adapter = load_adapter(variant)
    assert (adapter.variant, adapter.config.groups, adapter.config.residual) == (variant, groups, residual)


@pytest.mark.parametrize(("condition", "name"), NAMES)
def test_every_name_loads(weights, condition, name):
    adapter = load_adapter(name, condition)
    assert isinstance(adapter, T2IAdapter if name == "t2i" else NexusAdapter)
    assert getattr(adapter, "variant", "t2i") == name
    assert not adapter.training


@pytest.mark.parametrize(("condition", "name"), [("canny", "prime-paper"), ("sketch", "slim")])
def test_the_pipeline_has_the_adapter_of_that_name(weights, condition, name):
    loaded, expected = load_embedded(condition, name).adapter, load_adapter(name, condition)
    assert loaded.variant == name
    tensors = loaded.state_dict()
    assert all(torch.equal(tensors[key], value) for key, value in expected.state_dict().items())


def test_the_base_is_the_stock_pipeline(weights):
    assert type(load_base()) is type(load_base("embedded")) is StableDiffusionPipeline


def test_every_map_has_prime_and_slim():
    for names in BUNDLED["embedded"].adapters.values():
        assert {"prime", "slim"} <= set(names)


@pytest.mark.parametrize(
    ("call", "name", "received", "known"),
    [
        (lambda: load_embedded("pose"), "condition", "'pose'", "canny, depth, segmentation, sketch"),
        (
            lambda: load_embedded(variant="Prime"),
            "variant",
            "'Prime'",
            "prime, slim, prime-paper, slim-paper for canny",
        ),
        (lambda: load_embedded(variant="t2i"), "variant", "'t2i'", "prime, slim"),
        (lambda: load_embedded("depth", "prime-paper"), "variant", "'prime-paper'", "prime, slim for depth"),
        (lambda: load_embedded(world="photos"), "world", "'photos'", "scenes"),
        (lambda: load_adapter("prime", "pose"), "condition", "'pose'", "canny, depth, segmentation, sketch"),
        (lambda: load_adapter("t2i", "depth"), "adapter", "'t2i'", "prime, slim for depth"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(call, name, received, known):
    with refused(name, received, expected=known):
        call()


def test_loading_is_silent_and_leaves_the_bars_as_they_were(weights, capfd):
    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    diffusers_logging.enable_progress_bar()
    load_embedded()
    assert capfd.readouterr() == ("", "")
    assert diffusers_logging.is_progress_bar_enabled()
    assert [library.is_progress_bar_enabled() for library in libraries] == before


def test_no_connection_is_opened(weights, monkeypatch):
    """Not even where the Hub may be used: without the tests' HF_HUB_OFFLINE."""
    opened = []

    def refuse(*arguments, **_):
        opened.append(arguments)
        raise OSError("no connections")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_embedded()
    assert opened == []
    with suppress(Exception):
        huggingface_hub.HfApi().model_info("owner/name")
    assert opened  # so that a connection would have been noticed


def test_load_embedded_is_public():
    assert nexus_adapters.load_embedded is pipeline.load_embedded


# The weights that nexus-adapters-embedded ships


def test_no_config_names_the_machine_it_was_made_on():
    files = [*weights_folder().rglob("*.json")]
    assert len(files) > len(NAMES)
    assert not [file for file in files if '"_name_or_path": "/' in file.read_text()]


@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_the_shipped_weights_load_in_one_dtype(variant):
    assert dtypes(load_embedded(variant=variant)) == [{torch.float32}] * 4


def test_the_shipped_weights_are_small_float16_safetensors():
    files = [file for file in weights_folder().rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}
    assert all(file.stat().st_size <= 16 * 2**20 for file in files)
    assert 0 < sum(file.stat().st_size for file in weights) <= 48e6
    for file in weights:
        with safe_open(file, framework="pt") as stored:
            assert {stored.get_slice(name).get_dtype() for name in list(stored.keys())} == {"F16"}, file


def test_a_clone_is_small():
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not in a clone")
    files = [root / name for name in listed.stdout.decode().split("\0") if name]
    assert 48e6 < sum(file.stat().st_size for file in files if file.is_file()) <= 85e6


def test_the_shipped_base_is_a_small_stable_diffusion():
    base = load_base()
    assert sum(weight.numel() for weight in base.unet.parameters()) <= 8e6
    assert list(base.unet.config.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert list(base.unet.config.up_block_types) == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert base.vae_scale_factor == 8
    assert 4 <= base.vae.config.latent_channels <= 16
    assert base.tokenizer.model_max_length == 77
    for seed in range(50):
        words = re.findall(r"\w+|[^\w\s]", caption(draw_scene(seed)))
        assert (
            len(base.tokenizer(" ".join(words)).input_ids) == len(words) + 2
        )  # a token a word, and two ends
