import pytest
import torch
from diffusers import T2IAdapter
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused

from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.methods import find_method


def test_t2i_has_two_shapes_only():
    unet = tiny.unet(down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3)
    build("prime", unet)
    poolings = "(0, 1, 1, 1) or (0, 0, 1, 0), for method t2i"
    with refused("base", "a base with the poolings (0, ", expected=poolings):
        build("t2i", unet)


def test_it_starts_from_its_own_kind_alone(tmp_path):
    for seed, name in enumerate(("t2i", "prime")):
        torch.manual_seed(seed)
        build(name).save_pretrained(tmp_path / name)
    torch.manual_seed(2)
    fresh, method = build("t2i"), find_method("t2i")
    start = method.starting_tensors(fresh, find_saved(tmp_path / "t2i"))
    theirs = T2IAdapter.from_pretrained(tmp_path / "t2i").state_dict()
    assert start.keys() == theirs.keys() == fresh.state_dict().keys()
    assert all(torch.equal(start[name], tensor) for name, tensor in theirs.items())
    with refused("start_from", "a NexusAdapter", expected="a T2I-Adapter") as caught:
        method.starting_tensors(fresh, find_saved(tmp_path / "prime"))
    assert str(tmp_path / "prime") in caught.value.received


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_features_that_fade_are_in_its_config(exponent, tmp_path):
    """diffusers keeps what it does not know."""
    build("t2i", noise_exponent=exponent).save_pretrained(tmp_path)
    assert T2IAdapter.from_pretrained(tmp_path).config.get("noise_exponent", 0.0) == exponent


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_it_takes_over_how_the_features_of_its_start_fade(exponent, tmp_path):
    """Unless the options say, and of a T2I-Adapter alone."""
    method = find_method("t2i")
    for name in ("t2i", "prime"):
        build(name, noise_exponent=exponent).save_pretrained(tmp_path / name)
    start = find_saved(tmp_path / "t2i")
    assert method.adopt(method.Options(method="t2i"), start).noise_exponent == exponent
    for own in (0.0, 0.25):
        assert method.adopt(method.Options(method="t2i", noise_exponent=own), start).noise_exponent == own
    other = find_saved(tmp_path / "prime")
    assert method.adopt(method.Options(method="t2i"), other).noise_exponent is None


def test_a_start_whose_config_is_odd(tmp_path):
    build("t2i", noise_exponent=0.5).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"noise_exponent": 0.5', '"noise_exponent": -1.0'))
    method = find_method("t2i")
    with refused("start_from", "noise_exponent"):
        method.adopt(method.Options(method="t2i"), find_saved(tmp_path))
