import sys
import types
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.refusals import refused

from nexus_adapters.conditions import EXTRACTORS, Extractor, extract, plugins

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def negative(image, strength=1.0):
    """Light and dark exchanged.

    More words.
    """
    return Image.blend(image, ImageOps.invert(image), strength)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages are installed whose entry points are these: name -> object or module path."""

    def install(**objects):
        module = types.ModuleType("their_package")
        monkeypatch.setitem(sys.modules, "their_package", module)
        points = []
        for name, found in objects.items():
            setattr(module, name, found)
            value = found if isinstance(found, str) else f"their_package:{name}"
            points.append(EntryPoint(name, value, plugins.GROUP))

        def entry_points(group, name=None):
            assert group == "nexus_adapters.conditions"
            return [point for point in points if name in (None, point.name)]

        monkeypatch.setattr(plugins, "entry_points", entry_points)

    return install


def test_a_callable_of_another_package_is_an_extractor(installed):
    installed(negative=negative)
    assert "negative" in EXTRACTORS
    assert sorted(EXTRACTORS) == ["canny", "depth", "negative", "segmentation", "sketch"]
    assert len(EXTRACTORS) == 5
    found = EXTRACTORS["negative"]
    assert (found.summary, found.needs, found.options()) == (
        "Light and dark exchanged.", ("their_package",), ("strength",),
    )  # fmt: skip
    assert np.array_equal(extract("negative", NOISE), 255 - np.asarray(NOISE))
    assert np.array_equal(extract("negative", [NOISE], strength=0.0)[0], NOISE)
    with refused("options", received="'power'", expected="negative (strength)"):
        extract("negative", NOISE, power=1)


def test_a_callable_may_take_any_option_and_need_one(installed):
    def any_of_them(image, depth, **options):
        """ """
        return image.point(lambda value: min(255, value + depth + sum(options.values())))

    installed(any=any_of_them)
    found = EXTRACTORS["any"]
    assert (found.options(), found.defaults(), found.summary) == (("depth",), {}, "their_package:any")
    expected = np.minimum(np.asarray(NOISE, int) + 3, 255)
    assert np.array_equal(extract("any", NOISE, depth=1, more=2), expected)


def test_an_extractor_of_another_package_is_taken_as_it_is(installed):
    theirs = Extractor("theirs", negative, "theirs", lines=True)
    installed(theirs=theirs)
    assert EXTRACTORS["theirs"] is theirs


def test_the_packages_own_names_stay_its_own(installed):
    installed(canny=negative)
    assert len(EXTRACTORS) == 4
    assert not np.array_equal(extract("canny", NOISE), 255 - np.asarray(NOISE))


def test_what_cannot_be_loaded_is_named_and_harms_no_other(installed):
    installed(gone="no_such_module:draw", number=3, negative=negative)
    with refused("name", received="no_such_module:draw", expected="'gone'"):
        extract("gone", NOISE)
    with refused("name", received="their_package:number of type int", expected="'number'"):
        extract("number", NOISE)
    extract("negative", NOISE)


def test_two_packages_of_one_name_are_not_guessed_between(monkeypatch):
    points = [EntryPoint("lines", f"{package}:draw", plugins.GROUP) for package in ("ours", "theirs")]
    monkeypatch.setattr(plugins, "entry_points", lambda group, name=None: points)
    with refused("name", received="ours:draw, theirs:draw", expected="'lines'"):
        extract("lines", NOISE)


@pytest.mark.parametrize(
    ("drawn", "received"),
    [
        (np.zeros((24, 32, 3)), "ndarray from 'wrong'"),
        (NOISE.convert("L"), "L of 32x24 from 'wrong'"),
        (NOISE.resize((8, 8)), "RGB of 8x8 from 'wrong'"),
    ],
)
def test_what_another_extractor_draws_is_checked(installed, drawn, received):
    installed(wrong=lambda image: drawn)
    with refused("name", received=received, expected="RGB of 32x24"):
        extract("wrong", NOISE)


def test_controlnet_aux_is_used_where_it_is_importable(monkeypatch):
    """By a stand-in of the same interface: the package needs torchvision, which the tests do not have."""
    calls = []

    class HEDdetector:
        @classmethod
        def from_pretrained(cls, weights):
            calls.append(weights)
            return cls()

        def __call__(self, image, detect_resolution, image_resolution, output_type):
            assert (detect_resolution, image_resolution, output_type) == (24, 24, "pil")
            return Image.new("L", (64, 64), 200)

    module = types.ModuleType("controlnet_aux")
    module.HEDdetector = HEDdetector
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    assert {"hed", "pidinet", "lineart", "mlsd", "normal", "openpose"} < set(EXTRACTORS)
    drawn = extract("hed", [NOISE, NOISE])
    assert [(d.mode, d.size) for d in drawn] == [("RGB", NOISE.size)] * 2
    assert calls == ["lllyasviel/Annotators"]  # once for both
    assert EXTRACTORS["hed"].lines
    with refused("model", received="lllyasviel/Annotators", expected="mlsd"):
        extract("mlsd", NOISE)


def test_without_controlnet_aux_its_names_are_unknown():
    with refused("name", received="'hed'", expected="canny, depth, segmentation, sketch"):
        extract("hed", NOISE)
