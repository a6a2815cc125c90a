import numpy as np
import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters.conditions import to_rgb
from nexus_adapters.conditions.rgb import is_transparent


def only_color(image):
    assert image.mode == "RGB"
    ((_, color),) = image.getcolors()
    return color


@pytest.mark.parametrize(
    ("mode", "value", "color"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (90, 128, 128), (90, 90, 90)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),
        ("PA", (0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("I;16", 257 * 90 + 129, (91, 91, 91)),
        ("I;16B", 257 * 90 + 128, (90, 90, 90)),
        ("I", 65535, (255, 255, 255)),
    ],
)
def test_modes(mode, value, color):
    image = Image.new(mode, (3, 2), value)
    before = image.tobytes()
    rgb = to_rgb(image)
    assert only_color(rgb) == color
    assert rgb.size == (3, 2)
    assert rgb is not image
    assert image.tobytes() == before


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert np.array_equal(grey, np.round(values / 257).astype(np.uint8))


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (40, 50, 60)]
    assert not is_transparent(image)
    image.info["transparency"] = 1
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    assert is_transparent(image)


@pytest.mark.parametrize(("mode", "value"), [("L", 7), ("RGB", (7, 7, 7)), ("I;16", 7), ("1", 0)])
def test_transparent_color(mode, value):
    image = Image.new(mode, (2, 1), value)
    image.info["transparency"] = value
    assert is_transparent(image)
    assert only_color(to_rgb(image)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "expected", "received"),
    [
        (Image.new("RGB", (0, 4)), "at least one pixel", "0x4"),
        (Image.new("F", (2, 2)), "a PIL mode among ", "'F'"),
        (Image.new("LAB", (2, 2)), "a PIL mode among ", "'LAB'"),
        (Image.new("I", (2, 2), 65536), "0 to 65535 in mode 'I'", "65536 to 65536"),
        (Image.new("I", (2, 2), -1), "0 to 65535 in mode 'I'", "-1 to -1"),
    ],
)
def test_what_is_refused(image, expected, received):
    with refused("image", received, expected=expected):
        to_rgb(image)
