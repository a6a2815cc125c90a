"""Features through a keyword, and through hooks on modules where there is none."""

import threading

import pytest
import torch
from tests.refusals import refused
from torch import nn

from nexus_adapters.bases.base import Place
from nexus_adapters.injection.places import FeaturePlaces

WIDTH, CHANNELS = 6, 4
MAPS = Place(CHANNELS, 1, module="first")
TOKENS = Place(CHANNELS, 1, module="blocks.1", layout="tokens")
PAIR = Place(CHANNELS, 1, module="pair", output=1, layout="tokens")


class Pair(nn.Module):
    """Returns two tensors, as the blocks of a transformer with two streams do."""

    def forward(self, tokens):
        return tokens * 0.5, tokens * 2


class Denoiser(nn.Module):
    """A map, then tokens, then a pair of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Identity()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.pair = Pair()

    def forward(self, x):
        tokens = self.first(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.pair(tokens)


@pytest.fixture
def denoiser():
    return Denoiser()


def features(count, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, CHANNELS, 3, WIDTH, generator=generator) for _ in range(count)]


def as_tokens(feature):
    """Row by row of the map, as a transformer's patches are: token y * width + x is pixel (y, x)."""
    rows = [feature[:, :, y, x] for y in range(feature.shape[2]) for x in range(feature.shape[3])]
    return torch.stack(rows, dim=1)


def hooks_of(module):
    return [dict(part._forward_hooks) for part in module.modules()]


LATENTS = torch.randn(2, CHANNELS, 3, WIDTH, generator=torch.Generator().manual_seed(9))


def test_a_map(denoiser):
    (feature,) = features(1)
    places = FeaturePlaces(denoiser, [MAPS])
    assert places.arguments([feature]) == {}
    assert torch.equal(denoiser(LATENTS)[0], as_tokens(LATENTS + feature) * 0.5)


def test_tokens(denoiser):
    (feature,) = features(1)
    FeaturePlaces(denoiser, [TOKENS]).arguments([feature])
    assert torch.equal(denoiser(LATENTS)[1], (as_tokens(LATENTS) + as_tokens(feature)) * 2)


def test_one_output_of_several(denoiser):
    (feature,) = features(1)
    FeaturePlaces(denoiser, [PAIR]).arguments([feature])
    first, second = denoiser(LATENTS)
    assert torch.equal(first, as_tokens(LATENTS) * 0.5)
    assert torch.equal(second, as_tokens(LATENTS) * 2 + as_tokens(feature))


def test_several_places_each_get_their_own(denoiser):
    ours = features(3)
    FeaturePlaces(denoiser, [MAPS, TOKENS, PAIR]).arguments(ours)
    _, second = denoiser(LATENTS)
    before = as_tokens(LATENTS + ours[0]) + as_tokens(ours[1])
    assert torch.allclose(second, before * 2 + as_tokens(ours[2]))


def test_features_keep_the_modules_dtype(denoiser):
    ours = features(2)
    FeaturePlaces(denoiser, [MAPS, PAIR]).arguments(ours)
    assert {out.dtype for out in denoiser(LATENTS.bfloat16())} == {torch.bfloat16}


def test_keywords_and_modules(denoiser):
    """A family may have both; those with a keyword are arguments, in order, added to what is there."""
    first, second = Place(CHANNELS, 1, keyword="here"), Place(CHANNELS, 1, keyword="here", layout="tokens")
    places = FeaturePlaces(denoiser, [first, MAPS, second, Place(CHANNELS, 1, keyword="there")])
    assert places.keywords() == ("here", "there")
    ours = features(4)
    theirs = [torch.ones_like(ours[0])]
    found = places.arguments(ours, {"here": theirs, "there": None})
    assert list(found) == ["here", "there"]
    assert torch.equal(found["here"][0], ours[0] + 1)
    assert torch.equal(found["here"][1], as_tokens(ours[2]))
    assert torch.equal(found["there"][0], ours[3])
    assert len(theirs) == 1
    assert torch.equal(denoiser(LATENTS)[0], as_tokens(LATENTS + ours[1]) * 0.5)
    with refused("here", "(2, 1, 3, 6)", expected="(2, 4, 3, 6) at place 1"):
        places.arguments(ours, {"here": [theirs[0][:, :1]]})


def test_nothing_is_added_before_and_after(denoiser):
    places = FeaturePlaces(denoiser, [MAPS, PAIR])
    base = Denoiser()(LATENTS)
    assert all(torch.equal(a, b) for a, b in zip(denoiser(LATENTS), base, strict=True))
    places.arguments(features(2))
    assert not torch.equal(denoiser(LATENTS)[1], base[1])
    places.clear()
    assert all(torch.equal(a, b) for a, b in zip(denoiser(LATENTS), base, strict=True))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_add_up_and_go_in_any_order(denoiser, order):
    base = denoiser(LATENTS)
    before = hooks_of(denoiser)
    both = [FeaturePlaces(denoiser, [TOKENS, PAIR]) for _ in range(2)]
    ours = [features(2, seed) for seed in range(2)]
    for places, mine in zip(both, ours, strict=True):
        places.arguments(mine)
    summed = as_tokens(LATENTS) + as_tokens(ours[0][0]) + as_tokens(ours[1][0])
    expected = summed * 2 + as_tokens(ours[0][1]) + as_tokens(ours[1][1])
    assert torch.allclose(denoiser(LATENTS)[1], expected, atol=1e-6)
    both[order[0]].remove()
    left = ours[order[1]]
    expected = (as_tokens(LATENTS) + as_tokens(left[0])) * 2 + as_tokens(left[1])
    assert torch.allclose(denoiser(LATENTS)[1], expected, atol=1e-6)
    both[order[1]].remove()
    both[order[1]].remove()  # once more is no harm
    assert torch.equal(denoiser(LATENTS)[1], base[1])
    assert hooks_of(denoiser) == before


def test_a_module_that_is_missing_leaves_no_hooks(denoiser):
    before = hooks_of(denoiser)
    with pytest.raises(AttributeError, match="nowhere"):
        FeaturePlaces(denoiser, [MAPS, Place(CHANNELS, 1, module="nowhere")])
    assert hooks_of(denoiser) == before


def test_modules_of_a_compiled_denoiser(denoiser):
    compiled = torch.compile(denoiser, backend="eager")
    places = FeaturePlaces(compiled, [MAPS])
    assert denoiser.first._forward_hooks
    places.remove()
    assert not denoiser.first._forward_hooks


def test_threads_do_not_see_each_others_features(denoiser):
    places = FeaturePlaces(denoiser, [MAPS])
    base = Denoiser()(LATENTS)[0]
    (feature,) = features(1)
    places.arguments([feature])
    found = []

    def other():
        found.append(denoiser(LATENTS)[0])
        places.arguments([-feature])
        found.append(denoiser(LATENTS)[0])
        places.clear()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert torch.equal(found[0], base)
    assert torch.equal(found[1], as_tokens(LATENTS - feature) * 0.5)
    assert torch.equal(denoiser(LATENTS)[0], as_tokens(LATENTS + feature) * 0.5)
