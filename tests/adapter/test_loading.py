"""Saving and loading as a diffusers model; loading accepts exactly the tensors of the config."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.configuration_utils import register_to_config
from diffusers.utils import hub_utils
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tests.cli.test_info import CONTROLNET
from tests.refusals import refused
from torch import Tensor

import nexus_adapters
from nexus_adapters.adapter.arguments import ARGUMENTS, VARIANTS
from nexus_adapters.adapter.formats import export_file
from nexus_adapters.adapter.layout import tensor_shapes
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.methods import load_adapter

Build = Callable[..., NexusAdapter]
Inputs = Callable[..., tuple[Tensor, Tensor]]
GEOMETRY = {"channels": (8, 16, 16), "pools": (False, True, True), "unshuffle": 4, "text_width": 12}
PATH = "pretrained_model_name_or_path"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def settings(adapter: NexusAdapter) -> dict[str, Any]:
    return {name: value for name, value in adapter.config.items() if not name.startswith("_")}


def assert_same(loaded: NexusAdapter, saved: NexusAdapter) -> None:
    assert settings(loaded) == settings(saved)
    assert type(loaded.config.channels) is type(saved.config.channels) is tuple
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert not loaded.training


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 2},
        {"noise_exponent": 0.5},
        {"residual": True, "zero_init": True},
        {"pools": [0, 2, False]},
    ],
    ids=str,
)
def test_save_and_load_are_exact(
    tiny: Build, tmp_path: Path, low_cpu_mem_usage: bool, changes: dict[str, Any]
) -> None:
    adapter = tiny(**changes)
    with torch.no_grad():  # what was trained away from zero must come back, zero_init or not
        adapter.adapter.body[0].cross_attention.to_out[0].bias.add_(1)
    adapter.save_pretrained(tmp_path)
    assert_same(NexusAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage), adapter)


def test_config_builds_the_same_adapter(tiny: Build) -> None:
    adapter = tiny(groups=2, channels=[8, 16, 16])
    assert settings(NexusAdapter.from_config(adapter.config)) == settings(adapter)


def test_dtype_and_subfolder(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = NexusAdapter.from_pretrained(tmp_path, subfolder="adapter", torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.state_dict(), adapter.to(torch.bfloat16).state_dict(), rtol=0, atol=0)


def test_file_variant(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny().to(torch.float16)
    adapter.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_same(NexusAdapter.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16), adapter)
    with refused(PATH, f"'{tmp_path}'", expected="diffusion_pytorch_model.safetensors"):
        NexusAdapter.from_pretrained(tmp_path)
    with refused(PATH, f"'{tmp_path}'", expected="variant 'bf16'"):
        NexusAdapter.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_shards(tiny: Build, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(NexusAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage), adapter)


@pytest.mark.full  # the cost is that of importing torch and diffusers
def test_fresh_process(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path)
    program = (
        "import sys; from nexus_adapters.adapter.model import NexusAdapter;"
        "a = NexusAdapter.from_pretrained(sys.argv[1]);"
        "print(type(a).__module__, a.variant, sum(p.double().sum().item() for p in a.parameters()))"
    )
    source = str(Path(next(iter(nexus_adapters.__path__))).parent)
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    module, variant, total = result.stdout.split()
    assert (module, variant) == ("nexus_adapters", "prime-paper")
    assert float(total) == sum(p.double().sum().item() for p in adapter.parameters())


def test_push_to_hub_uploads_what_loads(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(folder_path: str, **_: Any) -> None:
        shutil.copytree(folder_path, tmp_path / "hub")

    adapter = tiny()
    monkeypatch.setattr(hub_utils, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub_utils, "upload_folder", keep)
    adapter.push_to_hub("someone/adapter")
    assert_same(NexusAdapter.from_pretrained(tmp_path / "hub"), adapter)


def test_loading_info_on_request(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    loaded, info = NexusAdapter.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, NexusAdapter)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["adapter.conv_in.bias"], tensors["adapter.body.1.norm1.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.body.3.norm1.weight"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["adapter.conv_in.bias"] = torch.zeros(5)
    tensors["adapter.body.2.norm1.bias"] = torch.zeros(2, 8)


DAMAGE = [
    (drop, "(missing: adapter.body.1.norm1.weight, adapter.conv_in.bias)"),
    (add, "(unexpected: adapter.body.3.norm1.weight)"),
    (
        reshape,
        "(misshapen: adapter.body.2.norm1.bias (2, 8), expected (16,), "
        "adapter.conv_in.bias (5,), expected (8,))",
    ),
]


@pytest.mark.parametrize(("damage", "received"), DAMAGE, ids=["missing", "surplus", "misshapen"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_cpu_mem_usage": False},
        {"torch_dtype": torch.float16},
        {"device_map": "cpu"},
        {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False},
        {"output_loading_info": True},
    ],
    ids=str,
)
def test_damaged_weights_are_refused_by_name(
    tiny: Build,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    received: str,
    options: dict[str, Any],
) -> None:
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with refused(PATH, f"'{tmp_path}' {received}"):
        NexusAdapter.from_pretrained(tmp_path, **options)


def test_weights_put_aside_by_a_device_map_are_loaded_too(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "saved")
    stages = {f"adapter.body.{index}": "cpu" for index in range(len(tiny().adapter.body))}
    places = {"adapter.conv_in": "cpu", **stages, "adapter.body.1": "disk"}
    loaded = NexusAdapter.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "aside")
    )
    condition, text = torch.rand(1, 3, 32, 32), torch.randn(1, 4, tiny().config.text_width)
    expected = NexusAdapter.from_pretrained(tmp_path / "saved")(condition, text)
    for found, feature in zip(loaded(condition, text), expected, strict=True):
        assert torch.equal(found, feature)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("in_index", [True, False])
@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_damaged_shards_are_refused(
    tiny: Build, tmp_path: Path, kind: str, in_index: bool, low_cpu_mem_usage: bool
) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    index_file = tmp_path / f"{WEIGHTS}.index.json"
    index = json.loads(index_file.read_text())
    weight_map, name = index["weight_map"], "adapter.conv_in.bias"
    shard = tmp_path / weight_map[name]
    tensors = load_file(shard)
    if kind == "missing":
        del tensors[name]
        weight_map |= {} if in_index else {name: None}
    else:
        name = "adapter.conv_in.scale"
        tensors[name] = torch.zeros(8)
        weight_map |= {name: shard.name} if in_index else {}
    save_file(tensors, shard)
    index_file.write_text(json.dumps(index | {"weight_map": {k: v for k, v in weight_map.items() if v}}))
    with refused(PATH, f"({kind}: {name})"):
        NexusAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_weights_of_another_variant_are_refused(tiny: Build, tmp_path: Path) -> None:
    tiny(groups=2).save_pretrained(tmp_path)
    tiny().save_config(tmp_path)
    for found in (
        "missing: adapter.body.0.resnets.0.block1.bias",
        "unexpected: adapter.body.0.resnets.0.block1.gwc",
    ):
        with refused(PATH, found):
            NexusAdapter.from_pretrained(tmp_path)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    T2IAdapter(channels=[8, 8], downscale_factor=2).save_pretrained(tmp_path)
    with refused("config", "the config of a T2IAdapter (missing: pools", hint="`nexus convert`"):
        NexusAdapter.from_pretrained(tmp_path)


def test_bad_value_in_the_config_is_named(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pools": [False]}))
    with refused("pools", "[False]", expected="3 entries"):
        NexusAdapter.from_pretrained(tmp_path)


def test_absent_files(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):  # diffusers' own
        NexusAdapter.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    with refused(PATH, f"'{tmp_path}'", expected="config.json"):
        NexusAdapter.from_pretrained(tmp_path)
    tiny().save_config(tmp_path)
    with refused(PATH, f"'{tmp_path}'", expected="diffusion_pytorch_model.safetensors"):
        NexusAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ['"someone/else"', '"."', "[]", "3", "null", "[" * 5000])
def test_a_config_that_is_no_object_is_not_followed(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """diffusers takes text for a path or Hub id, whatever `local_files_only` says."""
    asked: list[object] = []
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", lambda *a, **_: asked.append(a))
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with refused(PATH, "config.json'"):
        NexusAdapter.from_pretrained(tmp_path, local_files_only=True)
    with refused("config", "a str"):
        NexusAdapter.from_config("someone/else")
    assert not asked


def with_weights(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """The first weights changed; without the hash of those before."""
    tensors = load_file(folder / WEIGHTS)
    tensors["adapter.conv_in.bias"] = change(tensors["adapter.conv_in.bias"])
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "kind",
    [
        torch.int8,
        torch.int64,
        torch.uint8,
        torch.bool,
        pytest.param(
            torch.complex64,
            marks=pytest.mark.skipif(
                Version(safetensors.__version__) < Version("0.7"), reason="safetensors cannot write it"
            ),
        ),
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    tiny: Build, tmp_path: Path, kind: torch.dtype, form: str
) -> None:
    tiny().save_pretrained(tmp_path)
    with_weights(tmp_path, lambda tensor: torch.ones_like(tensor).to(kind))
    if form == "pickle":
        torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "diffusion_pytorch_model.bin")
        (tmp_path / WEIGHTS).unlink()
    else:
        with refused(PATH, "adapter.conv_in.bias is", expected="float16 or bfloat16"):
            NexusAdapter.from_pretrained(tmp_path)
    with refused("adapter", "adapter.conv_in.bias is", expected="float16 or bfloat16"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_of_floating_point_are_read(tiny: Build, tmp_path: Path, kind: torch.dtype) -> None:
    tiny().to(kind).save_pretrained(tmp_path)
    assert NexusAdapter.from_pretrained(tmp_path, torch_dtype=kind).dtype == kind
    assert load_adapter(tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": [8, 2**40, 16]},
        {"unshuffle": 2**40},
        {"heads": 2**62},
        {"text_width": 2**62},
        {"channels": [8] * 5_000, "pools": [0] * 5_000},
        {"pools": [0, 2**40, 1]},
        {"noise_exponent": 2**62 * 10**300},
        {"channels": "8"},
        {"block_options": {"deep": 30 * [1]}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization_config": "int8"},
        {"_class_name": ["NexusAdapter"]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_any_numbers_in_a_config_are_refused_before_anything_is_built(
    tiny: Build, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))

    def build(*_: object, **__: object) -> None:
        raise AssertionError("built")

    if "block_options" not in changes:
        monkeypatch.setattr("nexus_adapters.adapter.model.Trunk.__init__", build)
    for read in (NexusAdapter.from_pretrained, load_adapter):
        with pytest.raises(InvalidArgument) as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 2**40},
        {"transformer_layers_per_block": [1, [2**40]]},
        {"transformer_layers_per_block": 2**40},
    ],
    ids=str,
)
def test_no_number_of_layers_in_a_controlnets_config_is_built(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    ControlNetModel(**CONTROLNET).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with refused("adapter", str(2**40), expected=str(*changes)):
        load_adapter(tmp_path)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_single_file_has_a_loader_of_its_own(tiny: Build, tmp_path: Path, groups: int) -> None:
    adapter, file = tiny(groups=groups), tmp_path / "one.safetensors"
    export_file(adapter.half(), file)
    assert_same(NexusAdapter.from_single_file(file), adapter)
    assert NexusAdapter.from_single_file(str(file), torch_dtype=torch.float32).dtype == torch.float32
    with refused(PATH, f"'{file}'", hint="NexusAdapter.from_single_file"):
        NexusAdapter.from_pretrained(file)
    with refused("file", "gone.safetensors'"):
        NexusAdapter.from_single_file(tmp_path / "gone.safetensors")
    save_file(adapter.state_dict(), file)
    with refused("file", f"'{file}'", hint="nexus convert"):
        NexusAdapter.from_single_file(file)


LAYOUTS: list[dict[str, Any]] = [
    *VARIANTS.values(),
    {"groups": 4, "in_channels": 1},
    {"channels": (16, 16, 8), "heads": 3, "head_width": 5},
    {"channels": (8,), "pools": (0,), "unshuffle": 16, "text_width": 7},
    {"channels": (8, 8, 24, 24, 16), "pools": (0, 2, 0, 1, 3), "groups": 8},
    {"residual": True, "zero_init": True, "noise_exponent": 1.5},
]
SDXL = {"channels": (320, 640, 1280, 1280), "pools": (0, 0, 1, 0), "unshuffle": 16, "text_width": 2048}


def test_the_papers_tensors_are_known_without_building(tiny: Build) -> None:
    """Every argument is among those changed: a new one belongs here, too."""
    varied = {name for changes in LAYOUTS for name in changes}
    assert varied | {"block", "block_options"} == set(ARGUMENTS)
    with torch.device("meta"):
        adapters = [tiny(**changes) for changes in LAYOUTS]
        adapters += [NexusAdapter.for_geometry(SDXL, variant) for variant in VARIANTS]
    for adapter in adapters:
        built = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
        assert tensor_shapes(adapter.config) == built


class Scaled(NexusAdapter):
    """An adapter of a user's: an argument of its own, the others handed on."""

    @register_to_config
    def __init__(self, *, gain: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = gain

    def forward(self, condition: Tensor, prompt_embeds: Tensor) -> list[Tensor]:
        return [self.gain * feature for feature in super().forward(condition, prompt_embeds)]


class Renamed(NexusAdapter):
    """A subclass whose constructor is the same."""


def test_a_subclass_loads_what_it_saved(tiny: Build, inputs: Inputs, tmp_path: Path) -> None:
    adapter = Scaled.for_geometry(GEOMETRY, "slim", gain=3.0)
    assert type(adapter) is Scaled
    adapter.save_pretrained(tmp_path / "scaled")
    loaded = Scaled.from_pretrained(tmp_path / "scaled")
    assert type(loaded) is Scaled
    assert (loaded.gain, loaded.config["gain"]) == (3.0, 3.0)
    assert_same(loaded, adapter.eval())
    torch.testing.assert_close(loaded(*inputs()), adapter(*inputs()), rtol=0, atol=0)
    assert settings(Scaled.from_config(adapter.config)) == settings(adapter)

    Renamed.for_geometry(GEOMETRY).save_pretrained(tmp_path / "renamed")
    assert type(Renamed.from_pretrained(tmp_path / "renamed")) is Renamed


def test_a_subclass_loads_what_its_base_saved_but_not_the_other_way_round(
    tiny: Build, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path / "base")
    loaded = Scaled.from_pretrained(tmp_path / "base")
    assert (type(loaded), loaded.gain) == (Scaled, 2.0)
    for kind in (Scaled, Renamed):
        kind.for_geometry(GEOMETRY).save_pretrained(tmp_path / kind.__name__)
        with refused("config", f"a {kind.__name__}", hint=f"{kind.__name__}.from_pretrained"):
            NexusAdapter.from_pretrained(tmp_path / kind.__name__)
    with refused("config", "(unknown: more)"):
        Scaled.from_config({**loaded.config, "more": 1})
    with refused("overrides", "more", expected="gain"):
        Scaled.for_geometry(GEOMETRY, more=1)


def test_the_format_has_a_version(tiny: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1
    assert settings(NexusAdapter.from_pretrained(tmp_path)) == settings(adapter)
    assert "format_version" not in adapter.config
    assert "format_version" not in caplog.text  # diffusers warns of keys that it does not know
    newer = config | {"format_version": 2, "more": "that only newer versions know"}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    with refused("format_version", 2, hint="upgrade"):
        NexusAdapter.from_pretrained(tmp_path)


def test_a_config_from_before_blocks_is_of_the_papers(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.pop("block"), config.pop("block_options"), config.pop("format_version")) == (
        "paper",
        {},
        1,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(NexusAdapter.from_pretrained(tmp_path), tiny())
