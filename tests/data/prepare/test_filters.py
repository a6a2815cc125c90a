import pytest
from tests.data.image_files import picture
from tests.refusals import refused

from nexus_adapters.data.prepare.filters import Filters, LeftOut
from nexus_adapters.data.samples import Sample


def sample(width=40, height=20, captions=("a red star",)):
    return Sample("key", picture(0, width, height), None, captions)


def test_nothing_is_left_out_unless_asked_for():
    odd = sample(1, 300, ("",))
    assert Filters().apply(odd) is not None
    assert Filters().apply(odd).captions == ("",)


@pytest.mark.parametrize(
    ("filters", "kept", "left_out", "kind", "reason"),
    [
        (Filters(min_side=20), sample(), sample(40, 19), "small", "sides of at least 20, got 40x19"),
        (Filters(max_aspect=2), sample(), sample(41, 20), "aspect", "an aspect of at most 2, got 41x20"),
        (Filters(max_aspect=2), sample(20, 40), sample(20, 41), "aspect", "at most 2, got 20x41"),
        (
            Filters(min_caption_length=10),
            sample(),
            sample(captions=("a star", "")),
            "caption",
            "a caption of at least 10 characters, got 6, 0",
        ),
        (
            Filters(min_caption_length=2, max_caption_length=10),
            sample(),
            sample(captions=("a", "eleven char")),
            "caption",
            "a caption of 2 to 10 characters, got 1, 11",
        ),
    ],
)
def test_limits_are_kept_and_told(filters, kept, left_out, kind, reason):
    assert filters.apply(kept).image is kept.image
    with pytest.raises(LeftOut, match=reason) as caught:
        filters.apply(left_out)
    assert caught.value.kind == kind


def test_of_several_captions_those_that_pass_are_kept():
    several = sample(captions=("a", "a red star", "a very long caption indeed"))
    assert Filters(min_caption_length=5, max_caption_length=12).apply(several).captions == ("a red star",)


@pytest.mark.parametrize(
    ("limits", "name", "received", "expected"),
    [
        ({"min_side": -1}, "min_side", -1, "at least 0"),
        ({"max_aspect": 0.5}, "max_aspect", 0.5, "0, or a finite number of at least 1"),
        ({"max_aspect": float("nan")}, "max_aspect", "nan", "finite"),
        ({"min_caption_length": -2}, "min_caption_length", -2, "at least 0"),
        ({"min_caption_length": 9, "max_caption_length": 8}, "max_caption_length", 8, "9"),
        ({"near_duplicates": 16}, "near_duplicates", 16, "0 to 15"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, name, received, expected):
    with refused(name, received, expected=expected):
        Filters(**limits)
