"""The values of the page become a request, and its pictures become files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tests.app.pages import drawn

from nexus_adapters.app.canvas import MAX_BYTES, Drawn, data_url, png_of, read
from nexus_adapters.app.form import LABELS, ControlForm, Form, chosen, label_of
from nexus_adapters.app.models import NO_ADAPTER, AdapterSource, Models
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.generation.requests import BaseRequest, ImageSource, MapSource

MODELS = Models()
GRAY = Image.new("RGB", (32, 24), "gray")
PICTURE = ControlForm(picture=drawn(GRAY))


def request_of(tmp_path, *controls, **values):
    return Form(controls, **values).request(MODELS, tmp_path)


def test_a_picture_is_extracted_from_and_a_map_is_not(tmp_path):
    (control,) = request_of(tmp_path, PICTURE, prompt="a ring").controls
    assert control.given == ImageSource(str(tmp_path / "picture.png"))
    (control,) = request_of(tmp_path, replace(PICTURE, is_map=True), ControlForm()).controls
    assert control.given == MapSource(str(tmp_path / "map.png"))


def test_an_edited_map_wins_over_the_picture(tmp_path):
    white = Image.new("RGB", (8, 8), "white")
    shown = replace(PICTURE, map=drawn(white, is_edited=False))
    assert isinstance(request_of(tmp_path, shown).controls[0].given, ImageSource)
    (control,) = request_of(tmp_path, replace(PICTURE, map=drawn(white))).controls
    assert control.given == MapSource(str(tmp_path / "map.png"))
    assert (np.asarray(Image.open(control.given.file)) == 255).all()


def test_files_hold_the_pixels_alone(tmp_path):
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    image.info["secret"] = "x"
    request_of(tmp_path, ControlForm(picture=drawn(image)))
    saved = Image.open(tmp_path / "picture.png")
    assert (saved.mode, saved.info, saved.getpixel((0, 0))) == ("RGB", {}, (1, 2, 3))


def test_controls_without_a_mask_get_a_white_one_if_others_have_one(tmp_path):
    first, second = request_of(tmp_path, replace(PICTURE, mask=drawn(GRAY)), ControlForm(), PICTURE).controls[
        :2
    ]
    assert (first.mask, second.mask) == (str(tmp_path / "mask.png"), str(tmp_path / "mask-3.png"))
    white = Image.open(second.mask)
    assert (white.size, white.getextrema()) == (GRAY.size, (255, 255))


def test_values_of_the_page_reach_the_request(tmp_path):
    control = replace(PICTURE, scale=0.5, start=0.25, end=0.75, policy="cond_only", noise_exponent=2)
    request = request_of(
        tmp_path, control, prompt="p", negative="n", seed=4.0, steps=3, guidance=1, width=64, height=48.0
    )
    (made,) = request.controls
    assert (made.scale, made.start, made.end, made.policy, made.noise_exponent) == (
        0.5,
        0.25,
        0.75,
        "cond_only",
        2,
    )
    assert (request.prompt, request.negative, request.seed, request.steps) == ("p", "n", 4, 3)
    assert (request.guidance, request.width, request.height) == (1.0, 64, 48)
    assert request_of(tmp_path, control).guidance == MODELS.guidance


@pytest.mark.parametrize(
    ("controls", "values", "name"),
    [
        ((ControlForm(),), {}, "Control 1"),
        ((PICTURE,), {"seed": None}, "seed"),
        ((PICTURE,), {"steps": 1.5}, "steps"),
        ((PICTURE,), {"width": 50}, "width"),
        ((replace(PICTURE, start=0.5, end=0.25),), {}, "end"),
        ((PICTURE, replace(PICTURE, noise_exponent=1.0)), {}, "noise_exponent"),
        ((ControlForm(picture=Drawn(png_of(GRAY)[:60])),), {}, "image"),
    ],
)
def test_bad_values_are_named(controls, values, name, tmp_path):
    with pytest.raises(InvalidArgument) as error:
        request_of(tmp_path, *controls, **values)
    assert error.value.name == name
    assert label_of(name) in str(error.value.with_names(label_of))


def test_errors_name_the_labels_of_the_page():
    error = InvalidArgument("end", "a number from `start`", 0).with_names(label_of)
    assert (error.name, error.expected) == (LABELS["end"], f"a number from {LABELS['start']}")


def test_columns_are_those_that_every_condition_has():
    assert "T2I-Adapter" in MODELS.columns(["canny"])
    assert list(MODELS.columns(["canny", "depth"])) == ["Prime", "Slim", NO_ADAPTER]
    assert MODELS.columns(["canny", "depth"])["Slim"] == ("slim", "slim")


def test_adapters_of_the_user_are_combined_in_their_order():
    sources = (
        AdapterSource("x/one", "canny"),
        AdapterSource("x/two", "canny"),
        AdapterSource("x/three", "depth"),
    )
    models = Models(BaseRequest("org/sd"), sources)
    assert list(models.columns(["canny"])) == ["x/one", "x/two", NO_ADAPTER]
    assert models.columns(["canny", "depth"])["x/one + x/three"] == ("x/one", "x/three")
    assert models.conditions == ("canny", "depth")


def test_a_base_of_the_user_needs_an_adapter():
    with pytest.raises(InvalidArgument) as error:
        Models(BaseRequest("org/sd"))
    assert error.value.name == "adapter"


def test_only_what_the_conditions_have_is_compared(tmp_path):
    assert chosen(["T2I-Adapter", "Slim"], MODELS, ["depth"]) == ["Slim"]
    with pytest.raises(InvalidArgument):
        chosen(["T2I-Adapter"], MODELS, ["depth"])
    pairs = dict(MODELS.requests(request_of(tmp_path, PICTURE), ["Slim", NO_ADAPTER]))
    assert [(each.controls[0].adapter, each.controls[0].scale) for each in pairs.values()] == [
        ("slim", 1.0),
        ("prime", 0.0),
    ]


def test_a_canvas_is_read():
    png = png_of(GRAY)
    assert read({"image": data_url(png), "edited": True}) == Drawn(png, True)
    assert read(None) == read({"image": None, "edited": False}) == Drawn()


def bomb():
    return data_url(png_of(Image.new("1", (8000, 8000))))


@pytest.mark.parametrize(
    "value",
    [
        "text",
        [],
        {"image": 3},
        {"image": "https://example.org/a.png"},
        {"image": "data:image/svg+xml;base64,PHN2Zy8+"},
        {"image": "data:image/png;base64,@@"},
        {"image": data_url(b"<html>")},
        {"image": data_url(b"\x89PNG\r\n\x1a\nxx")},
        {"image": "data:image/png;base64," + "A" * (MAX_BYTES * 2)},
        "bomb",
    ],
)
def test_what_is_no_drawing_is_refused_before_it_is_decoded(value):
    given = {"image": bomb()} if value == "bomb" else value
    with pytest.raises(InvalidArgument) as error:
        read(given, "mask")
    assert error.value.name == "mask"
    assert len(json.dumps(str(error.value))) < 300
