import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import config
from PIL import Image, ImageOps
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
    assert Extractor("none", lambda image: image, "the image itself").options() == ()


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
    for name in ("canny", "sketch", "depth", "segmentation"):
        for wrong in (np.zeros((8, 8, 3), np.uint8), "photo.png", None, Path("photo.png"), ["photo.png"]):
            with refused("image", expected="a PIL image"):
                extract(name, wrong)


def exchanged(image, strength=1.0):
    """Light and dark exchanged.

    More words.
    """
    return Image.blend(image, ImageOps.invert(image), strength)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install packages on the path whose entry points are these: name -> object or module path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package="their_package", **objects):
        module = types.ModuleType(package)
        monkeypatch.setitem(sys.modules, package, module)
        lines = ["[nexus_adapters.conditions]"]
        for name, found in objects.items():
            setattr(module, name, found)
            lines.append(f"{name} = {found if isinstance(found, str) else f'{package}:{name}'}")
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("\n".join(lines))

    return install


@pytest.fixture
def forgotten():
    """What a test registers is forgotten again."""
    with EXTRACTORS.temporary():
        yield


def negative(strength):
    def extract_negative(image):
        return image.point(lambda value: round(255 - strength * value))

    return Extractor("negative", extract_negative, "light and dark exchanged")


def test_what_is_registered_for_a_while_is_forgotten():
    with EXTRACTORS.temporary():
        register_condition(negative(1.0))
    assert "negative" not in EXTRACTORS
    assert list(EXTRACTORS) == ["canny", "depth", "segmentation", "sketch"]


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
        register_condition(Extractor("negative", lambda image: image, ""))
    with refused("extractor", received="'canny'"):
        register_condition(Extractor("canny", lambda image: image, "", kind="lines"))
    assert register_condition(EXTRACTORS["canny"]) is EXTRACTORS["canny"]


def test_a_registered_extractor_precedes_those_of_packages(forgotten, installed):
    installed(negative=exchanged, theirs=exchanged)
    register_condition(mine := negative(1.0))
    assert EXTRACTORS["negative"] is mine
    assert list(EXTRACTORS)[4:] == ["negative", "theirs"]


def test_only_extractors_are_registered(forgotten, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused("extractor", received="function"):
        register_condition(canny)


def test_a_callable_of_another_package_is_an_extractor(installed):
    installed(negative=exchanged)
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
    theirs = Extractor("theirs", exchanged, "theirs", kind="lines")
    installed(theirs=theirs)
    assert EXTRACTORS["theirs"] is theirs


def test_the_packages_own_names_stay_its_own(installed):
    installed(canny=exchanged)
    assert len(EXTRACTORS) == 4
    assert not np.array_equal(extract("canny", NOISE), 255 - np.asarray(NOISE))


def test_what_cannot_be_loaded_is_named_and_harms_no_other(installed):
    installed(gone="no_such_module:draw", number=3, negative=exchanged)
    with refused("name", received="no_such_module:draw", expected="'gone'"):
        extract("gone", NOISE)
    with refused("name", received="their_package:number of type int", expected="'number'"):
        extract("number", NOISE)
    extract("negative", NOISE)


def test_two_packages_of_one_name_are_not_guessed_between(installed):
    installed("ours", lines=exchanged)
    installed("theirs", lines=exchanged)
    with refused("name", received="ours:lines, theirs:lines", expected="'lines'"):
        extract("lines", NOISE)


@pytest.mark.parametrize(
    ("returned", "received"),
    [
        (np.zeros((24, 32, 3)), "ndarray from 'wrong'"),
        (NOISE.convert("L"), "L of 32x24 from 'wrong'"),
        (NOISE.resize((8, 8)), "RGB of 8x8 from 'wrong'"),
    ],
)
def test_what_another_extractor_returns_is_checked(installed, returned, received):
    installed(wrong=lambda image: returned)
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
    assert EXTRACTORS["hed"].kind == "lines"
    with refused("model", received="lllyasviel/Annotators", expected="mlsd"):
        extract("mlsd", NOISE)


def test_without_controlnet_aux_its_names_are_unknown():
    with refused("name", received="'hed'", expected="canny, depth, segmentation, sketch"):
        extract("hed", NOISE)
