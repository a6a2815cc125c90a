import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import picture
from tests.refusals import refused

from nexus_adapters.conditions import extract
from nexus_adapters.data import conditioned
from nexus_adapters.data.conditioned import fit_sample
from nexus_adapters.data.geometry import Geometry
from nexus_adapters.data.samples import BadSample, Sample, Source
from nexus_adapters.data.scene_source import SceneSource


class OneSample:
    """A source of one sample."""

    def __init__(self, image, condition=None):
        self.sample = Sample("the sample", image, condition, ("a", "b"))

    def __len__(self):
        return 1

    def key(self, index):
        return self.sample.key

    def content_hash(self, index):
        return ""

    def stamp(self, index):
        return None

    def size(self, index):
        return self.sample.image.size

    def load(self, index):
        return self.sample


def test_a_missing_map_is_drawn_from_the_fitted_image():
    geometry = Geometry(96, 64)
    sample = fit_sample(SceneSource(3), 1, geometry, "canny", {"low": 400, "high": 900})
    scene = SceneSource(3).load(1)
    fitted = geometry.fit(scene.image, (96, 64))
    assert np.array_equal(sample.image, fitted)
    assert np.array_equal(sample.condition, extract("canny", fitted, low=400, high=900))
    assert not np.array_equal(sample.condition, extract("canny", fitted))
    assert (sample.key, sample.captions) == ("scene 1", scene.captions)


def test_sdxl_is_told_of_size_and_crop():
    image = picture(0, 300, 100)
    sample = fit_sample(OneSample(image), 0, Geometry(64, 64), "canny", {})
    assert sample.original_size == (100, 300)
    assert sample.crop_top_left == (0, 64)
    assert sample.time_ids == (100.0, 300.0, 0.0, 64.0, 64.0, 64.0)
    assert all(isinstance(number, float) for number in sample.time_ids)


def test_buckets_give_the_nearest_shape():
    geometry = Geometry.bucketed(128, step=32)
    for size in [(300, 300), (300, 200), (200, 300)]:
        sample = fit_sample(OneSample(picture(0, *size)), 0, geometry, "canny", {})
        assert sample.image.size == sample.condition.size == geometry.target(size)


def framed(width, height):
    """A picture whose left half is black and whose upper half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :, 0] = 255
    pixels[: height // 2, :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("scale", [0.5, 1, 2, 3])
def test_a_map_of_another_size_shows_the_same_part(scale):
    image = framed(200, 100)
    condition = framed(int(200 * scale), int(100 * scale))
    sample = fit_sample(OneSample(image, condition), 0, Geometry(40, 40), "canny", {})
    assert sample.condition.size == (40, 40)
    difference = np.abs(np.asarray(sample.image, int) - np.asarray(sample.condition, int))
    assert np.median(difference) == 0
    assert (difference.max(axis=2) > 60).sum() <= 2 * 40 * 2  # at most two pixels beside either edge


def test_a_given_map_is_not_drawn_again(monkeypatch):
    monkeypatch.setattr(conditioned, "extract", None)
    condition = Image.new("RGB", (24, 16), (1, 2, 3))
    sample = fit_sample(OneSample(picture(), condition), 0, Geometry(24, 16), "no such extractor", {})
    assert np.array_equal(sample.condition, condition)


def test_labels_are_not_mixed():
    labels = framed(37, 37)
    for name, is_mixed in [("canny", True), ("segmentation", False)]:
        sample = fit_sample(OneSample(picture(0, 37, 37), labels), 0, Geometry(16, 16), name, {})
        assert (set(np.unique(sample.condition)) - {0, 255} != set()) == is_mixed


@pytest.mark.parametrize("size", [(206, 100), (100, 200), (100, 103), (50, 23)])
def test_another_aspect_is_a_bad_sample_with_both_sizes(size):
    source = OneSample(picture(0, 200, 100), picture(1, *size))
    with pytest.raises(
        BadSample,
        match=rf"^condition: .* the image, 200x100, got {size[0]}x{size[1]} in 'the sample'$",
    ):
        fit_sample(source, 0, Geometry(16, 16), "canny", {})


@pytest.mark.parametrize(
    ("image", "size"), [((1000, 500), (1009, 500)), ((100, 67), (50, 33)), ((100, 67), (13, 9))]
)
def test_rounding_to_whole_pixels_is_no_other_aspect(image, size):
    source, geometry = OneSample(picture(0, *image), picture(1, *size)), Geometry(16, 16)
    fitted = geometry.fit(picture(1, *size), (16, 16), is_map=True, window_of=image)
    assert np.array_equal(fit_sample(source, 0, geometry, "canny", {}).condition, fitted)


def test_wrong_extractors_and_options_are_no_bad_samples():
    for argument, name, options in [("name", "cany", {}), ("options", "canny", {"lo": 1})]:
        with refused(argument, name if argument == "name" else "lo"):
            fit_sample(SceneSource(1), 0, Geometry(16, 16), name, options)


def test_the_sample_is_a_source():
    assert isinstance(OneSample(picture()), Source)
