import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters.conditions import canny, invert, load_image, looks_inverted, to_rgb
from nexus_adapters.conditions.images import FORMATS, decode_image, is_transparent, open_image


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


RAMP = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
SUFFIXES = {"PNG": "png", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "GIF": "gif", "JPEG2000": "jp2"}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(tmp_path, kind):
    path = tmp_path / f"a.{SUFFIXES[kind]}"
    Image.fromarray(RAMP).save(path)
    image = load_image(path)
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    assert np.array_equal(image, RAMP)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_named_format_is_read(tmp_path, kind):
    smooth = Image.new("RGB", (16, 16), (200, 100, 50))
    path = tmp_path / f"a.{SUFFIXES.get(kind, kind.lower())}"
    try:
        smooth.save(path)
    except (KeyError, OSError, ValueError) as error:  # this Pillow is too old, or was built without it
        pytest.skip(f"Pillow cannot write {kind}: {error}")
    assert np.abs(np.asarray(load_image(path)).astype(int) - (200, 100, 50)).max() < 12


def test_the_suffix_does_not_matter(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.dat", format="PNG")
    assert np.array_equal(load_image(str(tmp_path / "a.dat")), RAMP)


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(RAMP, turn))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_files_are_scaled(tmp_path, name):
    values = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 20 12 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    grey = np.asarray(load_image(tmp_path / name))[..., 1]
    assert np.array_equal(grey, np.round(values / 257).astype(np.uint8))


def test_grey_palette_and_cmyk_files(tmp_path):
    for mode, name in [("L", "l.png"), ("1", "1.png"), ("P", "p.png"), ("CMYK", "c.jpg")]:
        Image.fromarray(RAMP).convert(mode).save(tmp_path / name)
        image = load_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (20, 12))


def test_transparent_parts_become_white_with_a_warning(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"--map: transparent parts of .*a\.png' become white"):
        image = load_image(tmp_path / "a.png", argument="--map")
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_opaque_alpha_is_no_warning(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def png(width, height, data=b""):
    """A PNG of any size by its header, without the pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def truncated_png():
    stream = io.BytesIO()
    Image.fromarray(RAMP).save(stream, format="PNG")
    content = stream.getvalue()
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("content", "expected", "received"),
    [
        (None, "an image file", "'a.png', which does not exist"),
        (b"", "an image file", "'a.png', which is empty"),
        (b"hello, world", "an image (PNG, JPEG, ", "'a.png'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "an image (PNG, JPEG, ", "'a.png'"),
        (b"GIF89a", "image", "'a.png'"),
        (png(8, 8), "a readable image", "'a.png', which is corrupt ("),
        (png(8, 8, zlib.compress(b"\0" * 9)), "a readable image", "'a.png', which is corrupt ("),
        (truncated_png(), "a readable image", "'a.png', which is corrupt ("),
        (png(9000, 9000), "at most 64 megapixels", "'a.png', 9000x9000 (81.0"),
        (png(12000, 12000), "at most 64 megapixels", "'a.png', 12000x12000 (144.0"),
        (png(60000, 60000), "a smaller image", "'a.png' ("),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, monkeypatch, content, expected, received):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused("--map", received, expected=expected) as caught:
            load_image("a.png", argument="--map")
    assert "\n" not in str(caught.value)


def test_folder_and_unreadable_file(tmp_path, monkeypatch):
    with refused("path", received=f"'{tmp_path}', which is not a regular file"):
        load_image(tmp_path)
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)

    def refuse(*_):  # not by chmod, which does not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with refused("path", received="which cannot be read (Permission denied)"):
        load_image(path)


def test_float_files_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with refused("path", received="a.tif'"):
        load_image(tmp_path / "a.tif")


def test_cap_is_inclusive_and_an_argument(tmp_path):
    Image.new("RGB", (1000, 1000)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_megapixels=1).size == (1000, 1000)
    with refused("path", received=", 1000x1000 (1.0", expected="at most 0.999 megapixels"):
        load_image(tmp_path / "a.png", max_megapixels=0.999)


@pytest.mark.parametrize("cap", [0, -1, float("nan"), float("inf")])
def test_bad_cap(tmp_path, cap):
    with refused("max_megapixels", received=str(cap)):
        load_image(tmp_path / "a.png", max_megapixels=cap)


def test_bytes_and_readers_decode_as_files_do(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path, exif=exif)
    expected = np.asarray(load_image(path))
    assert np.array_equal(decode_image(path), expected)
    assert np.array_equal(decode_image(path.read_bytes()), expected)
    with path.open("rb") as reader:
        assert np.array_equal(decode_image(reader), expected)
        assert not reader.closed


def test_bytes_that_are_transparent_come_without_a_word():
    stream = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(stream, format="PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(stream.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "expected", "received"),
    [
        (b"", "an image file", "{}, which is empty"),
        (b"hello, world", "an image (PNG, JPEG, ", "{}"),
        (truncated_png(), "a readable image", "{}, which is corrupt ("),
        (png(9000, 9000), "at most 64 megapixels", "{}, 9000x9000 (81.0"),
    ],
)
def test_bad_bytes_are_called_by_their_name_or_length(content, expected, received):
    for name, shown in [("a.tar/00012", "'a.tar/00012'"), (None, f"a file of {len(content)} bytes")]:
        with refused("--map", received.format(shown), expected=expected) as caught:
            decode_image(content, argument="--map", name=name)
        assert "\n" not in str(caught.value)


def test_opening_reads_no_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(truncated_png())
    with open_image(tmp_path / "a.png") as image:
        assert image.size == (20, 12)
    with refused("image", "20x12", expected="at most 0.0001 megapixels"), open_image(png(20, 12), 0.0001):
        pass
