"""A condition at the size of the image: by its kind, by the resize mode, padded for the adapter's stem."""

import pytest
import torch
from tests.refusals import refused

from nexus_adapters.choices import MAP_KINDS
from nexus_adapters.injection.fit import fit_condition

MAP = torch.rand(1, 3, 16, 24)


def test_a_condition_of_the_right_size_is_not_touched():
    assert torch.equal(fit_condition(MAP, 16, 24, 8), MAP)


def test_padding_repeats_the_last_row_and_column_only():
    fitted = fit_condition(MAP, 16, 24, 32)
    assert fitted.shape == (1, 3, 32, 32)
    assert torch.equal(fitted[:, :, :16, :24], MAP)
    assert torch.equal(fitted[:, :, 16:, :24], MAP[:, :, -1:].expand(-1, -1, 16, -1))
    assert torch.equal(fitted[:, :, :, 24:], fitted[:, :, :, 23:24].expand(-1, -1, -1, 8))


def test_shrinking_averages_areas():
    fitted = fit_condition(MAP, 8, 12, 4)
    assert torch.allclose(fitted, torch.nn.functional.avg_pool2d(MAP, 2))


def test_growing_is_bilinear_and_stays_in_range():
    hard = (MAP > 0.5).float()
    fitted = fit_condition(hard, 32, 48, 8)
    expected = torch.nn.functional.interpolate(hard, (32, 48), mode="bilinear")
    assert torch.allclose(fitted, expected, atol=1e-6)
    assert fitted.min() >= 0
    assert fitted.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resizing_keeps_the_dtype(dtype):
    assert fit_condition(MAP.to(dtype), 8, 12, 8).dtype == dtype


def test_another_aspect_is_an_error_with_both_sizes():
    with refused("condition", "24x16 pixels for an image of 16x24", expected="aspect"):
        fit_condition(MAP, 24, 16, 8)


@pytest.mark.parametrize("kind", MAP_KINDS)
def test_what_fits_is_not_touched_whatever_it_is(kind):
    assert torch.equal(fit_condition(MAP, 16, 24, 8, kind=kind), MAP)
    part = fit_condition(MAP, 8, 8, 8, kind=kind, box=(4, 2, 12, 10))
    assert torch.equal(part, MAP[:, :, 2:10, 4:12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lines_keep_their_value_and_labels_theirs(dtype):
    lines = torch.zeros(2, 3, 64, 96, dtype=dtype)
    lines[0, :, :, 41], lines[1, :, 30] = 1, 0.5
    fitted = fit_condition(lines, 16, 24, 8, kind="lines")
    assert fitted.dtype == dtype
    assert [sorted(each.unique().tolist()) for each in fitted] == [[0, 1], [0, 0.5]]
    assert (fitted[0, 0] > 0).sum(1).tolist() == [1] * 16
    assert (fitted[1, 0] > 0).sum(0).tolist() == [1] * 24
    ids = torch.where(torch.rand(1, 3, 50, 75) > 0.5, 80 / 255, 4 / 255).to(dtype)
    for size in [(16, 24), (100, 150), (64, 96)]:
        assert set(fit_condition(ids, *size, 8, kind="labels").unique().tolist()) == set(
            ids.unique().tolist()
        )


def test_stretch_crop_and_pad():
    wide = torch.zeros(1, 3, 32, 64)
    wide[..., :16], wide[..., 48:] = 0.25, 0.75
    for kind in ("image", "depth", "labels"):
        stretched = fit_condition(wide, 32, 32, 8, kind=kind, resize_mode="stretch")
        assert stretched[0, 0, 0].tolist() == [0.25] * 8 + [0] * 16 + [0.75] * 8
        cropped = fit_condition(wide, 32, 32, 8, kind=kind, resize_mode="crop")
        assert not cropped.any()
        padded = fit_condition(wide, 32, 32, 8, kind=kind, resize_mode="pad")
        assert padded[0, 0, :, 0].tolist() == [0.25] * 32  # the last pixels, repeated
    lines = fit_condition(wide, 32, 32, 8, kind="lines", resize_mode="pad")
    assert lines[0, 0, :, 0].tolist() == [0] * 8 + [0.25] * 16 + [0] * 8
    tall = wide.transpose(2, 3)
    assert not fit_condition(tall, 32, 32, 8, resize_mode="crop").any()
    assert torch.equal(fit_condition(tall, 32, 32, 8, kind="lines", resize_mode="pad"), lines.transpose(2, 3))


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(8, 104), (104, 8), (40, 16), (1, 500)])
def test_every_mode_gives_every_size(mode, size):
    for kind in MAP_KINDS:
        fitted = fit_condition(MAP, *size, 8, kind=kind, resize_mode=mode)
        assert fitted.shape == (1, 3, size[0] + -size[0] % 8, size[1] + -size[1] % 8)
        assert 0 <= fitted.min() <= fitted.max() <= 1


def test_a_box_may_cut_pixels():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    fitted = fit_condition(ramp, 8, 8, 8, box=(16.5, 0.0, 48.5, 32.0))
    expected = torch.linspace(0, 1, 64)[16:49]
    assert torch.allclose(fitted[0, 0, 0, 0], expected[:5].mean(), atol=0.01)
    assert torch.allclose(fitted[0, 0, 0, -1], expected[-5:].mean(), atol=0.01)


def test_the_error_names_the_way_out():
    with refused("mask", "24x16 pixels for an image of 16x24", expected="aspect") as caught:
        fit_condition(MAP, 24, 16, 8, name="mask")
    assert "resize_mode" in caught.value.hint
