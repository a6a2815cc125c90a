import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters import extract
from nexus_adapters.conditions import EXTRACTORS, Extractor
from nexus_adapters.generation.images import build_control
from nexus_adapters.generation.maps import ReadControl, check_size, read_mask, read_source, structure_map
from nexus_adapters.generation.models import LoadedAdapter
from nexus_adapters.generation.requests import ControlRequest, ExtractorOptions, ImageSource, MapSource
from nexus_adapters.generation.settings import extractor_options


@pytest.fixture
def edges(tmp_path):
    path = tmp_path / "edges.png"
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[30:90:12, 20:100] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((160, 120)).convert("RGB").save(path)
    return path


def request_for(path, *pairs, **values):
    return ControlRequest(MapSource(str(path), ExtractorOptions(pairs=pairs)), **values)


def map_of(request):
    return read_source(request)[0]


def test_a_photo_is_resized_before_its_edges_are_extracted(photo):
    control = ControlRequest(ImageSource(str(photo), ExtractorOptions(low=10, high=30)))
    with Image.open(photo) as image:
        found = structure_map(control, image, (80, 64))
        expected = extract("canny", image.resize((80, 64), Image.Resampling.LANCZOS), low=10, high=30)
    assert np.array_equal(found, expected)
    assert np.asarray(expected).any()


def test_the_settings_say_whether_a_map_was_inverted(edges, photo, tmp_path):
    dark, light = tmp_path / "dark.png", Image.open(edges)
    Image.eval(light, lambda value: 255 - value).save(dark)
    with pytest.warns(UserWarning, match="inverted"):
        assert read_source(request_for(dark))[1].invert is True
    for path, option, expected in [
        (edges, None, False),
        (edges, True, True),
        (dark, False, False),
    ]:
        assert read_source(request_for(path, invert=option))[1].invert is expected
    for option in (None, True, False):
        control = ControlRequest(ImageSource(str(photo)), invert=option)
        assert read_source(control)[1].invert is bool(option)


def test_what_an_extractor_makes_is_inverted_where_it_is_asked_for(photo, monkeypatch):
    """As in training, which takes it as it is."""

    def dark_lines(image):
        return Image.new("RGB", image.size, "white")

    monkeypatch.setitem(
        EXTRACTORS._entries, "dark", Extractor("dark", dark_lines, "dark lines", kind="lines")
    )
    for invert, color in [(None, 255), (False, 255), (True, 0)]:
        control = ControlRequest(ImageSource(str(photo), ExtractorOptions()), "dark", invert=invert)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            source, decided = read_source(control)
            assert structure_map(decided, source, (32, 32)).getpixel((3, 3)) == (color,) * 3


def test_a_map_is_read_as_its_kind_is(edges, tmp_path):
    light, dark = Image.open(edges), tmp_path / "dark.png"
    Image.eval(light, lambda value: 255 - value).save(dark)
    with pytest.warns(UserWarning, match=r"map: dark lines on white are inverted .*--no-invert"):
        assert np.array_equal(map_of(request_for(dark)), light)
    assert np.array_equal(map_of(request_for(dark, invert=True)), light)
    assert np.array_equal(map_of(request_for(dark, invert=False)), Image.open(dark))
    assert np.array_equal(map_of(request_for(edges)), light)
    depth = tmp_path / "depth.png"
    Image.fromarray(np.linspace(500, 8000, 256).astype(np.uint16).reshape(16, 16)).save(depth)
    of_depth = {"condition_name": "depth"}
    with pytest.warns(UserWarning, match=r"16-bit depth .*--option unit=mm"):
        assert map_of(request_for(depth, **of_depth)).getpixel((15, 15)) == (255, 255, 255)
    far = map_of(request_for(depth, "unit=mm", **of_depth))
    assert (far.getpixel((0, 0)), far.getpixel((15, 15))) == ((255, 255, 255), (0, 0, 0))
    ids = tmp_path / "ids.png"
    Image.new("L", (16, 16), 1).save(ids)
    of_labels = ("palette=voc",), {"condition_name": "segmentation"}
    with pytest.warns(UserWarning, match=r"label ids .*voc"):
        assert map_of(request_for(ids, *of_labels[0], **of_labels[1])).getpixel((0, 0)) == (128, 0, 0)
    assert extractor_options(request_for(ids, *of_labels[0], **of_labels[1])) == {"palette": "voc"}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_does_not_act(tmp_path, mode):
    path = tmp_path / "mask.png"
    mask = Image.new("LA", (16, 16), (255, 0))
    mask.paste((255, 255), (4, 4, 8, 8))
    mask.convert("RGBA").quantize(4).save(path) if mode == "P" else mask.convert(mode).save(path)
    with pytest.warns(UserWarning, match="mask: transparent"):
        found = np.asarray(read_mask(request_for("edges.png", mask=str(path))))
    assert found[4:8, 4:8].min() == 255
    assert found.sum() == 16 * 255


def test_a_photo_of_another_aspect(photo):
    with Image.open(photo) as image:  # 160x120
        request = ControlRequest(ImageSource(str(photo), ExtractorOptions(low=10, high=30)))
        with refused("image", "160x120", hint="`resize_mode`"):
            build_control(ReadControl(request, image), LoadedAdapter(None, "", ""), (128, 64))
        with refused("mask", "64x64", hint="`resize_mode`"):
            read = ReadControl(request, image, Image.new("L", (64, 64)))
            build_control(read, LoadedAdapter(None, "", ""), (160, 120))
        for mode in ("stretch", "crop", "pad"):
            control = replace(request, resize_mode=mode)
            check_size(control, image, 128, 64)
            found = np.asarray(structure_map(control, image, (128, 64)))
            assert found.shape == (64, 128, 3)
            middle = found[:, 21:107]  # a photo's border is no line
            assert (found.sum() == middle.sum()) == (mode == "pad")
