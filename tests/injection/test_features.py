"""Features are kept for the same or equal text, and not past a change of the weights."""

import pytest
import torch
from tests import tiny
from tests.refusals import refused
from torch import nn

from nexus_adapters.bases.unet import KEYWORD
from nexus_adapters.injection import residuals
from nexus_adapters.injection.features import MAX_ENTRIES, FeatureCache, Weights, content_of
from nexus_adapters.injection.places import added

KEY = (0, 64)


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).requires_grad_(False)


@pytest.fixture
def text():
    return torch.randn(2, 5, 4)


@pytest.fixture
def features():
    return [torch.randn(2, 4, 2, 2)]


@pytest.fixture
def cache(adapter, text, features):
    made = FeatureCache()
    made.keep(KEY, text, adapter, features)
    return made


def test_large_maps_are_looked_at_quickly():
    maps = torch.zeros(2, 3, 1024, 1024)
    before = content_of(maps)
    assert content_of(maps) == before
    maps.numpy()[1, 2, 100:200, 7] = 1
    assert content_of(maps) != before
    assert content_of(None) is None
    assert content_of(maps.bfloat16()) is not None


def test_the_same_object_and_equal_content_are_hits(cache, adapter, text, features):
    assert cache.find(KEY, text, adapter) is features
    assert cache.find(KEY, text.clone(), adapter) is features


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t[:1], lambda t: t.double()])
def test_other_text_is_a_miss(cache, adapter, text, change):
    assert cache.find(KEY, change(text), adapter) is None


def test_another_key_is_a_miss(cache, adapter, text):
    assert cache.find((1, 64), text, adapter) is None


def test_text_written_in_place_is_a_miss_under_either_name(cache, adapter, text):
    before = text.clone()
    text.add_(1)
    assert cache.find(KEY, text, adapter) is None
    assert cache.find(KEY, text.clone(), adapter) is None
    assert cache.find(KEY, before, adapter) is None  # a pity, but safe


def test_alternating_texts_all_hit(adapter, features):
    cache = FeatureCache()
    texts = [torch.randn(1, 5, 4) for _ in range(MAX_ENTRIES)]
    for text in texts:
        cache.keep(KEY, text, adapter, features)
    assert all(cache.find(KEY, text, adapter) is features for text in texts * 2)
    cache.keep(KEY, torch.randn(1, 5, 4), adapter, features)
    assert cache.find(KEY, texts[0], adapter) is None


def step(adapter):
    adapter.requires_grad_(True)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()


def load(adapter):
    adapter.load_state_dict({name: value + 1 for name, value in adapter.state_dict().items()})


def load_assigned(adapter):
    adapter.load_state_dict({n: v.clone() for n, v in adapter.state_dict().items()}, assign=True)


def swap_averaged(adapter):
    for parameter in adapter.parameters():  # as diffusers' EMAModel.copy_to does
        parameter.data.copy_(parameter.data * 0.5)


def write_one(adapter):
    with torch.no_grad():
        adapter[2].weight[0, 0] = 3


def write_in_inference_mode(adapter):
    with torch.inference_mode():
        adapter[2].weight.mul_(2)


def write_buffer(adapter):
    adapter[1].running_mean.add_(1)


def replace_layer(adapter):
    adapter[2] = nn.Conv2d(4, 4, 1)


CHANGES = [
    step,
    load,
    load_assigned,
    swap_averaged,
    write_one,
    write_in_inference_mode,
    write_buffer,
    replace_layer,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(cache, adapter, text, change):
    change(adapter)
    assert cache.find(KEY, text, adapter) is None


@pytest.mark.parametrize("change", [swap_averaged, write_one])
def test_changes_to_inference_tensors_are_noticed(text, features, change):
    with torch.inference_mode():
        adapter = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).requires_grad_(
            False
        )
        cache = FeatureCache()
        text = text.clone()
        cache.keep(KEY, text, adapter, features)
        assert cache.find(KEY, text, adapter) is features
        change(adapter)
        assert cache.find(KEY, text, adapter) is None


