"""A control's settings: checked when made and at every change."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.refusals import refused

from nexus_adapters.injection import Control


@pytest.fixture(scope="module")
def adapter():
    return tiny.adapter(tiny.unet())


@pytest.fixture
def control(adapter):
    return Control(adapter, tiny.condition())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True])
def test_scale_must_be_finite(adapter, control, value):
    with refused("scale", repr(value), expected="a finite number, a function"):
        Control(adapter, tiny.condition(), scale=value)
    with refused("scale", repr(value), expected="a finite number, a function"):
        control.scale = value
    assert control.scale == 1.0


@pytest.mark.parametrize("value", ["1", None, {}])
def test_scale_must_be_a_number(control, value):
    with refused("scale", repr(value), expected="a finite number, a function"):
        control.scale = value


@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_any_finite_scale_will_do(adapter, value):
    assert Control(adapter, tiny.condition(), scale=value).scale == value


@pytest.mark.parametrize(
    ("start", "end", "name", "received"),
    [
        (0.6, 0.5, "start, end", "0.6, 0.5"),
        (-0.1, 1.0, "start, end", "-0.1, 1.0"),
        (0.0, 1.1, "start, end", "0.0, 1.1"),
        (math.nan, 1.0, "start", "nan"),
        (0.0, math.inf, "end", "inf"),
    ],
)
def test_the_window_must_be_one(adapter, start, end, name, received):
    with refused(name, received):
        Control(adapter, tiny.condition(), start=start, end=end)


def test_the_window_is_checked_when_changed(control):
    control.end = 0.5
    with refused("start, end", "0.6, 0.5", expected="0 <= start <= end <= 1"):
        control.start = 0.6
    assert (control.start, control.end) == (0.0, 0.5)


def test_the_ends_of_the_window():
    adapter = tiny.adapter(tiny.unet())
    middle = Control(adapter, tiny.condition(), start=0.25, end=0.75)
    assert [middle.scale_at(p) for p in (0.2, 0.25, 0.5, 0.75, 0.8)] == [0, 1, 1, 1, 0]
    # A schedule's last timestep need not be 0, nor its first the last one trained.
    whole = Control(adapter, tiny.condition())
    assert whole.scale_at(-0.1) == whole.scale_at(1.1) == 1
    assert whole.acts_throughout
    assert not middle.acts_throughout


def test_unknown_policies_are_named(adapter, control):
    with refused("policy", "both", expected="positive, per_branch, cond_only"):
        Control(adapter, tiny.condition(), policy="both")
    with refused("policy", "both", expected="positive, per_branch, cond_only"):
        control.policy = "both"


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        (5, "left, top, right, bottom"),
        ((0, 0, 8), "left, top, right, bottom"),
        ((0, 0, 8, 8.5), "whole pixels"),
        ((0, 0, True, 8), "whole pixels"),
        ((-1, 0, 8, 8), "0 <= left < right and 0 <= top < bottom"),
        ((8, 0, 8, 8), "0 <= left < right and 0 <= top < bottom"),
        ((0, 9, 8, 8), "0 <= left < right and 0 <= top < bottom"),
    ],
)
def test_a_crop_is_a_box(adapter, control, crop, expected):
    with refused("crop", repr(crop), expected=expected):
        Control(adapter, tiny.condition(), crop=crop)
    with refused("crop", repr(crop)):
        control.crop = crop
    assert control.crop is None


@pytest.mark.parametrize(
    ("wrong", "received"),
    [
        ("white", "str"),
        (torch.rand(8, 8), "(8, 8)"),
        (torch.rand(1, 3, 8, 8), "(1, 3, 8, 8)"),
        (torch.ones(1, 1, 8, 8) * 2, "2 to 2"),
    ],
)
def test_a_mask_has_one_channel(adapter, control, wrong, received):
    with refused("mask", received):
        Control(adapter, tiny.condition(), mask=wrong)
    with refused("mask", received):
        control.mask = wrong
    assert control.mask is None


def test_a_mask_is_grey_and_a_copy(adapter):
    mask = torch.rand(1, 1, 8, 8)
    control = Control(adapter, tiny.condition(), mask=mask)
    mask.zero_()
    assert control.mask.max() > 0
    assert Control(adapter, tiny.condition(), mask=tiny.image()).mask.shape == (1, 1, 64, 64)


def test_the_scale_along_the_schedule(adapter):
    control = Control(adapter, tiny.condition(), scale=[1, 0.5, 0.25, 0], start=0.25, end=0.9)
    found = [control.scale_at(position) for position in (0.0, 0.24, 0.25, 0.4, 0.5, 0.74, 0.75, 0.9, 1.0)]
    assert found == [0, 0, 0.5, 0.5, 0.25, 0.25, 0, 0, 0]
    control.scale = lambda position: 1 - position
    assert control.scale_at(0.25) == 0.75
    assert control.scale_at(0.95) == 0
    assert control.reads_position
    control.start, control.end, control.scale = 0, 1, 0.5
    assert not control.reads_position
    assert control.scale_at(None) == 0.5


def test_the_condition_is_checked_against_the_adapter(adapter, control):
    with refused("condition", "(1, 1, 8, 8)", expected="(K, 3, H, W)"):
        Control(adapter, torch.rand(1, 1, 8, 8))
    with refused("condition", "(1, 4, 8, 8)", expected="(K, 3, H, W)"):
        control.condition = torch.rand(1, 4, 8, 8)
    grey = tiny.adapter(tiny.unet(), in_channels=1)
    assert Control(grey, tiny.image()).condition.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("wrong", [None, torch.nn.Linear(1, 1), "adapter"])
def test_the_adapter_must_be_one(wrong):
    with refused("adapter", f"a {type(wrong).__name__}", expected="a NexusAdapter or a T2IAdapter"):
        Control(wrong, tiny.condition())


def test_only_what_changes_features_asks_for_new_ones(control):
    before = control.revision
    control.scale, control.start, control.end = 0.5, 0.1, 0.9
    assert control.revision == before
    control.condition = tiny.image()
    control.policy = "per_branch"
    assert control.revision == before + 2
    control.mask, control.level_scales, control.crop = tiny.image(), "prompt", (0, 0, 32, 32)
    assert control.revision == before + 5
    control.scale = [1, 0]
    assert control.revision == before + 5


def test_the_adapter_is_fixed(adapter, control):
    with pytest.raises(AttributeError):
        control.adapter = adapter


@pytest.mark.parametrize(
    ("name", "value", "received"),
    [
        ("kind", "edges", "'edges'"),
        ("resize_mode", "fill", "'fill'"),
        ("kind", np.array(["lines", "depth"]), "array"),
        ("resize_mode", np.ones(2), "array"),
        ("resize_mode", ["pad"], "['pad']"),
        ("invert", "yes", "'yes'"),
        ("invert", np.ones(2), "array"),
        ("invert", 1, "1"),
        ("image_scales", 0.5, "0.5"),
        ("image_scales", "1", "'1'"),
        ("image_scales", [], "[]"),
        ("image_scales[1]", [1, math.nan], "nan"),
        ("image_scales", [1, 2, 3], "3"),
    ],
)
def test_settings_of_maps_are_checked(adapter, name, value, received):
    with refused(name, received):
        Control(adapter, tiny.condition(2), **{name.partition("[")[0]: value})


def test_an_inverted_map_is_turned_round_whenever_it_is_given(adapter):
    light = torch.zeros(1, 3, 64, 64)
    light[..., 9] = 1
    with pytest.warns(UserWarning, match="inverted"):
        control = Control(adapter, 1 - light)
    assert torch.equal(control.condition, light)
    with pytest.warns(UserWarning, match="inverted"):
        control.condition = 1 - light
    assert torch.equal(control.condition, light)
    assert torch.equal(Control(adapter, 1 - light, invert=False).condition, 1 - light)
    assert torch.equal(Control(adapter, 1 - light, kind="depth").condition, 1 - light)


def test_a_changed_kind_or_invert_reads_the_condition_again(adapter):
    light = torch.zeros(1, 3, 64, 64)
    light[..., 9] = 1
    given = (255 * (1 - light)).to(torch.uint8)
    as_image = Image.fromarray(given[0].permute(1, 2, 0).numpy())
    for value in (1 - light, given, as_image, [as_image], as_image.convert("L")):
        with pytest.warns(UserWarning, match="inverted"):
            control = Control(adapter, value)
        assert torch.equal(control.condition, light)
        before = control.revision
        control.invert = False
        assert torch.equal(control.condition, 1 - light)
        assert control.revision > before
        with pytest.warns(UserWarning, match="inverted"):
            control.invert = None
        assert torch.equal(control.condition, light)
        control.kind = "depth"
        assert torch.equal(control.condition, 1 - light)
        control.invert = True
        assert torch.equal(control.condition, light)


def test_a_kind_that_the_condition_cannot_be_read_by_changes_nothing(adapter):
    wide = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    control = Control(adapter, wide)
    before = control.condition.clone()
    with refused("condition", "0 to 65520", expected="label ids"):
        control.kind = "labels"
    assert control.kind is None
    assert torch.equal(control.condition, before)


def test_a_condition_that_was_changed_meanwhile_is_read_as_it_was(adapter):
    mine = np.full((64, 64), 200, np.uint8)
    control = Control(adapter, mine, kind="depth")
    mine[:] = 0
    control.invert = True
    assert control.condition.unique().tolist() == [pytest.approx(55 / 255)]
