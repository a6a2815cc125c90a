"""The pure function from features to the UNet's arguments."""

import torch
from tests import tiny
from tests.refusals import refused

from nexus_adapters.bases.unet import KEYWORD
from nexus_adapters.injection import residuals
from nexus_adapters.injection.places import added

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
