"""What the page shows: examples, the extracted map, progress, the gallery, and the code of an image."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tests.app.pages import drawn

from nexus_adapters.app import control_tab
from nexus_adapters.app.canvas import Drawn, read, value_of
from nexus_adapters.app.control_tab import COUNT, MAP, PICTURE, refreshed
from nexus_adapters.app.examples import examples_for
from nexus_adapters.app.form import ControlForm, Form
from nexus_adapters.app.generating import updates_of
from nexus_adapters.app.models import NO_ADAPTER, AdapterSource, Models
from nexus_adapters.app.page import CONTROLS, build, columns_update, words_html
from nexus_adapters.app.page import read as read_page
from nexus_adapters.app.session import MOST_IMAGES, Session
from nexus_adapters.conditions import extract
from nexus_adapters.generation.requests import BaseRequest
from nexus_adapters.generation.settings import read_settings

pytestmark = pytest.mark.usefixtures("weights")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def models(weights):
    return Models()


def picture():
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).ellipse((8, 8, 50, 50), fill="tomato")
    return image


def control_values(form):
    source = MAP if form.is_map else PICTURE
    images = [value_of(each) | {"edited": each.is_edited} for each in (form.picture, form.map, form.mask)]
    return [
        *images,
        form.condition,
        source,
        form.scale,
        form.start,
        form.end,
        form.policy,
        form.noise_exponent,
    ]


def page_values(*controls, names=("Prime", "Slim"), steps=2, seed=0):
    forms = [*controls, *[ControlForm()] * (CONTROLS - len(controls))]
    own = [list(names), "a ring", "", seed, steps, 2.0, "", "", "Report an error"]
    return own + [value for form in forms for value in control_values(form)]


def updates(models, session, values):
    async def collect():
        return [update async for update in updates_of(models, read_page, session, values)]

    return asyncio.run(collect())


def test_the_page_is_built_with_as_many_values_as_it_reads(models):
    page = build(models)
    (run, *_) = [
        fn for fn in page.fns.values() if fn.concurrency_id == "device" and len(fn.inputs) > COUNT * CONTROLS
    ]
    assert len(run.inputs) == 1 + len(page_values())
    names, form = read_page(page_values(ControlForm(drawn(picture())), seed=5))
    assert names == ["Prime", "Slim"]
    assert (form.seed, form.resize_mode, len(form.controls)) == (5, None, CONTROLS)
    assert form.controls[0].picture == drawn(picture())


def test_a_generation_fills_the_results_the_gallery_and_the_code(models):
    session = Session()
    found = updates(models, session, page_values(ControlForm(drawn(picture()))))
    first, last = found[0][0], found[-1][0]
    assert [each["name"] for each in first["items"]] == ["Prime", "Slim"]
    assert not any(each["done"] for each in first["items"])
    assert all(each["done"] for each in last["items"])
    assert last["selected"] == 0
    gallery, python, command, files = found[-1][1:5]
    assert [each["name"] for each in gallery["items"]] == ["Slim", "Prime"]
    assert 'load_adapter("prime"' in python
    assert "--image picture.png" in command
    assert "picture.png" in files
    assert str(session.made[0].file.parent.parent) not in python + command
    for made in session.made:
        assert read_settings(made.file) == made.settings
    session.close()
    assert not session.made[0].file.exists()


def test_an_error_keeps_what_is_there(models):
    session = Session()
    updates(models, session, page_values(ControlForm(drawn(picture())), names=["Slim"]))
    with pytest.raises(gr.Error, match="Strength"):
        updates(models, session, page_values(replace(ControlForm(drawn(picture())), scale=None)))
    assert len(session.made) == 1
    assert session.made[0].file.exists()


def test_the_oldest_images_leave_the_gallery(models):
    session = Session()
    updates(models, session, page_values(ControlForm(drawn(picture())), names=["Slim"]))
    (made,) = session.made
    for _ in range(MOST_IMAGES):
        folder = session.new_folder()
        session.add(replace(made, file=folder / "a.png"))
    assert len(session.made) == MOST_IMAGES
    assert not made.file.exists()


def changed(control, models, **options):
    keys = ("picture", "map", "mask", "source", "map_column", "note", "again")
    return SimpleNamespace(**dict(zip(keys, refreshed(control, models, 64, **options), strict=True)))


def test_the_map_is_the_one_that_the_command_extracts(models):
    update = changed(ControlForm(drawn(picture())), models)
    shown = read(update.map["value"])
    assert (np.asarray(shown.rgb()) == np.asarray(extract("canny", picture()))).all()
    assert update.mask["behind"] == update.map["value"]["image"]


def test_an_edited_map_stays_until_it_is_extracted_again(models):
    edited = ControlForm(drawn(picture()), map=drawn(Image.new("RGB", (64, 64), "white")))
    update = changed(edited, models)
    assert "value" not in update.map
    assert update.again["visible"]
    update = changed(edited, models, forced=True)
    assert read(update.map["value"]).png is not None
    assert not update.again["visible"]


def test_a_condition_that_cannot_be_extracted_is_drawn(models):
    update = changed(ControlForm(drawn(picture()), condition="segmentation"), models, new_kind=True)
    assert update.source["value"] == MAP
    assert not update.source["interactive"]
    assert not update.map_column["visible"]
    assert ["ring", "#00ff00"] in update.picture["colors"]
    assert models.extracts("sketch")


def test_adapters_to_compare_follow_the_conditions(models):
    session = Session(used={1: "canny", 2: "depth"})
    update = columns_update(session, models, ["T2I-Adapter", NO_ADAPTER], "canny")
    assert update["choices"] == ["Prime", "Slim", NO_ADAPTER]
    assert update["value"] == ["Prime", NO_ADAPTER]


def test_unknown_words_are_named(models):
    assert "dragon" in words_html(models, "a Dragon on a ring")
    text = words_html(models, "${1+1} <b> `x` {{y}}")
    assert not any(mark in text for mark in ("${", "`", "{{", "<b> "))
    assert "does not know" not in words_html(models, "a red ring, and a star")


def test_examples_fill_the_page_with_what_can_be_generated(models, folder):
    examples = examples_for(models)
    assert len(examples) >= 4
    for example in examples:
        request = Form(example.controls, prompt=example.prompt).request(models, folder)
        assert len(list(models.requests(request, example.names))) == len(example.names)
        for place, control in enumerate((*example.controls, None)):
            assert len(control_tab.filled(control, place + 1, models, 128)) == COUNT + 4
        assert "does not know" not in words_html(models, example.prompt)


def test_a_base_of_the_user_has_no_examples_of_shapes():
    own = Models(BaseRequest("org/sd"), (AdapterSource("x/one", "canny"),))
    assert examples_for(own) == ()
    assert own.words == {}
    assert Drawn() == ControlForm().picture
