import pytest
import torch
from tests import tiny
from tests.refusals import refused

from nexus_adapters.injection import Control, attach
from nexus_adapters.injection.mask import mask_levels

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, tiny.TOKENS, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def unet():
    return tiny.unet()


@pytest.fixture(scope="module")
def adapter(unet):
    return tiny.adapter(unet)


def collected(unet, *controls, latents=LATENTS, text=TEXT):
    """What the controls add to a call, place by place."""
    found = []
    with torch.no_grad(), attach(unet, *controls):
        hook = unet.register_forward_pre_hook(
            lambda m, args, kwargs: found.extend(kwargs["down_intrablock_additional_residuals"]),
            with_kwargs=True,
        )
        try:
            unet(latents, 500, text)
        finally:
            hook.remove()
    return found


def added(unet, adapter, condition, latents=LATENTS, text=TEXT, **settings):
    control = Control(adapter, condition, policy="per_branch", **settings)
    return collected(unet, control, latents=latents, text=text)


def half(height=64, width=64):
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def test_a_full_mask_is_none_and_an_empty_one_is_no_control(unet, adapter):
    plain = added(unet, adapter, tiny.condition())
    full = added(unet, adapter, tiny.condition(), mask=torch.ones(1, 1, 7, 7))
    empty = added(unet, adapter, tiny.condition(), mask=torch.zeros(1, 1, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(plain, full, strict=True))
    assert all(not feature.any() for feature in empty)
    with torch.no_grad():
        base = unet(LATENTS, 500, TEXT).sample
        with attach(
            unet, Control(adapter, tiny.condition(), policy="per_branch", mask=torch.zeros(1, 1, 8, 8))
        ):
            assert torch.equal(unet(LATENTS, 500, TEXT).sample, base)


def test_half_a_mask_leaves_the_other_half_alone(unet, adapter):
    plain = added(unet, adapter, tiny.condition())
    masked = added(unet, adapter, tiny.condition(), mask=half())
    for level, (whole, part) in enumerate(zip(plain, masked, strict=True)):
        middle = whole.shape[-1] // 2
        if middle:  # the last levels are one value wide
            assert torch.equal(part[..., :middle], whole[..., :middle]), level
            assert not part[..., middle:].any(), level
        else:
            assert torch.allclose(part, whole / 2)


def test_soft_edges_stay_soft(unet, adapter):
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    plain = added(unet, adapter, tiny.condition())
    masked = added(unet, adapter, tiny.condition(), mask=ramp)
    expected = ramp.reshape(64, 8, 8).mean(-1)[0]
    assert torch.allclose(masked[0], plain[0] * expected, atol=1e-6)


def test_each_condition_may_have_its_own(unet, adapter):
    maps, masks = tiny.condition(2), torch.cat([half(), 1 - half()])
    both = added(unet, adapter, maps, mask=masks)
    for row in range(2):
        alone = added(
            unet,
            adapter,
            maps[row : row + 1],
            latents=LATENTS[row : row + 1],
            text=TEXT[row : row + 1],
            mask=masks[row : row + 1],
        )
        assert all(torch.allclose(a[row : row + 1], b, atol=1e-5) for a, b in zip(both, alone, strict=True))
    with refused("mask", "3", expected="2, as many as conditions"):
        added(unet, adapter, maps, mask=torch.ones(3, 1, 64, 64))


def test_a_mask_of_another_aspect_is_refused(unet, adapter):
    with refused("mask", "128x64", expected="aspect"):
        added(unet, adapter, tiny.condition(), mask=torch.ones(1, 1, 64, 128))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 5), (17, 33)])
@pytest.mark.parametrize("config", [tiny.SD15_UNET, tiny.SDXL_UNET])
def test_any_size(config, size):
    """The padding and the poolings that round up take the mask's sizes where they take the features'."""
    unet = tiny.unet(config)
    adapter = tiny.adapter(unet)
    stem = adapter.config.unshuffle
    height, width = (-(-side * 8 // stem) * stem for side in size)
    features = adapter(tiny.condition(1, height, width), torch.randn(1, 3, unet.config.cross_attention_dim))
    levels = mask_levels(torch.ones(1, 1, height, width), features, stem)
    for feature, level in zip(features, levels, strict=True):
        assert level.shape == (1, 1, *feature.shape[-2:])
        assert torch.equal(level, torch.ones_like(level))


def test_level_scales(unet, adapter):
    plain = added(unet, adapter, tiny.condition())
    numbers = (0.0, 0.5, 1.0, 2.0)
    scaled = added(unet, adapter, tiny.condition(), level_scales=numbers)
    assert all(torch.equal(a * n, b) for a, b, n in zip(plain, scaled, numbers, strict=True))


def test_a_crop_is_the_condition_of_the_part(unet, adapter):
    whole = tiny.condition(1, 96, 128)
    cropped = added(unet, adapter, whole, crop=(40, 24, 104, 88))
    part = added(unet, adapter, whole[:, :, 24:88, 40:104])
    assert all(torch.equal(a, b) for a, b in zip(cropped, part, strict=True))
    masked = added(unet, adapter, whole, crop=(40, 24, 104, 88), mask=half(192, 256))
    expected = added(unet, adapter, whole[:, :, 24:88, 40:104], mask=half(96, 128)[:, :, 24:88, 40:104])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(masked, expected, strict=True))
    with refused("crop", "right 129", expected="128x96"):
        added(unet, adapter, whole, crop=(65, 0, 129, 64))


def test_two_controls_add_up(unet, adapter):
    """Each with its own scale, mask and levels."""
    settings = [
        {"scale": 0.5, "mask": half(), "level_scales": "prompt"},
        {"scale": -1.0, "mask": 1 - half()},
    ]
    controls = [
        Control(adapter, tiny.condition(seed=seed), policy="per_branch", **given)
        for seed, given in zip((6, 9), settings, strict=True)
    ]
    alone = [collected(unet, control) for control in controls]
    for total, one, other in zip(collected(unet, *controls), *alone, strict=True):
        assert torch.equal(total, one + other)
