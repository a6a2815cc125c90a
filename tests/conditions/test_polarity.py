import numpy as np
import pytest
from PIL import Image

from nexus_adapters.conditions import canny, invert, looks_inverted


def test_densest_canny_map_does_not_look_inverted_and_its_inverse_does():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    condition = canny(Image.fromarray(noise), 0, 0)
    assert 0.3 < np.asarray(condition).mean() / 255 < 0.4
    assert not looks_inverted(condition)
    assert looks_inverted(invert(condition))


@pytest.mark.parametrize(("value", "inverted"), [(0, False), (127, False), (128, True), (255, True)])
def test_rule_is_a_mean_above_one_half(value, inverted):
    assert looks_inverted(Image.new("L", (8, 8), value)) is inverted


def test_invert_exchanges_light_and_dark():
    condition = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    inverted = invert(condition)
    assert (inverted.mode, inverted.size) == ("RGB", (4, 4))
    assert np.array_equal(np.asarray(inverted), 255 - np.asarray(condition))
    assert np.array_equal(invert(inverted), condition)
    assert invert(Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (0, 0, 0)
