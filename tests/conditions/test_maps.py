"""Maps as users have them: millimeters, label ids, transparency, dark lines on white."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tests.refusals import refused

from nexus_adapters.choices import MAP_KINDS
from nexus_adapters.conditions import extract, load_as_stored, looks_inverted, read_map
from nexus_adapters.conditions.maps import split_map_options
from nexus_adapters.conditions.resize import fit_map, judge_kind
from nexus_adapters.conditions.segmentation import PALETTES
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.injection.condition import as_condition, as_mask

DISTANCES = np.array([[500, 1000, 2000], [4000, 8000, 0]], np.uint16)  # 0: not measured
NEARNESS = np.round(255 * (1 / np.array([500, 1000, 2000, 4000, 8000]) - 1 / 8000) / (1 / 500 - 1 / 8000))


def gray(image):
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def as_image_modes(values):
    """The same 16 bits as Pillow reads them from PNG, big-endian TIFF and PGM."""
    return [
        Image.fromarray(values),
        Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()),
        Image.fromarray(values.astype(np.int32)),
    ]


@pytest.mark.parametrize("kind", ["depth", None])
def test_16_bits_that_use_little_of_the_range_are_scaled_by_their_own(kind):
    for image in as_image_modes(DISTANCES):
        with pytest.warns(UserWarning, match="^condition: 16-bit depth .*unit=mm"):
            found = gray(read_map(image, kind))
        assert found == [0, 17, 51, 119, 255, 0]


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("unit", ["mm", "m"])
def test_distances_become_nearness(unit):
    images = [*as_image_modes(DISTANCES), Image.fromarray(DISTANCES.astype(np.float32) / 1000)]
    images.append(Image.fromarray((DISTANCES // 50).astype(np.uint8)))
    for image in images:
        found = gray(read_map(image, "depth", unit=unit))
        assert np.abs(np.array(found) - [*NEARNESS, 0]).max() <= 2
        assert found[0] == 255  # the nearest
        assert found[4] == found[5] == 0  # the farthest, and what was not measured


@pytest.mark.usefixtures("no_warning")
def test_nearness_of_another_range():
    assert gray(read_map(Image.fromarray(DISTANCES), "depth", unit="inverse")) == [0, 17, 51, 119, 255, 0]


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([[257, 65535]], np.uint16), "depth", [1, 255]),  # the whole range
        (np.array([[30000, 50000]], np.uint16), None, [117, 195]),
        (np.array([[30000, 30000]], np.uint16), "depth", [117, 117]),  # nothing to scale
        (np.array([[40000, 41000]], np.uint16), "lines", [156, 160]),  # not depth
        (np.array([[100, 200]], np.uint8), "depth", [100, 200]),
    ],
)
def test_other_depth_stays_as_it_is(values, kind, expected):
    assert gray(read_map(Image.fromarray(values), kind, invert=False)) == expected


IDS = np.array([[0, 1, 5], [149, 5, 255]], np.uint8)


def gray_palette(values):
    image = Image.fromarray(values)
    image.putpalette([value for value in range(256) for _ in range(3)])
    assert image.mode == "P"
    return image


@pytest.mark.parametrize(
    "image", [Image.fromarray(IDS), gray_palette(IDS), *as_image_modes(IDS.astype(np.uint16))]
)
def test_label_ids_get_the_colors_of_a_palette(image):
    with pytest.warns(UserWarning, match="label ids are colored with the palette ade20k"):
        found = np.asarray(read_map(image, "labels")).reshape(-1, 3)
    colors = PALETTES["ade20k"]
    assert np.array_equal(found, [colors[0], colors[1], colors[5], colors[149], colors[5], (0, 0, 0)])
    with pytest.warns(UserWarning, match="voc"):
        assert tuple(np.asarray(read_map(image, "labels", palette="voc"))[0, 1]) == (128, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_map(image, "labels", palette="none")


@pytest.mark.filterwarnings("ignore:condition")
def test_a_class_has_one_color_whatever_else_a_map_shows():
    small, large, highest = (Image.fromarray(np.array([[7, id]], np.uint8)) for id in (20, 181, 149))
    for image in (small, highest):
        assert np.array_equal(np.asarray(read_map(image, "labels"))[0, 0], PALETTES["ade20k"][7])
    for image in (small, large, highest):
        found = np.asarray(read_map(image, "labels", palette="voc"))[0]
        assert np.array_equal(found, PALETTES["voc"][np.asarray(image)[0]])


@pytest.mark.parametrize(
    ("ids", "palette", "most"), [([7, 181], "auto", 150), ([150], "ade20k", 150), ([133, 255], "coco", 133)]
)
def test_ids_without_a_color_are_refused(ids, palette, most):
    image = Image.fromarray(np.array([ids], np.uint8))
    with refused("condition", max(i for i in ids if i < 255), expected=f"below {most}") as caught:
        read_map(image, "labels", palette=palette)
    assert "palette=voc" in caught.value.hint


@pytest.mark.parametrize("ids", [[7, 26, 900], [1, 300], [256], [0, 65535]])
@pytest.mark.parametrize("palette", ["auto", "voc", "none"])
def test_16_bit_labels_above_255_are_refused(ids, palette):
    for image in as_image_modes(np.array([ids], np.uint16)):
        with refused("condition", f"{min(ids)} to {max(ids)}", expected="label ids from 0 to 255"):
            read_map(image, "labels", palette=palette)


@pytest.mark.parametrize("ids", [[0, 7], [0], [7, 7]])
def test_a_palette_of_colors_is_one_whichever_the_map_uses(ids):
    image = Image.fromarray(np.array([ids], np.uint8))
    image.putpalette(PALETTES["voc"].ravel().tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for palette in ("auto", "ade20k"):
            found = np.asarray(read_map(image, "labels", palette=palette))[0]
            assert np.array_equal(found, PALETTES["voc"][ids])


@pytest.mark.parametrize("ids", [[0, 0], [0, 255], [255, 0, 0]])
def test_ids_are_believed_where_the_palette_is_named(ids):
    colors = np.where(np.array(ids)[:, None] == 255, 0, PALETTES["ade20k"][0])
    image = Image.fromarray(np.array([ids], np.uint8))
    with pytest.warns(UserWarning, match="palette ade20k"):
        assert np.array_equal(np.asarray(read_map(image, "labels", palette="ade20k"))[0], colors)
    assert gray(read_map(image, "labels")) == ids


def test_gray_with_opaque_alpha_or_in_three_channels():
    image = Image.fromarray(IDS)
    with pytest.warns(UserWarning, match="label ids are colored"):
        expected = np.asarray(read_map(image, "labels"))
    with pytest.warns(UserWarning, match="label ids are colored"):
        assert np.array_equal(read_map(image.convert("LA"), "labels"), expected)
    for mode in ("RGB", "RGBA"):
        with pytest.warns(UserWarning, match="gray RGB is treated as colors"):
            assert np.array_equal(read_map(image.convert(mode), "labels"), image.convert("RGB"))
        with pytest.warns(UserWarning, match="label ids are colored"):
            assert np.array_equal(read_map(image.convert(mode), "labels", palette="ade20k"), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for color in (120, 140, 128):  # of a map of one class, that is colored already
            wall = Image.new("RGB", (4, 4), (color, color, color))
            for palette in ("auto", "voc"):
                assert np.array_equal(read_map(wall, "labels", palette=palette), wall)


@pytest.mark.usefixtures("no_warning")
def test_colors_are_no_ids():
    colored = Image.fromarray(IDS)
    colored.putpalette(PALETTES["voc"].ravel().tolist())
    assert tuple(np.asarray(read_map(colored, "labels"))[0, 1]) == (128, 0, 0)
    rgb = colored.convert("RGB")
    assert np.array_equal(read_map(rgb, "labels"), rgb)
    black_and_white = Image.fromarray(np.array([[0, 255]], np.uint8))
    assert gray(read_map(black_and_white, "labels")) == [0, 255]
    assert gray(read_map(Image.fromarray(IDS[:1] + 90), "image", invert=False)) == [90, 91, 95]


def strokes(color, ground, share=0.2):
    image = Image.new("RGBA", (40, 40), ground)
    image.paste(color, (4, 0, 4 + round(40 * share), 40))
    return image


@pytest.mark.parametrize(
    ("image", "kind", "ground", "inverted"),
    [
        (strokes((255, 255, 255, 255), (255, 255, 255, 0)), "lines", "black", False),
        (strokes((255, 255, 255, 255), (0, 0, 0, 0)), None, "black", False),
        (strokes((0, 0, 0, 255), (0, 0, 0, 0)), "lines", "white", True),
        (strokes((20, 20, 20, 255), (255, 255, 255, 0)), "image", "white", False),
        (strokes((0, 0, 0, 255), (0, 0, 0, 0), share=0.8), "image", "black", False),  # its own ground
        (strokes((0, 0, 0, 255), (0, 0, 0, 0)), "depth", "black", False),
        (strokes((9, 0, 200, 255), (255, 255, 255, 0)), "labels", "black", False),
        (Image.new("RGBA", (8, 8), (255, 255, 255, 0)), "lines", "black", False),
        (strokes((255, 255, 255, 255), (255, 255, 255, 0)).convert("LA"), "lines", "black", False),
    ],
)
def test_what_is_transparent_contrasts_with_the_strokes(image, kind, ground, inverted):
    with pytest.warns(UserWarning, match="parts become|inverted") as caught:
        found = read_map(image, kind)
    assert any(f"transparent parts become {ground}" in str(warning.message) for warning in caught)
    assert any("inverted" in str(warning.message) for warning in caught) == inverted
    corner = found.getpixel((39, 39)) if found.width == 40 else found.getpixel((0, 0))
    assert corner == ((255, 255, 255) if ground == "white" and not inverted else (0, 0, 0))


@pytest.mark.filterwarnings("ignore:condition")
@pytest.mark.parametrize("alpha", [20, 100, 127, 128, 255])
@pytest.mark.parametrize("stroke", [0, 255])
def test_strokes_that_shine_through_are_not_lost(alpha, stroke):
    for around in (0, 255):
        image = strokes((stroke, stroke, stroke, alpha), (around, around, around, 0))
        with pytest.warns(UserWarning, match="transparent parts become"):
            found = np.asarray(read_map(image, "lines"))[0, :, 0]
        assert abs(int(found[6]) - alpha) <= 1
        assert found[39] == 0
    mixed = strokes((0, 0, 0, 100), (0, 0, 0, 0))
    mixed.paste((255, 255, 255, 10), (0, 0, 2, 40))  # a halo
    with pytest.warns(UserWarning, match="transparent parts become white"):
        assert np.asarray(read_map(mixed, "lines"))[0, 6, 0] == 100


@pytest.mark.parametrize("kind", ["labels", "depth"])
def test_a_map_that_turns_all_black_is_reported(kind):
    with pytest.warns(UserWarning, match="transparent parts become black, and the whole map is black"):
        read_map(strokes((0, 0, 0, 200), (0, 0, 0, 0)), kind)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_dark_lines_on_white_are_inverted(mode):
    dark = Image.new("L", (64, 64), 255)
    dark.paste(0, (10, 0, 11, 64))
    given, light = dark.convert(mode), dark.point(lambda value: 255 - value).convert("RGB")
    for kind in ("lines", None):
        with pytest.warns(UserWarning, match="inverted .*invert=False or --no-invert"):
            assert np.array_equal(read_map(given, kind), light)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("lines", "depth", "image", "labels", None):
            assert np.array_equal(read_map(given, kind, invert=False), dark.convert("RGB"))
            assert np.array_equal(read_map(given, kind, invert=True), light)
        assert np.array_equal(read_map(light, "lines"), light)
        assert np.array_equal(read_map(given, "depth"), dark.convert("RGB"))
        bright = Image.linear_gradient("L").point(lambda value: 120 + value // 2)  # a wall, near
        assert np.array_equal(read_map(bright), bright.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "options", "received"),
    [
        ("unit", {"unit": "cm"}, "'cm'"),
        ("unit", {"unit": "mm", "kind": "lines"}, "'mm' for a map of kind lines"),
        ("palette", {"palette": "voc", "kind": "depth"}, "'voc' for a map of kind depth"),
        ("palette", {"palette": "viridis", "kind": "labels"}, "'viridis'"),
        ("palette", {"palette": ["voc"], "kind": "labels"}, "['voc']"),
        ("invert", {"invert": "no"}, "'no'"),
        ("invert", {"invert": np.ones(2)}, "array"),
    ],
)
def test_wrong_options(name, options, received):
    for image in (Image.new("L", (8, 8), 7), Image.new("RGB", (8, 8), "red")):
        with refused(name, received):
            read_map(image, **options)


def test_what_cannot_be_read():
    for wrong, received in [
        ("map.png", "str"),
        (Image.new("F", (8, 8)), "'F'"),
        (Image.new("L", (8, 8), 1), "0 to 1"),
    ]:
        with refused("--map", received):
            read_map(wrong, "lines", name="--map")
    for kind, is_hinted in [("depth", True), (None, True), ("lines", False)]:
        with refused("condition", "'F'") as caught:
            read_map(Image.new("F", (8, 8)), kind)
        assert ("unit=m " in caught.value.hint) == is_hinted
    with refused("condition", "nan"):
        read_map(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "depth", unit="m")


@pytest.mark.parametrize("mark", [np.nan, np.inf, -np.inf, 0])
@pytest.mark.parametrize("unit", ["mm", "inverse"])
def test_what_was_not_measured_is_black(mark, unit):
    depth = np.linspace(1, 9, 16, dtype=np.float32).reshape(4, 4)
    depth[1, 1] = mark
    found = np.asarray(read_map(Image.fromarray(depth), "depth", unit=unit))
    assert found[1, 1].max() == 0
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("highest", [1, 255, 300])
def test_small_values_of_many_bits_are_not_taken_for_black(dtype, highest):
    values = np.zeros((8, 8), dtype)
    values[2:4] = highest
    with refused("--map", f"0 to {highest}", expected="65535"):
        read_map(Image.fromarray(values), "lines", name="--map")
    with refused("image", f"0 to {highest}", expected="65535"):
        extract("canny", Image.fromarray(values))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_damaged_file_that_is_read_late_is_one_error(form):
    content = io.BytesIO()
    Image.radial_gradient("L").save(content, form)
    cut = content.getvalue()[: len(content.getvalue()) // 2]
    readers = [
        ("condition", read_map),
        ("condition", lambda image: as_condition(image, 3)),
        ("mask", as_mask),
        ("image", lambda image: extract("sketch", image)),
    ]
    for name, read in readers:
        with refused(name, "corrupt"):
            read(Image.open(io.BytesIO(cut)))


def test_a_map_that_is_nearly_black_is_reported():
    ids = Image.fromarray(np.array([[0, 3, 31]], np.uint8))
    for kind in (None, "lines", "depth", "image"):
        with pytest.warns(UserWarning, match=r"nearly black: .*kind=\"labels\""):
            assert gray(read_map(ids, kind)) == [0, 3, 31]
    with pytest.warns(UserWarning, match="nearly black"):
        as_condition(np.full((8, 8), 0.1, np.float32), 3)
    with pytest.warns(UserWarning, match=r"nearly black: .*mode L or P"):
        as_condition(np.full((8, 8), 0.1, np.float32), 3, kind="labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (0, 32, 255):
            read_map(Image.new("L", (8, 8), value), "image")
            as_condition(np.full((8, 8), value / 255, np.float32), 3)
        read_map(ids, "labels", palette="none")


def smooth_noise(seed, channels):
    """A picture with the tones of a photo: in color, or gray."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), np.uint8)
    image = Image.fromarray(blocks if channels == 3 else blocks[..., 0])
    return image.resize((128, 128), Image.Resampling.BICUBIC).convert("RGB")


