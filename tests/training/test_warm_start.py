import pytest
import torch
from diffusers import T2IAdapter
from tests import tiny

from nexus_adapters.training.methods import build_adapter
from nexus_adapters.training.warm_start import starting_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each method, with weights of its own."""
    root = tmp_path_factory.mktemp("saved")
    unet = tiny.unet()
    for seed, method in enumerate(("prime", "slim", "t2i")):
        torch.manual_seed(100 + seed)
        build_adapter(method, unet).save_pretrained(root / method)
    return root


def fresh(method, unet=None):
    torch.manual_seed(0)
    return build_adapter(method, unet or tiny.unet())


@pytest.mark.parametrize("method", ["prime", "slim", "t2i"])
def test_the_same_kind_gives_all(saved, method):
    adapter = fresh(method)
    start = starting_tensors(adapter, str(saved / method))
    assert start.keys() == adapter.state_dict().keys()
    assert any(not torch.equal(start[name], tensor) for name, tensor in adapter.state_dict().items())


def test_t2i_gives_prime_its_trunk(saved):
    adapter, t2i = fresh("prime"), T2IAdapter.from_pretrained(saved / "t2i")
    start = starting_tensors(adapter, str(saved / "t2i"))
    kept = set(adapter.state_dict()) - set(start)
    assert kept
    assert all(".norm1." in name or ".cross_attention." in name for name in kept)
    assert all(torch.equal(start[name], tensor) for name, tensor in t2i.state_dict().items())
    # With its attention out of the way, the trunk is T2I's.
    adapter.load_state_dict(adapter.state_dict() | start)
    condition = tiny.condition(1)
    features = []
    for stage in adapter.adapter.body:
        stage.norm1.register_forward_hook(lambda module, args, out: features.append(args[0]))
    adapter(condition, torch.zeros(1, tiny.TOKENS, tiny.TEXT_WIDTH))
    assert torch.allclose(
        features[0].flatten().sort().values, t2i(condition)[0].flatten().sort().values, atol=1e-5
    )


@pytest.mark.parametrize(
    ("method", "start", "message"),
    [
        ("slim", "t2i", r"^adapter.start_from: expected adapter\.body\.0.* of shape .*; received"),
        ("slim", "prime", r"^adapter.start_from: expected adapter\.body\.0.* of shape .*; received"),
        ("t2i", "prime", r"^adapter.start_from: expected adapter\.body.* of shape none; received"),
        ("prime", "nowhere", r"^adapter.start_from: expected a saved adapter; received '.*nowhere' \("),
    ],
)
def test_what_does_not_fit_is_named(saved, method, start, message):
    with pytest.raises(ValueError, match=message):
        starting_tensors(fresh(method), str(saved / start))


def test_another_form_has_the_same_tensors_and_is_told_by_its_config(saved):
    adapter = build_adapter("prime", tiny.unet(), residual=True)
    with pytest.raises(
        ValueError, match=r"^adapter.start_from: expected one with residual=True, .*; received '.*False"
    ):
        starting_tensors(adapter, str(saved / "prime"))


def test_another_bases_adapter_is_told_by_its_first_tensor(saved):
    wider = tiny.unet(block_out_channels=(16, 16, 24, 24))
    with pytest.raises(ValueError, match=r"of shape \(16.*; received \(8"):
        starting_tensors(fresh("prime", wider), str(saved / "prime"))


def test_a_folder_of_something_else(saved, tmp_path):
    tiny.unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(
        ValueError,
        match=r"expected one of NexusAdapter, T2IAdapter, ControlNetModel, .*; received '.*', a UNet2D",
    ):
        starting_tensors(fresh("prime"), str(tmp_path / "unet"))


def test_features_may_be_taught_to_fade(saved):
    """No tensor depends on it, and converted T2I-Adapters do not know it."""
    adapter = build_adapter("prime", tiny.unet(), shape={"noise_exponent": 1.0})
    assert starting_tensors(adapter, str(saved / "prime")).keys() == adapter.state_dict().keys()
