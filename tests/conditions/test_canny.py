import cv2
import numpy as np
import pytest
from jaxtyping import config
from PIL import Image
from tests.refusals import refused

from nexus_adapters.conditions import canny
from nexus_adapters.conditions.canny import auto_thresholds


def test_draws_white_lines_on_black_around_a_square():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = 255
    edges = canny(Image.fromarray(pixels))
    assert (edges.mode, edges.size) == ("RGB", (60, 40))
    lines = np.asarray(edges)
    assert set(np.unique(lines)) == {0, 255}
    assert (lines[..., 0] == lines[..., 1]).all()
    assert (lines[..., 0] == lines[..., 2]).all()
    rows, columns = np.nonzero(lines[..., 0])
    assert np.isin(rows, (9, 10, 29, 30)).sum() + np.isin(columns, (19, 20, 39, 40)).sum() >= len(rows)
    assert 60 <= len(rows) <= 80


def test_is_opencvs_canny_on_color():
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    expected = cv2.Canny(noise, 150, 700)
    assert 0 < expected.mean() < 100
    assert np.array_equal(np.asarray(canny(Image.fromarray(noise), 150, 700))[..., 0], expected)


def test_sees_edges_between_colors_of_one_brightness():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = (150, 0, 0)
    pixels[:, 8:] = (0, 76, 0)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert int(grey.max()) - int(grey.min()) <= 1
    assert np.asarray(canny(Image.fromarray(pixels))).any()


def test_thresholds_count_gradients_up_to_1530():
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[np.add.outer(range(9), range(9)) > 8] = 255  # a diagonal step: no 3x3 patch has a steeper gradient
    image = Image.fromarray(pixels)
    assert np.asarray(canny(image, 0, 1019)).any()
    assert not np.asarray(canny(image, 0, 1530)).any()


def test_higher_thresholds_draw_less():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    counts = [np.count_nonzero(canny(noise, low, high)) for low, high in [(0, 0), (200, 400), (500, 900)]]
    assert counts[0] > counts[1] > counts[2] > 0


def square(light, dark, noise):
    pixels = np.full((60, 60, 3), light, float)
    pixels[15:45, 15:45] = dark
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def test_automatic_thresholds_draw_pale_images_as_they_draw_strong_ones():
    strong, pale = square(240, 40, 0), square(130, 110, 0)
    assert np.asarray(canny(strong)).any()
    assert not np.asarray(canny(pale)).any()
    assert np.array_equal(canny(pale, auto=True), canny(strong, auto=True))


def test_automatic_thresholds_are_otsus_of_the_gradients_that_canny_compares():
    pixels = np.asarray(square(200, 100, 4))
    dx, dy = (cv2.Sobel(pixels, cv2.CV_64F, *order) for order in ((1, 0), (0, 1)))
    gradients = (abs(dx) + abs(dy)).max(axis=2).ravel()

    def spread(threshold):
        parts = gradients[gradients <= threshold], gradients[gradients > threshold]
        return sum(part.size * part.var() for part in parts if part.size)

    low, high = auto_thresholds(pixels)
    assert low == high / 2
    assert spread(high) <= min(spread(t) for t in np.unique(gradients)) * (1 + 1e-9)


def test_automatic_thresholds_of_a_flat_image_draw_nothing():
    assert not np.asarray(canny(Image.new("RGB", (9, 9), "red"), auto=True)).any()
    with refused("auto", received="low=5 and high=200"):
        canny(Image.new("RGB", (9, 9)), low=5, auto=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (641, 5)])
def test_any_size_is_kept(size):
    assert canny(Image.new("L", size)).size == size


@pytest.mark.parametrize(
    ("low", "high", "name", "received"),
    [
        (-1, 200, "low", "-1"),
        (float("nan"), 200, "low", "nan"),
        (float("inf"), float("inf"), "low", "inf"),
        (100, 99, "high", "99"),
        (100, float("nan"), "high", "nan"),
        (100, float("inf"), "high", "inf"),
        ("100", 200, "low", "'100'"),
        (100, None, "high", "None"),
    ],
)
def test_bad_thresholds_are_named(low, high, name, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused(name, received=received):
        canny(Image.new("RGB", (8, 8)), low, high)
