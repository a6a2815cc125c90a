"""A control's settings: checked when made and at every change."""

import math

import pytest
import torch
from tests import tiny

from nexus_adapters.injection import Control


@pytest.fixture(scope="module")
def adapter():
    return tiny.adapter(tiny.unet())


@pytest.fixture
def control(adapter):
    return Control(adapter, tiny.condition())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True])
def test_scale_must_be_finite(adapter, control, value):
    with pytest.raises(ValueError, match=r"^scale: expected a finite number; received"):
        Control(adapter, tiny.condition(), scale=value)
    with pytest.raises(ValueError, match=r"^scale: expected a finite number; received"):
        control.scale = value
    assert control.scale == 1.0


@pytest.mark.parametrize("value", ["1", None, [1.0]])
def test_scale_must_be_a_number(control, value):
    with pytest.raises(ValueError, match=r"^scale: expected a finite number; received"):
        control.scale = value


@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_any_finite_scale_will_do(adapter, value):
    assert Control(adapter, tiny.condition(), scale=value).scale == value


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_the_window_must_be_one(adapter, start, end):
    with pytest.raises(ValueError, match=r"^start"):
        Control(adapter, tiny.condition(), start=start, end=end)


def test_the_window_is_checked_when_changed(control):
    control.end = 0.5
    with pytest.raises(ValueError, match=r"expected 0 <= start <= end <= 1; received 0.6, 0.5"):
        control.start = 0.6
    assert (control.start, control.end) == (0.0, 0.5)


def test_the_ends_of_the_window():
    adapter = tiny.adapter(tiny.unet())
    middle = Control(adapter, tiny.condition(), start=0.25, end=0.75)
    assert [middle.acts_at(p) for p in (0.2, 0.25, 0.5, 0.75, 0.8)] == [False, True, True, True, False]
    # A schedule's last timestep need not be 0, nor its first the last one trained.
    whole = Control(adapter, tiny.condition())
    assert whole.acts_at(-0.1)
    assert whole.acts_at(1.1)
    assert not whole.is_windowed
    assert middle.is_windowed


def test_unknown_policies_are_named(adapter, control):
    expected = "^policy: expected one of positive, per_branch, cond_only; received \"?'?both"
    with pytest.raises(ValueError, match=expected):
        Control(adapter, tiny.condition(), policy="both")
    with pytest.raises(ValueError, match=expected):
        control.policy = "both"


@pytest.mark.parametrize("name", ["mask", "level_scales", "crop"])
def test_what_is_not_there_yet_says_so(adapter, control, name):
    with pytest.raises(ValueError, match=rf"^{name}: not available in this version"):
        Control(adapter, tiny.condition(), **{name: (0.5,)})
    with pytest.raises(ValueError, match=rf"^{name}: not available in this version"):
        setattr(control, name, (0.5,))


def test_the_condition_is_checked_against_the_adapter(adapter, control):
    with pytest.raises(ValueError, match=r"^condition: expected .*\(B, 3, H, W\)"):
        Control(adapter, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^condition: expected .*\(B, 3, H, W\)"):
        control.condition = torch.rand(1, 4, 8, 8)
    grey = tiny.adapter(tiny.unet(), in_channels=1)
    assert Control(grey, tiny.image()).condition.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("wrong", [None, torch.nn.Linear(1, 1), "adapter"])
def test_the_adapter_must_be_one(wrong):
    with pytest.raises(ValueError, match=r"^adapter: expected a NexusAdapter or a T2IAdapter; received a "):
        Control(wrong, tiny.condition())


def test_only_what_changes_features_asks_for_new_ones(control):
    before = control.revision
    control.scale, control.start, control.end = 0.5, 0.1, 0.9
    assert control.revision == before
    control.condition = tiny.image()
    control.policy = "per_branch"
    assert control.revision == before + 2


def test_the_adapter_is_fixed(adapter, control):
    with pytest.raises(AttributeError):
        control.adapter = adapter
