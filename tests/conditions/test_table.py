import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import config
from PIL import Image
from tests.conditions import tiny_models

import nexus_adapters
from nexus_adapters.conditions import Extractor, canny, extract, find_extractor

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
    with pytest.raises(ValueError, match=f"name: expected one of {known}; received 'cany'"):
        extract("cany", NOISE)
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with pytest.raises(ValueError, match=f"name: expected one of {known}; received <PIL"):
        extract(NOISE, "canny")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("canny", {"low": "3"}, "low: expected a number; received '3'"),
        ("canny", {"auto": 1}, "auto: expected true or false; received 1"),
        ("sketch", {"sigma": True}, "sigma: expected a number; received True"),
        ("depth", {"model": 3}, "model: expected text; received 3"),
    ],
)
def test_options_of_another_type_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        extract(name, NOISE, **options)


def test_unknown_options_list_the_known():
    with pytest.raises(
        ValueError, match=r"options: expected those of canny \(low, high, auto\); received 'lo'"
    ):
        extract("canny", NOISE, lo=3)


def test_other_objects_than_pil_images_are_named(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with pytest.raises(ValueError, match=r"image: expected a PIL image .*; received ndarray"):
        extract("canny", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"image: expected a PIL image .*; received str"):
        extract("canny", "photo.png")