def test_moving_the_weights_keeps_the_features(text, features):
    """As offloading does: the parameters are the same objects with other storage."""
    adapter, cache = nn.Conv2d(3, 4, 3), FeatureCache()
    cache.keep(KEY, text, adapter, features)
    adapter.to(torch.float64).to(torch.float32)
    assert cache.find(KEY, text, adapter) is features


def test_weights_in_another_memory_format_are_viewed_not_copied(adapter):
    plain = Weights.of(adapter)
    sample = Weights.of(adapter.to(memory_format=torch.channels_last)).sample
    assert torch.equal(plain.sample, sample)


def test_offloaded_weights_are_compared_by_identity():
    adapter = nn.Conv2d(3, 4, 3, device="meta")
    weights = Weights.of(adapter)
    assert weights.sample is None
    assert weights.hold(adapter, look_closely=True)
    adapter.weight = nn.Parameter(torch.empty_like(adapter.weight))
    assert not weights.hold(adapter, look_closely=True)


def test_an_inference_tensor_written_in_place_is_a_miss(adapter, features):
    """Their writes are not counted, so they are compared by content."""
    cache = FeatureCache()
    with torch.inference_mode():
        text = torch.randn(2, 5, 4)
        cache.keep(KEY, text, adapter, features)
        assert cache.find(KEY, text, adapter) is features
        assert cache.find(KEY, text.clone(), adapter) is features
        text.mul_(-1)
        assert cache.find(KEY, text, adapter) is None


def test_nothing_is_left_after_clearing(cache, adapter, text):
    cache.clear()
    assert cache.find(KEY, text, adapter) is None


FEATURES = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)]


def laid_out(*args, **kwargs):
    made = residuals(FEATURES, *args, **kwargs)
    assert list(made) == ["down_intrablock_additional_residuals"]
    assert isinstance(made[KEYWORD], list)
    return made[KEYWORD]


def test_as_they_are():
    for made, feature in zip(laid_out(), FEATURES, strict=True):
        assert torch.equal(made, feature)
    assert laid_out() is not FEATURES


def test_scale():
    assert torch.equal(laid_out(0.5)[1], FEATURES[1] * 0.5)
    per_row = laid_out(torch.tensor([0.0, 2.0]))
    assert torch.equal(per_row[0], torch.stack([FEATURES[0][0] * 0, FEATURES[0][1] * 2]))
    with refused("scale", "shape (3,)", expected="shape (2,)"):
        laid_out(torch.ones(3))


def test_branches():
    first = FEATURES[0]
    assert torch.equal(laid_out(factors=(1.0, 1.0))[0], torch.cat([first, first]))
    assert torch.equal(laid_out(2.0, factors=(0.0, 1.0, 0.5))[0], torch.cat([first * 0, first * 2, first]))


def test_dtype_follows_the_latents():
    assert laid_out(like=torch.zeros(1, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_gradients_reach_the_features_and_features_are_not_written():
    feature = torch.randn(1, 8, 8, 8, requires_grad=True)
    unet = tiny.unet()
    sizes = ((8, 8), (16, 4), (24, 2), (24, 1))
    features = [feature, *(torch.zeros(1, c, s, s) for c, s in sizes[1:])]
    before = [f.clone() for f in features]
    out = unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 4, 16), **residuals(features))
    out.sample.sum().backward()
    assert feature.grad is not None
    assert feature.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, features, strict=True))


def test_adding_to_those_already_there():
    ours = [f.clone() for f in FEATURES]
    assert added("features", None, ours) == ours
    assert added("features", None, ours) is not ours
    both = added("features", [ours[0] * 2], ours)
    assert torch.equal(both[0], ours[0] * 3)
    assert both[1] is ours[1]
    assert torch.equal(added("features", [ours[0][:1]], ours)[0], ours[0][:1] + ours[0])
    with refused("features", "3", expected="at most 2"):
        added("features", [*ours, ours[0]], ours)
    with refused("features", "(2, 3, 4, 5)", expected="(2, 3, 4, 4) at place 1"):
        added("features", [torch.zeros(2, 3, 4, 5)], ours)
