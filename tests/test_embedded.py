"""The embedded model: its layout, its precision, and that it never leaves the machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, T2IAdapter
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from tests import tiny
from tests.weights import write_tiny
from transformers.utils import logging as transformers_logging

import nexus_adapters
from nexus_adapters import NexusAdapter, embedded, load_embedded
from nexus_adapters.scenes.caption import caption
from nexus_adapters.scenes.scene import draw_scene


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def weights(tiny_weights, monkeypatch):
    monkeypatch.setattr(embedded, "WEIGHTS", tiny_weights)
    return tiny_weights


def dtypes(pipe):
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [{tensor.dtype for tensor in module.parameters()} for module in modules]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_parts_have_the_dtype_that_was_asked_for(weights, dtype):
    pipe = load_embedded(torch_dtype=dtype)
    assert dtypes(pipe) == [{dtype}] * 4  # vae, text encoder, unet, adapter
    assert dtypes(embedded.load_embedded_base(torch_dtype=dtype)) == [{dtype}] * 3


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


@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_each_variant_comes_in_its_better_form(weights, monkeypatch, variant):
    for method, residual in [(variant, False), (f"{variant}-residual", True)]:
        monkeypatch.setitem(embedded.BETTER_FORM, variant, method)
        adapter = load_embedded(variant=variant).adapter
        assert (adapter.variant, adapter.config.residual) == (variant, residual)


def test_every_method_loads(weights):
    for condition in embedded.METHODS:
        for method in embedded.embedded_methods(condition):
            adapter = embedded.embedded_adapter(method, condition)
            assert isinstance(adapter, T2IAdapter if method == "t2i" else NexusAdapter)
            assert not adapter.training


def test_the_base_is_the_stock_pipeline(weights):
    assert type(embedded.load_embedded_base()) is StableDiffusionPipeline


def test_better_forms_exist():
    for condition in embedded.METHODS:
        assert set(embedded.BETTER_FORM.values()) <= set(embedded.embedded_methods(condition))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: load_embedded("pose"),
            "condition: expected one of canny, depth, segmentation, sketch; received 'pose'",
        ),
        (lambda: load_embedded(variant="Prime"), "variant: expected one of prime, slim; received 'Prime'"),
        (
            lambda: embedded.embedded_adapter("controlnet"),
            "method: expected one of t2i, prime, slim, prime-residual, slim-residual; received 'controlnet'",
        ),
        (
            lambda: embedded.embedded_methods("pose"),
            "condition: expected one of canny, depth, segmentation, sketch; received 'pose'",
        ),
    ],
)
def test_unknown_names_are_told_with_the_known_ones(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


def test_missing_weights_are_named(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    expected = "embedded weights: expected config.json in '.*prime-residual'; received none"
    with pytest.raises(FileNotFoundError, match=expected) as error:
        load_embedded()
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"expected model_index.json in '.*base'"):
        embedded.load_embedded_base()


def test_loading_is_silent_and_leaves_the_bars_as_they_were(weights, capfd):
    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    diffusers_logging.enable_progress_bar()
    load_embedded()
    assert capfd.readouterr() == ("", "")
    assert diffusers_logging.is_progress_bar_enabled()
    assert [library.is_progress_bar_enabled() for library in libraries] == before


def test_no_connection_is_opened(weights):
    """Not even where the Hub is not forbidden: in a process of its own, without the tests' HF_HUB_OFFLINE."""
    code = (
        "import os, socket\nfrom pathlib import Path\n"
        "os.environ.pop('HF_HUB_OFFLINE', None)\n"
        "def refuse(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from nexus_adapters import embedded\n"
        f"embedded.WEIGHTS = Path({json.dumps(str(weights))})\n"
        "embedded.load_embedded()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_config_names_the_machine_it_was_made_on():
    files = [*embedded.WEIGHTS.rglob("*.json")]
    assert len(files) > len(embedded.METHODS)
    assert not [file for file in files if '"_name_or_path": "/' in file.read_text()]


def test_load_embedded_is_public():
    assert nexus_adapters.load_embedded is embedded.load_embedded


@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_the_shipped_weights_load_in_one_dtype(variant):
    pipe = load_embedded(variant=variant)
    assert dtypes(pipe) == [{torch.float32}] * 4
    for method in embedded.embedded_methods("canny"):
        embedded.embedded_adapter(method)


def test_the_shipped_weights_are_small_float16_safetensors():
    files = [file for file in embedded.WEIGHTS.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}
    assert all(file.stat().st_size <= 16 * 2**20 for file in files)
    assert sum(file.stat().st_size for file in weights) <= 48e6
    for file in weights:
        with safe_open(file, framework="pt") as stored:
            assert {stored.get_slice(name).get_dtype() for name in list(stored.keys())} == {"F16"}, file


def test_a_clone_is_small():
    root = Path(__file__).parents[1]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not in a clone")
    files = [root / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 55e6


def test_the_shipped_base_is_a_small_stable_diffusion():
    base = embedded.load_embedded_base()
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
