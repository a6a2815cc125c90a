"""`load_adapter`: every kind of adapter, wherever it lies, and what is none."""

import json
import shutil

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused

from nexus_adapters import NexusAdapter, load_adapter
from nexus_adapters.adapter.formats import export_file
from nexus_adapters.methods import METHODS, find_method, known_methods, method_of
from nexus_adapters.pipelines import StableDiffusionNexusPipeline
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run_identity import differing, identity

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {
    "prime": NexusAdapter,
    "slim": NexusAdapter,
    "prime-paper": NexusAdapter,
    "slim-paper": NexusAdapter,
    "t2i": T2IAdapter,
    "controlnet": ControlNetModel,
    "controlnet-xs": ControlNetXSAdapter,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each method, with weights of its own."""
    root = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate(KINDS):
        torch.manual_seed(200 + seed)
        build(name, **({"size_ratio": 1.0} if name == "controlnet-xs" else {})).save_pretrained(root / name)
    return root


def same(adapter, tensors):
    ours = adapter.state_dict()
    return ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in ours)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_every_method(saved, name):
    adapter = load_adapter(saved / name)
    assert isinstance(adapter, KINDS[name])
    assert method_of(adapter) is find_method(name)
    assert not adapter.training
    assert same(adapter, load_file(saved / name / WEIGHTS))
    half = load_adapter(str(saved / name), dtype=torch.float16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}


def test_every_method_is_in_the_list():
    assert list(KINDS) == list(METHODS)


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_file_of_any_folder(saved, tmp_path, name):
    """That very file, of the class that the config next to it names."""
    folder = shutil.copytree(saved / name, tmp_path / "folder")
    tensors = {key: tensor + 1 for key, tensor in load_file(folder / WEIGHTS).items()}
    other = folder / "diffusion_pytorch_model.other.safetensors"
    save_file(tensors, other)
    torch.save(tensors, pickled := folder / "diffusion_pytorch_model.bin")
    before = torch.random.get_rng_state()
    for file, expected in ((folder / WEIGHTS, load_file(saved / name / WEIGHTS)), (other, tensors)):
        adapter = load_adapter(file)
        assert type(adapter) is type(load_adapter(folder))
        assert method_of(adapter) is find_method(name)
        assert same(adapter, expected)
        assert not adapter.training
    assert same(load_adapter(pickled), tensors)
    assert torch.equal(torch.random.get_rng_state(), before)
    lost = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, other)
    with refused("adapter", lost):
        load_adapter(other)


def test_the_weights_file_of_a_subclass(tmp_path):
    torch.manual_seed(7)
    made = Own(**dict(build("slim").config))
    made.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / WEIGHTS):
        adapter = load_adapter(source)
        assert type(adapter) is Own
        assert same(adapter, made.state_dict())


class Own(NexusAdapter):
    """A subclass of a user's own."""


@pytest.mark.parametrize("name", ["prime", "slim-paper", "t2i"])
def test_the_weights_file_of_a_folder(saved, name, tmp_path):
    """It is what the config next to it says."""
    torch.manual_seed(9)
    options = {"noise_exponent": 0.5} | ({} if name == "t2i" else {"heads": 2, "head_width": 3})
    build(name, **options).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path / WEIGHTS)
    assert method_of(adapter) is find_method(name)
    for key, value in options.items():
        assert adapter.config[key] == value
    assert same(adapter, load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("name", ["prime", "slim", "prime-paper", "slim-paper"])
def test_a_file_that_was_exported(saved, name, tmp_path):
    export_file(NexusAdapter.from_pretrained(saved / name), tmp_path / "adapter.safetensors")
    adapter = load_adapter(tmp_path / "adapter.safetensors")
    assert adapter.variant == name
    assert same(adapter, load_file(saved / name / WEIGHTS))


def test_the_adapter_of_a_saved_pipeline(saved, tmp_path):
    components = tiny.sd15_components(adapter=NexusAdapter.from_pretrained(saved / "slim"))
    pipe = StableDiffusionNexusPipeline(**components, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "pipe")
    assert same(load_adapter(tmp_path / "pipe"), load_file(saved / "slim" / WEIGHTS))


def test_another_models_folder(saved, tmp_path):
    tiny.unet().save_pretrained(tmp_path)
    with refused("adapter", "a UNet2DConditionModel", expected="Nexus Prime") as caught:
        load_adapter(tmp_path)
    for label in ("Nexus Slim", "T2I-Adapter", "ControlNet", "ControlNet-XS"):
        assert label in caught.value.expected
    assert "import MODULE" in caught.value.hint  # or of a method that is not imported
    with refused("adapter", "a UNet2DConditionModel", expected="ControlNet-XS"):
        method_of(tiny.unet())


def damaged(folder, damage):
    """The name of the tensor that is no longer as it was."""
    tensors = load_file(folder / WEIGHTS)
    first = next(key for key, tensor in tensors.items() if tensor.ndim > 1)
    if damage == "missing":
        del tensors[first]
    if damage == "misshapen":
        tensors[first] = tensors[first][:1].clone()
    if damage == "surplus":
        tensors["surplus"] = torch.zeros(2)
    if damage == "no numbers":
        tensors[first][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    return "surplus" if damage == "surplus" else first


@pytest.mark.parametrize("name", ["prime", "t2i", "controlnet", "controlnet-xs"])
@pytest.mark.parametrize("damage", ["missing", "misshapen", "surplus", "no numbers"])
def test_damaged_weights(saved, tmp_path, name, damage):
    folder = shutil.copytree(saved / name, tmp_path / "damaged")
    tensor = damaged(folder, damage)
    with refused("adapter", str(folder)) as caught:
        load_adapter(folder)
    assert tensor in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_config_is_not_blamed_on_another_configuration(saved, tmp_path):
    folder = shutil.copytree(saved / "prime", tmp_path / "prime")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"groups": 0}))
    with refused("adapter", "groups: expected a positive integer", expected="NexusAdapter"):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["prime", "t2i", "controlnet", "controlnet-xs"])
def test_half_a_file(saved, tmp_path, name):
    folder = shutil.copytree(saved / name, tmp_path / "cut")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    with refused("adapter", str(folder)) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)


def test_a_broken_package_stands_in_nobodys_way(saved, install):
    install("nexus_adapters.methods", broken="nexus_adapters_has_no_such_module:method")
    assert "broken" in METHODS
    assert "broken" not in {method.name for method in known_methods()}
    for name in KINDS:
        assert method_of(load_adapter(saved / name)) is find_method(name)
    content = {"output_dir": "o", "data": {"path": "x"}}
    made = identity(parse_config(content | {"adapter": {"method": "slim"}}))
    assert differing(made, made) is None
    with refused("adapter.zzz"):
        parse_config(content | {"adapter": {"method": "slim", "zzz": 1}})
    with refused("adapter.method", "nexus_adapters_has_no_such_module:method", expected="'broken'"):
        find_method("broken", "adapter.method")
