import math
import random

import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import picture
from tests.refusals import refused

from nexus_adapters.data.crop import Geometry, aspect_ratio


def test_one_size_for_all():
    geometry = Geometry(640, 512)
    assert {geometry.target(size) for size in [(1, 1), (5000, 3), (640, 512)]} == {(640, 512)}


def test_buckets_of_512():
    assert Geometry.bucketed(512).buckets == (
        (512, 512),
        (448, 576),
        (576, 448),
        (384, 640),
        (640, 384),
    )


@pytest.mark.parametrize(
    ("resolution", "step", "max_aspect"),
    [(512, 64, 2), (768, 64, 3), (1024, 64, 4), (120, 8, 2.5), (127, 64, 2)],
)
def test_buckets_keep_their_promises(resolution, step, max_aspect):
    buckets = Geometry.bucketed(resolution, step, max_aspect).buckets
    square = resolution // step * step
    assert (square, square) in buckets
    assert len(set(buckets)) == len(buckets)
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= max_aspect * min(width, height)
        if width != height:  # no side can grow
            assert min((width + step) * height, width * (height + step)) > resolution**2


def test_the_target_is_nearest_in_log_aspect():
    geometry = Geometry.bucketed(1024, max_aspect=4)
    assert len(geometry.buckets) > 10
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(1, 4000), draw.randint(1, 4000)
        aspect = math.log(size[0] / size[1])
        distances = {bucket: abs(math.log(bucket[0] / bucket[1]) - aspect) for bucket in geometry.buckets}
        assert distances[geometry.target(size)] == pytest.approx(min(distances.values()), abs=1e-12)
    assert geometry.target((300, 300)) == (1024, 1024)
    assert geometry.target((9000, 10)) == max(geometry.buckets)


def test_of_two_as_near_the_larger():
    assert Geometry(1, 1, ((100, 50), (60, 30))).target((2, 1)) == (100, 50)
    assert aspect_ratio((100, 50), (60, 30)) == 1


def test_it_is_a_value():
    assert Geometry.bucketed(512) == Geometry.bucketed(512)
    assert repr(Geometry.bucketed(512)) != repr(Geometry(512, 512)) != repr(Geometry(512, 448))


@pytest.mark.parametrize(
    ("make", "name", "received", "expected"),
    [
        (lambda: Geometry(0, 4), "width", 0, "1 to"),
        (lambda: Geometry(4, -1), "height", -1, "1 to"),
        (lambda: Geometry.bucketed(63), "resolution", 63, "64"),
        (lambda: Geometry.bucketed(64, step=0), "step", 0, "at least 1"),
        (lambda: Geometry.bucketed(64, max_aspect=0.5), "max_aspect", 0.5, "at least 1"),
        (lambda: Geometry.bucketed(64, max_aspect=math.nan), "max_aspect", "nan", "finite"),
        (lambda: Geometry.bucketed(64, max_aspect=math.inf), "max_aspect", "inf", "finite"),
    ],
)
def test_bad_arguments(make, name, received, expected):
    with refused(name, received, expected=expected):
        make()


SIZES = [(24, 16), (16, 24), (37, 53), (101, 40), (8, 8), (500, 30), (31, 32)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(16, 16), (24, 16), (40, 64)])
def test_fitting_is_resizing_and_cutting_the_middle_out(size, target):
    image = picture(1, *size)
    geometry = Geometry(*target)
    fitted = geometry.fit(image, target)
    assert fitted.size == target
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = (
        max(target[0], math.floor(size[0] * scale + 0.5)),
        max(target[1], math.floor(size[1] * scale + 0.5)),
    )
    left, top = (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2
    shrinks = resized[0] < size[0] or resized[1] < size[1]
    how = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    cut = image.resize(resized, how).crop((left, top, left + target[0], top + target[1]))
    assert (
        np.abs(np.asarray(fitted, int) - np.asarray(cut, int)).max() <= 2
    )  # Pillow takes the box in float32
    crop = geometry.crop_of(size, target)
    assert crop == ((size[1], size[0]), (top, left), (target[1], target[0]))


def test_what_fits_already_stays_as_it_is():
    image = picture(0, 16, 16)
    for options in ({}, {"kind": "image"}, {"kind": "labels"}):
        assert np.array_equal(Geometry(16, 16).fit(image, (16, 16), **options), image)
        odd = picture(0, 19, 16)  # cut, without being blurred by half a pixel
        assert np.array_equal(Geometry(16, 16).fit(odd, (16, 16), **options), np.asarray(odd)[:, 1:17])


def lines(width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, ::4] = 255
    return Image.fromarray(pixels)


def test_maps_make_no_halos_and_labels_no_mixtures():
    geometry = Geometry(16, 16)
    small, large = lines(8, 8), lines(64, 64)
    assert set(np.unique(geometry.fit(large, (16, 16), kind="image"))) == {64}  # each pixel: a line of four
    grown = np.asarray(geometry.fit(small, (16, 16), kind="image")).astype(int)
    assert np.abs(np.diff(grown[0, :, 0])).max() < 255  # linear, so no step is sharp
    for image in (small, large, lines(30, 30)):
        assert set(np.unique(geometry.fit(image, (16, 16), kind="labels"))) <= {0, 255}
    overshooting = geometry.fit(Image.blend(small, Image.new("RGB", (8, 8), "white"), 0.5), (16, 16))
    assert np.asarray(overshooting).min() < 127  # an image may have halos: they are what sharpness is made of


def test_the_same_window_is_kept_of_a_map_at_its_own_scale():
    """A map that is the picture itself, at half the size, is fitted to the same picture."""
    image = picture(3, 150, 90)
    half = image.resize((75, 45), Image.Resampling.BOX)
    geometry = Geometry(32, 32)
    fitted = np.asarray(geometry.fit(image, (32, 32), kind="image"), int)
    of_half = np.asarray(geometry.fit(half, (32, 32), kind="image", image_size=image.size), int)
    elsewhere = np.asarray(geometry.fit(image.crop((40, 0, 150, 90)), (32, 32), kind="image"), int)
    assert np.median(np.abs(fitted - of_half)) <= 3
    assert np.median(np.abs(fitted - elsewhere)) > 15


def test_the_part_of_the_image_and_not_of_the_rounded_map():
    """An image of 100x67 becomes 24x16, of which columns 4 to 20 stay; its map of 13x9 would be 23x16."""
    condition = picture(0, 13, 9)
    fitted = Geometry(16, 16).fit(condition, (16, 16), kind="image", image_size=(100, 67))
    box = (4 * 13 / 24, 0, 20 * 13 / 24, 9)
    assert np.array_equal(fitted, condition.resize((16, 16), Image.Resampling.BILINEAR, box=box))
    assert not np.array_equal(fitted, Geometry(16, 16).fit(condition, (16, 16), kind="image"))


@pytest.mark.parametrize("size", [(1024, 1024), (1000, 700), (300, 512)])
def test_lines_keep_their_value_in_every_bucket(size):
    geometry = Geometry.bucketed(128, step=32)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[size[1] // 2 + 1], pixels[:, size[0] // 3] = 255, 255
    target = geometry.target(size)
    fitted = np.asarray(geometry.fit(Image.fromarray(pixels), target, kind="lines"))[..., 0]
    assert set(np.unique(fitted)) == {0, 255}
    assert (fitted > 0).sum() <= 1.1 * sum(target)  # as thin as they were
    assert (fitted > 0).any(axis=0).all()
    assert (fitted > 0).any(axis=1).all()
