import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import config
from PIL import Image
from tests.conditions import tiny_models
from tests.refusals import refused

import nexus_adapters
from nexus_adapters.conditions import (
    EXTRACTORS,
    Extractor,
    canny,
    extract,
    find_extractor,
    register_condition,
    table,
)

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def test_extract_is_public_and_calls_the_extractor():
    assert nexus_adapters.extract is extract
    assert np.array_equal(extract("canny", NOISE), canny(NOISE))
    assert np.array_equal(extract("canny", NOISE, low=5, high=900), canny(NOISE, 5, 900))


MODELS = {"depth": tiny_models.dpt, "segmentation": tiny_models.segformer}


@pytest.mark.parametrize("name", ["canny", "depth", "segmentation", "sketch"])
def test_table(name, tmp_path):
    """The contract that all keep: RGB of the image's size, the same again, and lists as their members."""
    extractor = find_extractor(name)
    assert extractor.name == name
    assert extractor.summary
    assert bool(extractor.model) == bool(extractor.needs) == (name in MODELS)
    options = {"model": MODELS[name](tmp_path)} if name in MODELS else {}
    image = NOISE.resize((70, 50))
    condition = extract(name, image, **options)
    assert (condition.mode, condition.size) == ("RGB", image.size)
    assert np.array_equal(condition, extract(name, image, **options))
    several = extract(name, [image, image.convert("L")], **options)
    assert [(drawn.mode, drawn.size) for drawn in several] == [("RGB", image.size)] * 2
    assert np.array_equal(several[0], condition)
    assert extract(name, [], **options) == []


def test_the_table_is_known_without_torch():
    """`nexus extract --list` and canny start at once."""
    code = "import sys, nexus_adapters.conditions as c; list(c.EXTRACTORS); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_read_off_the_extractor():
    assert find_extractor("canny").options() == ("low", "high", "auto")
    assert Extractor("none", lambda image: image, "the image itself", lines=False).options() == ()


def test_unknown_names_list_the_known(monkeypatch):
    known = "canny, depth, segmentation, sketch"
    with refused("name", received="'cany'", expected=known):
        extract("cany", NOISE)
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused("name", received="<PIL", expected=known):
        extract(NOISE, "canny")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("canny", {"low": "3"}, "a number"),
        ("canny", {"auto": 1}, "true or false"),
        ("sketch", {"sigma": True}, "a number"),
        ("depth", {"model": 3}, "text"),
    ],
)
def test_options_of_another_type_are_named(name, options, expected):
    ((option, value),) = options.items()
    with refused(option, received=repr(value), expected=expected):
        extract(name, NOISE, **options)


def test_unknown_options_list_the_known():
    with refused("options", received="'lo'", expected="canny (low, high, auto)"):
        extract("canny", NOISE, lo=3)


def test_other_objects_than_pil_images_are_named(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused("image", received="ndarray", expected="a PIL image"):
        extract("canny", np.zeros((8, 8, 3), np.uint8))
    with refused("image", received="str", expected="a PIL image"):
        extract("canny", "photo.png")


@pytest.fixture
def forgotten(monkeypatch):
    """What a test registers is forgotten again."""
    monkeypatch.setattr(table, "_registered", {})


def negative(strength):
    def draw(image):
        return image.point(lambda value: round(255 - strength * value))

    return Extractor("negative", draw, "light and dark exchanged", lines=False)


def test_users_register_extractors_of_their_own(forgotten):
    mine = register_condition(negative(1.0))
    assert EXTRACTORS["negative"] is mine is find_extractor("negative")
    assert list(EXTRACTORS) == ["canny", "depth", "segmentation", "sketch", "negative"]
    assert np.array_equal(extract("negative", NOISE), 255 - np.asarray(NOISE))


def test_a_cell_of_a_notebook_can_run_again_but_no_other_extractor_takes_its_name(forgotten):
    register_condition(negative(1.0))
    register_condition(again := negative(0.5))
    assert EXTRACTORS["negative"] is again
    with refused("extractor", received="'negative'"):
        register_condition(Extractor("negative", lambda image: image, "", lines=False))
    with refused("extractor", received="'canny'"):
        register_condition(Extractor("canny", lambda image: image, "", lines=True))
    assert register_condition(EXTRACTORS["canny"]) is EXTRACTORS["canny"]


def test_a_registered_extractor_precedes_those_of_packages(forgotten, monkeypatch):
    monkeypatch.setattr(table, "plugin_names", lambda: ["negative", "theirs"])
    register_condition(mine := negative(1.0))
    assert EXTRACTORS["negative"] is mine
    assert list(EXTRACTORS)[4:] == ["negative", "theirs"]


def test_only_extractors_are_registered(forgotten, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused("extractor", received="function"):
        register_condition(canny)
