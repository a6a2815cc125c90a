"""What users pass as condition, and its way to the adapter's size."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests import tiny
from tests.refusals import refused

from nexus_adapters.errors import MISSING
from nexus_adapters.injection import Control, attach
from nexus_adapters.injection.condition import (
    LARGEST,
    as_condition,
    as_mask,
    check_aspect,
    image_size,
)
from nexus_adapters.injection.fit import fit_condition, mask_levels

GREY = Image.new("L", (24, 16), 51)
MAP = torch.rand(1, 3, 16, 24)


def test_a_pil_image_becomes_rgb_in_0_1():
    pixels = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
    condition = as_condition(Image.fromarray(pixels), 3)
    assert condition.shape == (1, 3, 16, 24)
    assert torch.equal(condition[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def test_grey_images_are_shown_in_every_channel():
    condition = as_condition(GREY, 3)
    assert condition.shape == (1, 3, 16, 24)
    assert torch.equal(condition, torch.full((1, 3, 16, 24), 51 / 255))
    assert as_condition(GREY.convert("RGB"), 1).shape == (1, 1, 16, 24)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_modes_that_convert_without_loss(mode):
    assert torch.equal(
        as_condition(Image.new("RGB", (8, 8), "white").convert(mode), 3), torch.ones(1, 3, 8, 8)
    )


def test_images_are_read_as_maps_of_their_kind():
    opaque = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    assert torch.equal(as_condition(opaque, 3), as_condition(opaque.convert("RGB"), 3))
    strokes = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (2, 2, 4, 8))
    millimeters = Image.fromarray(np.linspace(500, 8000, 64).astype(np.uint16).reshape(8, 8))
    for value, kind, warns, low, high in [
        (strokes, None, "transparent parts become black", 0, 1),
        (millimeters, None, "16-bit depth", 0, 1),
        (millimeters, "depth", "16-bit depth", 0, 1),
        (np.asarray(millimeters), "depth", "16-bit depth", 0, 1),
        (Image.new("L", (8, 8), 3), "labels", "palette ade20k", 50 / 255, 80 / 255),
        (np.full((8, 8), 3, np.uint8), "labels", "palette ade20k", 50 / 255, 80 / 255),
        (ImageOps.invert(Image.new("L", (8, 8))), "lines", "inverted", 0, 0),
        (np.ones((8, 8), np.float32), "lines", "inverted", 0, 0),
        (torch.ones(1, 3, 8, 8), "lines", "inverted", 0, 0),
    ]:
        with pytest.warns(UserWarning, match=f"^mine: .*{warns}"):
            condition = as_condition(value, 3, "mine", kind)
        assert condition.min() == pytest.approx(low)
        assert condition.max() == pytest.approx(high)


def test_dark_lines_on_white_are_inverted_unless_told_otherwise():
    light = torch.zeros(1, 3, 32, 32)
    light[..., 5] = 1
    dark, as_image = 1 - light, Image.fromarray(np.uint8(255 * (1 - light[0].permute(1, 2, 0).numpy())))
    for value in (dark, dark[0], dark.numpy(), [dark, dark], as_image, np.asarray(as_image), [as_image]):
        with pytest.warns(UserWarning, match="inverted"):
            assert torch.equal(as_condition(value, 3)[:1], light)
        assert torch.equal(as_condition(value, 3, invert=False)[:1], dark)
        assert torch.equal(as_condition(value, 3, invert=True)[:1], light)
        assert torch.equal(as_condition(value, 3, kind="depth")[:1], dark)
    with pytest.warns(UserWarning, match="inverted"):  # each map by itself
        assert torch.equal(as_condition(torch.cat([light, dark]), 3), torch.cat([light, light]))


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_other_modes_are_refused(mode):
    with refused("condition", repr(mode), expected="a PIL mode among"):
        as_condition(Image.new(mode, (8, 8)), 3)


def test_what_would_be_black_is_refused():
    ones = np.eye(8, dtype=np.uint8)
    for value in (ones, torch.from_numpy(ones).expand(3, -1, -1), Image.fromarray(ones)):
        with refused("condition", "0 to 1", expected="0 to 255"):
            as_condition(value, 3)
    with refused("mask", "0 to 1", expected="0 to 255"):
        as_mask(ones)


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
FLOATS = PIXELS / np.float32(255)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (PIXELS, 1),
        (FLOATS, 1),
        (FLOATS.astype(np.float64), 1),
        (FLOATS[None], 1),
        (np.stack([PIXELS, PIXELS]), 2),
        (FLOATS.transpose(2, 0, 1), 1),
        (np.stack([FLOATS, FLOATS]).transpose(0, 3, 1, 2), 2),
        ([PIXELS, PIXELS], 2),
        ([FLOATS, FLOATS.transpose(2, 0, 1)], 2),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), 1),
        (torch.from_numpy(FLOATS).permute(2, 0, 1), 1),
        (torch.from_numpy(PIXELS).permute(2, 0, 1)[None].repeat(3, 1, 1, 1), 3),
        ([torch.from_numpy(PIXELS).permute(2, 0, 1)] * 2, 2),
        (Image.fromarray(PIXELS), 1),
    ],
)
def test_arrays_of_any_layout_are_the_same_map(value, count):
    expected = torch.from_numpy(FLOATS).permute(2, 0, 1).expand(count, -1, -1, -1)
    assert torch.allclose(as_condition(value, 3), expected)


@pytest.mark.parametrize("value", [PIXELS[..., 0], FLOATS[..., 0], FLOATS[..., :1], FLOATS[None, ..., 0]])
def test_gray_arrays_fill_all_channels(value):
    expected = torch.from_numpy(FLOATS[..., 0]).expand(1, 3, -1, -1)
    assert torch.allclose(as_condition(value, 3), expected)
    assert torch.allclose(as_condition(value, 1), expected[:, :1])


@pytest.mark.parametrize(
    "value",
    [
        MAP.repeat(2, 1, 1, 1),
        [MAP, MAP],
        [MAP[0], MAP[0]],
        [MAP, MAP[0]],
        (MAP, MAP),
        MAP.repeat(2, 1, 1, 1).half(),
    ],
)
def test_tensors_and_lists_of_tensors(value):
    condition = as_condition(value, 3)
    assert condition.shape == (2, 3, 16, 24)
    assert torch.equal(condition, MAP.to(condition.dtype).repeat(2, 1, 1, 1))


def test_a_list_of_images():
    assert as_condition([GREY, GREY, GREY], 3).shape == (3, 3, 16, 24)


def test_the_condition_is_copied():
    mine = MAP.clone()
    condition = as_condition(mine, 3)
    mine.zero_()
    assert torch.equal(condition, MAP)


@pytest.mark.parametrize(
    ("value", "channels", "received", "expected"),
    [
        ("map.png", 3, "str", "a PIL image, a tensor"),
        (None, 3, MISSING, ""),
        (np.zeros((8, 8, 3), np.int64), 3, "int64", "uint8"),
        (np.zeros((8, 8, 3), np.uint16), 3, "uint16", "floating point"),
        (np.zeros((3, 8, 3)), 3, "first or last", "a NumPy array"),
        (np.zeros((1, 3, 8, 3)), 3, "first or last", "a NumPy array"),
        (np.zeros((8, 8, 4)), 3, "shape (8, 8, 4)", "a NumPy array"),
        (np.zeros((8, 0)), 3, "shape (8, 0)", "a NumPy array"),
        (np.zeros(8), 3, "shape (8,)", "a NumPy array"),
        (MAP[0, 0], 3, "shape (16, 24)", "a NumPy array"),
        ([GREY, np.zeros((16, 24))], 3, "a list of Image, ndarray", "a PIL image"),
        ([np.zeros((2, 8, 8, 3))], 3, "a list of shapes (2, 8, 8, 3)", "one map each"),
        ([], 3, "a list of nothing", "a PIL image"),
        ([GREY, MAP], 3, "a list of Image, Tensor", "a PIL image"),
        (MAP[:, :1], 3, "shape (1, 1, 16, 24)", "(K, 3, H, W)"),
        (MAP[:, :, :0], 3, "shape (1, 3, 0, 24)", "(K, 3, H, W)"),
        (MAP[:0], 3, "shape (0, 3, 16, 24)", "(K, 3, H, W)"),
        ([MAP.repeat(2, 1, 1, 1)], 3, "a list of shapes (2, 3, 16, 24)", "one map each"),
        ([MAP, MAP[..., :8]], 3, "(3, 16, 24), (3, 16, 8)", "maps of one size"),
        ([MAP, MAP.double()], 3, "torch.float32 on cpu, torch.float64 on cpu", "one dtype on one device"),
        ([GREY, GREY.resize((8, 9))], 3, "24x16, 8x9", "images of one size"),
        (GREY, 4, "1 PIL image", "a tensor: the adapter reads 4 channels"),
        ((MAP * 255).to(torch.int64), 3, "torch.int64", "floating point in [0, 1]"),
        (MAP.to(torch.float8_e4m3fn), 3, "torch.float8_e4m3fn", "floating point in [0, 1] with 16 bits"),
        (MAP > 0.5, 3, "torch.bool", "uint16 if gray"),
        (MAP * 2 + 1, 3, " to ", "finite values in [0, 1]"),
        (MAP - 1.1, 3, " to ", "finite values in [0, 1]"),
        (torch.full((1, 3, 8, 8), math.nan), 3, "nan to nan", "finite values in [0, 1]"),
        (torch.full((1, 3, 8, 8), math.inf), 3, "inf to inf", "finite values in [0, 1]"),
    ],
)
def test_anything_else_is_an_error_that_says_what_it_is(value, channels, received, expected):
    with refused("image", received, expected=expected):
        as_condition(value, channels, name="image")


@pytest.mark.parametrize(
    ("source", "given", "native", "expected"),  # each (height, width)
    [
        ((128, 128), (None, None), 128, (128, 128)),
        ((131, 190), (None, None), 128, (128, 184)),  # rounded down
        ((192, 192), (None, None), 128, (192, 192)),  # 1.5 times: kept
        ((193, 128), (None, None), 128, (160, 104)),  # more: the base's own area
        ((512, 512), (None, None), 128, (128, 128)),
        ((3000, 4000), (None, None), 128, (112, 144)),
        ((400, 3000), (None, None), 128, (24, 192)),  # and no side above the limit
        ((50, 200), (None, None), 128, (48, 192)),
        ((768, 512), (None, None), 512, (768, 512)),
        ((1024, 1024), (None, None), 512, (512, 512)),
        ((1344, 768), (None, None), 1024, (1344, 768)),
        ((3000, 4000), (None, 512), 128, (384, 512)),  # what is given counts
        ((3000, 4000), (96, None), 128, (96, 128)),
        ((3000, 4000), (24, 40), 128, (24, 40)),
        ((3000, 4000), (3000, 4000), 128, (3000, 4000)),
        ((8, 4000), (None, 64), 128, (8, 64)),
    ],
)
@pytest.mark.filterwarnings("ignore:.* more than 1.5 times the base's")
def test_the_size_of_an_image(source, given, native, expected):
    assert image_size(source, *given, native=native, multiple=8) == expected


@pytest.mark.parametrize("native", [64, 100, 128, 512, 1024])
@pytest.mark.filterwarnings("ignore:.* more than 1.5 times the base's")
def test_a_map_of_the_size_that_was_chosen_keeps_it(native):
    """A map extracted at the size of the image must control an image of that size."""
    for source in [
        (native * a // 7, native * b // 7) for a in (1, 7, 10, 11, 16, 70) for b in (7, 11, 25, 300)
    ]:
        chosen = image_size(source, None, None, native, 8)
        assert max(chosen) <= LARGEST * native
        assert image_size(chosen, None, None, native, 8) == chosen


@pytest.mark.parametrize("given", [(512, None), (None, 256), (128, 200), (200, 128)])
def test_a_given_size_far_above_the_bases_is_a_warning(given):
    with pytest.warns(UserWarning, match="^height and width: .* more than 1.5 times the base's 128"):
        image_size((64, 64), *given, 128, 8)


def test_a_smaller_size_is_a_warning():
    with pytest.warns(UserWarning, match="--map: 512x300 pixels is more than 1.5 times the base's 128"):
        image_size((300, 512), None, None, 128, 8, "--map")
    with pytest.warns(UserWarning, match="^--map: .*; set --height and --width for another size"):
        image_size((300, 512), None, None, 128, 8, "--map", "--height and --width")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_size((300, 512), 192, None, 512, 8)
        image_size((300, 512), 128, 192, 128, 8)
        image_size((192, 100), None, None, 128, 8)


@pytest.mark.parametrize(
    ("size", "target", "fits"),
    [
        ((505, 512), (504, 512), True),  # rounded down to a multiple of 8
        ((15, 1000), (8, 1000), True),
        ((1000, 15), (1000, 8), True),
        ((519, 519), (512, 512), True),
        ((500, 512), (512, 512), False),
        ((504, 512), (512, 512), True),
        ((1024, 1024), (512, 512), True),
        ((100, 150), (512, 768), True),
        ((512, 768), (768, 512), False),
    ],
)
def test_aspect_tolerance(size, target, fits):
    if fits:
        check_aspect(*size, *target)
    else:
        with refused("condition", f"{size[1]}x{size[0]}", expected="aspect"):
            check_aspect(*size, *target)


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
    with refused("mask", "3", expected="2, one per condition"):
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


def test_each_image_has_a_strength_of_its_own(unet, adapter):
    maps = tiny.condition(2)
    plain = added(unet, adapter, maps)
    scaled = added(unet, adapter, maps, image_scales=[0.5, 0])
    for whole, found in zip(plain, scaled, strict=True):
        assert torch.equal(found[0], whole[0] / 2)
        assert not found[1].any()
    control = Control(adapter, maps, policy="per_branch", image_scales=(1, 2))
    control.condition = maps[:1]
    with refused("image_scales", "2", expected="1, one per condition"):
        collected(unet, control)


def test_the_kind_decides_how_a_condition_shrinks(unet, adapter):
    lines = torch.zeros(1, 3, 256, 256)
    lines[..., 102], lines[:, :, 77] = 1, 1
    small = fit_condition(lines, 64, 64, 8, kind="lines")
    assert set(small.unique().tolist()) == {0, 1}
    as_small = added(unet, adapter, small)
    for found, equal in [
        (added(unet, adapter, lines), True),  # judged
        (added(unet, adapter, lines, kind="lines"), True),
        (added(unet, adapter, lines, kind="image"), False),
    ]:
        assert all(torch.equal(a, b) for a, b in zip(found, as_small, strict=True)) == equal


def test_each_condition_shrinks_by_its_own_kind(unet, adapter):
    lines, photo = torch.zeros(3, 256, 256), tiny.condition(1, 256, 256)[0]
    lines[..., 102], lines[:, 77] = 1, 1
    labels = torch.full((3, 256, 256), 0.5)
    labels[0, :101], labels[1, :, :90] = 0.25, 0.75
    kinds = {"lines": lines, "image": photo, "labels": labels}
    for pair in [("lines", "image"), ("image", "lines"), ("labels", "lines"), ("image", "labels")]:
        small = [fit_condition(kinds[kind][None], 64, 64, 8, kind=kind) for kind in pair]
        expected = added(unet, adapter, torch.cat(small))
        for given in ({}, {"crop": (0, 0, 256, 256)}):
            found = added(unet, adapter, torch.stack([kinds[kind] for kind in pair]), **given)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_aspect_is_fitted_as_asked_and_so_is_the_mask(unet, adapter):
    wide, mask = tiny.condition(1, 64, 128), half(64, 128)
    with refused("condition", "128x64", expected="aspect"):
        added(unet, adapter, wide)
    for mode in ("stretch", "crop", "pad"):
        found = added(unet, adapter, wide, resize_mode=mode, mask=mask)
        condition, of_mask = (fit_condition(given, 64, 64, 8, resize_mode=mode) for given in (wide, mask))
        expected = added(unet, adapter, condition, mask=of_mask)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A box is in the image as the mode makes the condition cover it.
    cut = added(unet, adapter, wide, resize_mode="pad", crop=(32, 0, 96, 64))
    assert all(torch.equal(a, b) for a, b in zip(cut, added(unet, adapter, wide[..., 32:96]), strict=True))


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


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, bool])
def test_whole_numbers_and_booleans_are_refused_with_the_way_out(dtype):
    values = np.ones((8, 8), dtype)
    for value in (values, torch.from_numpy(values).expand(3, -1, -1)):
        with refused("condition", np.dtype(dtype).name, hint="uint8"):
            as_condition(value, 3)


@pytest.mark.parametrize("wrong", ["64", 64.0, True, 0, -8, math.nan, [64]])
@pytest.mark.parametrize("name", ["height", "width"])
def test_a_size_that_is_none_is_refused(name, wrong):
    for other in (None, 64):
        sides = {"height": other, "width": other} | {name: wrong}
        with refused(name, repr(wrong)):
            image_size((64, 64), **sides, native=64, multiple=8)


@pytest.mark.parametrize("path", ["photo.png", Path("photo.png"), ["a.png", "b.png"]])
def test_a_path_is_refused_with_what_reads_it(path):
    with refused("condition", hint="load_image"):
        as_condition(path, 3)
    with refused("mask", hint="load_image"):
        as_mask(path)
