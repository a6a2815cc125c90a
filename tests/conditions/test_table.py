import numpy as np
import pytest
from jaxtyping import config
from PIL import Image

import nexus_adapters
from nexus_adapters.conditions import EXTRACTORS, Extractor, canny, extract, find_extractor

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def test_extract_is_public_and_calls_the_extractor():
    assert nexus_adapters.extract is extract
    assert np.array_equal(extract("canny", NOISE), canny(NOISE))
    assert np.array_equal(extract("canny", NOISE, low=5, high=900), canny(NOISE, 5, 900))


@pytest.mark.parametrize("name", sorted(EXTRACTORS))
def test_table(name):
    extractor = find_extractor(name)
    assert extractor.name == name
    assert extractor.summary
    condition = extract(name, NOISE)
    assert (condition.mode, condition.size) == ("RGB", NOISE.size)


def test_options_are_read_off_the_extractor():
    assert find_extractor("canny").options() == ("low", "high")
    assert Extractor("none", lambda image: image, "the image itself", lines=False).options() == ()


def test_unknown_names_list_the_known(monkeypatch):
    monkeypatch.setitem(EXTRACTORS, "blur", Extractor("blur", canny, "", lines=False))
    with pytest.raises(ValueError, match="name: expected one of blur, canny; received 'cany'"):
        extract("cany", NOISE)
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with pytest.raises(ValueError, match="name: expected one of blur, canny; received <PIL"):
        extract(NOISE, "canny")


def test_unknown_options_list_the_known():
    with pytest.raises(ValueError, match=r"options: expected those of canny \(low, high\); received 'lo'"):
        extract("canny", NOISE, lo=3)


def test_other_objects_than_pil_images_are_named(monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with pytest.raises(ValueError, match=r"image: expected a PIL image .*; received ndarray"):
        extract("canny", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"image: expected a PIL image .*; received str"):
        extract("canny", "photo.png")