def drawing(ink="white", ground="black", width=3):
    image = Image.new("RGB", (128, 128), ground)
    draw = ImageDraw.Draw(image)
    for inset in (6, 24, 42):
        draw.ellipse((inset, inset, 127 - inset, 127 - inset), outline=ink, width=width)
    return image


def soft(image):
    """Soft edges, as HED finds them."""
    return image.filter(ImageFilter.GaussianBlur(3)).point(lambda value: min(255, 2 * value))


def segmentation():
    image = Image.new("RGB", (128, 128))
    ImageDraw.Draw(image).rectangle((20, 20, 60, 60), fill="teal")
    return image


PHOTOS = [smooth_noise(0, 3), smooth_noise(0, 1), segmentation(), Image.linear_gradient("L")]


@pytest.mark.parametrize("photo", PHOTOS, ids=["color", "gray", "segmentation", "depth"])
def test_a_line_map_that_is_none_is_reported_in_one_way(photo):
    floats = np.asarray(photo.convert("RGB"), np.float32) / 255
    for read in (
        lambda: read_map(photo, "lines", invert=False),
        lambda: as_condition([photo, photo], 3, kind="lines", invert=False),
        lambda: as_condition(floats, 3, kind="lines", invert=False),
    ):
        with pytest.warns(UserWarning, match="looks like a photo") as caught:
            read()
        assert len({str(each.message) for each in caught}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (None, "image"):
            read_map(photo.convert("RGB"), kind, invert=False)
            as_condition(floats, 3, kind=kind, invert=False)
    assert np.array_equal(
        np.asarray(read_map(photo, "lines", invert=False)), np.asarray(photo.convert("RGB"))
    )


DRAWINGS = {
    "white on black": drawing(),
    "black on white": drawing("black", "white"),
    "anti-aliased": drawing().resize((100, 100), Image.Resampling.LANCZOS),
    "colored ink": drawing("blue", "white"),
    "soft": soft(drawing()),
    "soft and inverted": ImageOps.invert(soft(drawing())),
    "pencil on gray paper": drawing("black", "silver").filter(ImageFilter.GaussianBlur(1)),
    "noisy canny": extract("canny", smooth_noise(1, 3), low=0, high=1),
    "empty": Image.new("RGB", (64, 64)),
}


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_line_maps(name):
    read_map(DRAWINGS[name], "lines", invert=False)
    as_condition(np.asarray(DRAWINGS[name], np.float32) / 255, 3, kind="lines", invert=False)


def test_large_maps_are_judged_as_small_ones_are():
    for photo in PHOTOS:
        with pytest.warns(UserWarning, match="looks like a photo"):
            read_map(photo.convert("RGB").resize((1000, 1000)), "lines", invert=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("colored ink", "soft", "pencil on gray paper"):
            drawn = DRAWINGS[name].resize((1000, 1000), Image.Resampling.NEAREST)
            read_map(drawn, "lines", invert=False)


def test_files_keep_their_mode(tmp_path):
    Image.fromarray(DISTANCES).save(tmp_path / "depth.png")
    Image.fromarray(IDS).save(tmp_path / "ids.png")
    assert np.array_equal(load_as_stored(tmp_path / "depth.png"), DISTANCES)
    assert load_as_stored(tmp_path / "ids.png").mode == "L"
    with refused("--map", "which does not exist"):
        load_as_stored(tmp_path / "none.png", argument="--map")


def test_options_of_maps_and_of_extractors():
    given = {"unit": "mm", "palette": "voc", "model": "m"}
    assert split_map_options("depth", given) == ({"unit": "mm"}, {"palette": "voc", "model": "m"})
    assert split_map_options("labels", given, ("palette", "model")) == (
        {"palette": "voc"},
        {"unit": "mm", "palette": "voc", "model": "m"},
    )


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I")


@pytest.mark.filterwarnings("ignore:condition")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 20))])
def test_any_map_is_read_and_fitted_or_refused(seed):
    rng = np.random.default_rng(seed)
    for _ in range(80):
        width, height, *target = (int(side) for side in rng.integers(1, 80, 4))
        noise = rng.integers(0, 256, (height, width, 3))
        pixels = rng.choice(
            [noise, noise[..., :1] + 0 * noise, noise * 0, 255 + noise * 0, 255 * (noise > 230)]
        )
        mode, kind = rng.choice(MODES), rng.choice([None, *MAP_KINDS])
        image = Image.fromarray(pixels.astype(np.uint8))
        if mode.startswith("I"):
            values = (pixels[..., 0] * rng.choice([1, 30, 257])).astype(np.uint16)
            image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
        else:
            image = image.convert(mode)
        try:
            found = read_map(image, kind)
        except InvalidArgument:
            continue
        assert (found.mode, found.size) == ("RGB", (width, height))
        judged = judge_kind(np.asarray(found))
        assert judged in MAP_KINDS
        assert kind != "lines" or not looks_inverted(found)
        for resize_mode in (None, "stretch", "crop", "pad"):
            assert fit_map(found, tuple(target), kind or judged, resize_mode).size == tuple(target)
