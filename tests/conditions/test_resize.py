"""How maps of each kind change size: lines keep width and value, labels are not mixed."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nexus_adapters.choices import MAP_KINDS
from nexus_adapters.conditions import canny, sketch
from nexus_adapters.conditions.resize import judge_kind, resize_map, resize_planes, thinned
from nexus_adapters.injection.fit import fit_condition
from nexus_adapters.metrics.structure import edge_f1


def drawing(side, width=1, value=255):
    """A circle, a slanted box and a cross of strokes `width` pixels wide, the same at every size."""
    is_filled = width < 0
    pixels, unit = np.zeros((side, side), np.uint8), side / 16

    def at(*points):
        return [tuple(round(unit * place) for place in point) for point in points]

    cv2.circle(pixels, *at((5, 5)), round(3 * unit), value, width)
    corners = [np.array(at((10, 3), (14, 5), (12, 9), (9, 7)))]
    if is_filled:
        cv2.fillPoly(pixels, corners, value)
        return Image.fromarray(pixels).convert("RGB")
    cv2.polylines(pixels, corners, True, value, width)
    cv2.line(pixels, *at((2, 11), (14, 14)), value, width)
    cv2.line(pixels, *at((8, 10), (8, 15)), value, width)
    return Image.fromarray(pixels).convert("RGB")


def lit(condition):
    return np.asarray(condition)[..., 0] > 127


@pytest.mark.parametrize("side", [65, 96, 128, 200, 256, 1000])
def test_thin_lines_stay_where_they_are_as_wide_and_as_bright(side):
    small, shrunk = drawing(64), resize_map(drawing(side), (64, 64), "lines")
    assert set(np.unique(shrunk)) == {0, 255}
    assert edge_f1(lit(shrunk), lit(small)) > 0.97
    assert 0.75 < lit(shrunk).mean() / lit(small).mean() < 1.1
    if side > 128:  # averaging loses them
        averaged = resize_map(drawing(side), (64, 64), "image")
        assert edge_f1(lit(averaged), lit(small)) < 0.9


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("value", [40, 255])
def test_strokes_get_neither_fainter_nor_wider(width, value):
    pixels = np.zeros((240, 240, 3), np.uint8)
    pixels[:, 101 : 101 + width] = value
    shrunk = np.asarray(resize_map(Image.fromarray(pixels), (60, 60), "lines"))[..., 0]
    assert set(np.unique(shrunk)) == {0, value}
    widths = (shrunk > 0).sum(axis=1)
    assert widths.min() >= 1
    assert widths.max() <= max(1, min(width, width / 4 + 1))


def test_soft_strokes_keep_their_highest_value():
    photo = Image.new("RGB", (256, 256), "navy")
    ImageDraw.Draw(photo).ellipse((50, 40, 200, 190), fill="orange")
    soft = sketch(photo)
    shrunk = np.asarray(resize_map(soft, (64, 64), "lines"))
    assert shrunk.max() == np.asarray(soft).max()
    assert len(np.unique(shrunk)) > 2
    faint = Image.fromarray(np.asarray(soft) // 2)
    assert np.asarray(resize_map(faint, (64, 64), "lines")).max() == np.asarray(faint).max()


def test_dots_and_the_border_are_not_lost():
    pixels = np.zeros((80, 80, 3), np.uint8)
    for row, column in [(0, 0), (79, 79), (0, 40), (39, 40), (40, 21)]:
        pixels[row, column] = 255
    for size in [(20, 20), (33, 33), (79, 79)]:
        assert (
            cv2.connectedComponents(lit(resize_map(Image.fromarray(pixels), size, "lines")).astype("u1"))[0]
            == 6
        )


def test_areas_among_lines_are_averaged():
    """So that taking any map for lines does no harm."""
    pixels = np.zeros((128, 128, 3), np.uint8)
    ramp = np.linspace(60, 250, 64).astype(np.uint8)
    pixels[30:94, 20:84] = ramp[:, None]
    image = Image.fromarray(pixels)
    shrunk, mean = (np.asarray(image, int) for image in (
        resize_map(image, (32, 32), "lines"), image.resize((32, 32), Image.Resampling.BOX)))  # fmt: skip
    assert np.abs(shrunk - mean).max() <= 1
    square = drawing(128, width=-1)  # filled
    assert (
        edge_f1(lit(resize_map(square, (32, 32), "lines")), lit(resize_map(square, (32, 32), "image"))) > 0.97
    )


def pattern(name, period, side):
    """Lines `period` pixels apart, or a checkerboard of that period."""
    rows, columns = np.mgrid[:side, :side]
    if name == "checkerboard":
        return (rows // (period // 2) + columns // (period // 2)) % 2 == 0
    return (rows % period == 0) | (columns % period == 0) if name == "grid" else rows % period == 0


@pytest.mark.parametrize(("name", "period", "side"), [
    ("rows", 2, 256), ("rows", 4, 256), ("rows", 2, 128), ("rows", 3, 250), ("grid", 2, 256),
    ("grid", 3, 256), ("grid", 4, 256), ("checkerboard", 2, 256), ("checkerboard", 4, 256),
])  # fmt: skip
def test_hatching_too_dense_for_lines_is_filled(name, period, side):
    pixels = np.zeros((side, side), np.uint8)
    inner = slice(side // 4, 3 * side // 4)
    pixels[inner, inner] = 255 * pattern(name, period, side)[inner, inner]
    for given in (pixels, pixels.T, pixels // 2):
        shrunk = np.asarray(resize_map(Image.fromarray(given).convert("RGB"), (64, 64), "lines"))[..., 0]
        assert set(np.unique(shrunk)) == {0, given.max()}
        assert (shrunk[18:46, 18:46] > 0).all()
        assert not shrunk[:15].any()
        assert not shrunk[:, 49:].any()


@pytest.mark.parametrize("period", [6, 8, 12])
@pytest.mark.parametrize("name", ["rows", "grid"])
def test_lines_with_gaps_between_them_stay_lines(name, period):
    pixels = Image.fromarray(255 * pattern(name, period, 256).astype(np.uint8)).convert("RGB")
    shrunk = np.asarray(resize_map(pixels, (64, 64), "lines"))[..., 0]
    assert set(np.unique(shrunk)) == {0, 255}
    assert (shrunk == 0).any(axis=1).sum() >= 21  # rows between the lines
    assert (shrunk[:, 1] > 0).sum() >= 21  # the lines


def test_faint_lines_next_to_bright_ones_are_not_erased():
    for faint in (1, 6, 15):
        pixels = np.zeros((128, 128, 3), np.uint8)
        pixels[:, 8], pixels[:, 64:80], pixels[64, 100:] = 255, faint, 4 * faint
        shrunk = np.asarray(resize_map(Image.fromarray(pixels), (32, 32), "lines"))[..., 0]
        assert (shrunk[:, 2] == 255).all()
        assert np.abs(shrunk[:, 17:19].astype(int) - faint).max() <= 1
        assert shrunk[16, 28:].min() >= faint


@pytest.mark.parametrize("kind", MAP_KINDS)
@pytest.mark.parametrize("size", [(32, 24), (20, 30), (47, 33), (90, 20), (40, 100), (200, 96), (64, 48)])
def test_images_and_tensors_are_resized_alike(kind, size):
    pixels = np.asarray(Image.effect_noise((64, 48), 90).convert("RGB")).copy()
    pixels[..., 1] = np.where(pixels[..., 1] > 180, 255, 0)
    fitted = np.asarray(resize_map(Image.fromarray(pixels), size, kind), int)
    condition = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    found = fit_condition(condition, size[1], size[0], 1, kind=kind, resize_mode="stretch")[0]
    assert np.abs(255 * found.permute(1, 2, 0).numpy() - fitted).max() < 1.6  # Pillow rounds each side


def test_lines_where_one_side_grows_and_in_a_box():
    tall = resize_map(drawing(128), (32, 256), "lines")
    assert tall.size == (32, 256)
    assert np.asarray(tall).max() == 255
    whole, box = drawing(256), (64.5, 32.25, 192.5, 160.25)
    part = resize_map(whole, (64, 64), "lines", box)
    cut = whole.crop((64, 32, 192, 160))
    assert edge_f1(lit(part), lit(resize_map(cut, (64, 64), "lines"))) > 0.97
    grown = resize_map(drawing(64), (128, 128), "lines")
    assert np.array_equal(grown, drawing(64).resize((128, 128), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("size", [(16, 16), (23, 31), (100, 70), (64, 40)])
def test_labels_of_4_and_80_never_give_50(size):
    ids = np.random.default_rng(0).choice([4, 80], (64, 40, 3)).astype(np.uint8)
    image = Image.fromarray(ids)
    found = np.asarray(resize_map(image, size, "labels"))
    assert set(np.unique(found)) == {4, 80}
    planes = resize_planes(np.moveaxis(ids, 2, 0) / np.float32(255), size[::-1], "labels", (0, 0, 40, 64))
    assert np.array_equal(np.rint(255 * np.moveaxis(planes, 0, 2)), found)


@pytest.mark.parametrize("kind", ["depth", "image"])
def test_the_rest_is_averaged_and_interpolated(kind):
    image = Image.radial_gradient("L").convert("RGB")
    assert np.array_equal(resize_map(image, (32, 32), kind), image.resize((32, 32), Image.Resampling.BOX))
    assert np.array_equal(
        resize_map(image, (300, 300), kind), image.resize((300, 300), Image.Resampling.BILINEAR)
    )


def test_thinning_leaves_connected_lines_of_one_pixel():
    thick = lit(drawing(96, width=7))
    thin = thinned(thick, np.ones_like(thick), np.ones(thick.shape, np.float32))
    assert not (thin & ~thick).any()
    assert cv2.connectedComponents(thin.astype("u1"))[0] == cv2.connectedComponents(thick.astype("u1"))[0]
    full = cv2.filter2D(thin.astype("u1"), -1, np.ones((2, 2)), borderType=cv2.BORDER_CONSTANT) == 4
    assert full.sum() <= 2  # crossings
    kept = np.zeros_like(thick)
    assert np.array_equal(thinned(thick, kept, np.ones(thick.shape, np.float32)), thick)


def depth_map():
    pixels = np.asarray(Image.radial_gradient("L").resize((96, 96)))
    return np.where(pixels < 90, 255 - pixels, 0).astype(np.uint8)


def jpeg_like(condition, seed=0):
    noise = np.random.default_rng(seed).integers(-6, 7, condition.shape)
    return np.clip(condition.astype(int) + noise, 0, 255).astype(np.uint8)


PHOTO = np.asarray(Image.effect_noise((96, 96), 90).convert("RGB"))
LINES = np.asarray(drawing(96))
SHAPES = np.asarray(Image.new("RGB", (96, 96), (10, 0, 60)))


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (LINES, "lines"),
        (255 - LINES, "lines"),
        (LINES // 4, "lines"),
        (jpeg_like(LINES), "lines"),
        (jpeg_like(255 - LINES), "lines"),
        (np.asarray(sketch(drawing(96, width=-1))), "lines"),
        (np.asarray(drawing(600, width=3)), "lines"),
        (LINES[..., :1], "lines"),
        (np.asarray(drawing(96, width=-1)), "lines"),  # one gray on black, or on white
        (255 - np.asarray(drawing(96, width=-1)), "lines"),
        (np.asarray(drawing(96, width=9)), "lines"),
        (255 - np.asarray(drawing(96, width=9)), "lines"),
        (np.asarray(canny(Image.fromarray(PHOTO))), "lines"),
        (np.where(LINES > 0, (255, 0, 0), (0, 0, 90)).astype(np.uint8), "labels"),
        (np.asarray(drawing(96, width=-1, value=9)), "labels"),  # ids
        (np.repeat((np.arange(96) // 24 * 3)[:, None, None], 96, 1).astype(np.uint8), "labels"),
        (PHOTO, "image"),
        (np.repeat(depth_map()[..., None], 3, 2), "image"),
        (255 - np.repeat(depth_map()[..., None], 3, 2), "image"),
        (SHAPES, "labels"),
        (np.zeros((8, 8, 3), np.uint8), "labels"),
        (np.full((8, 8, 3), 255, np.uint8), "labels"),
    ],
)  # fmt: skip
def test_the_kind_is_judged_by_the_pixels(pixels, kind):
    assert judge_kind(pixels) == kind
