import numpy as np
import pytest
from jaxtyping import config
from PIL import Image, ImageDraw
from tests.conditions import tiny_models
from tests.refusals import refused

from nexus_adapters.conditions import sketch
from nexus_adapters.conditions.sketch import learned_edges

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def disc(background="white", color="black", noise=0):
    image = Image.new("RGB", (96, 96), background)
    ImageDraw.Draw(image).ellipse((20, 20, 76, 76), fill=color)
    if noise:
        pixels = np.asarray(image, int) + np.random.default_rng(1).normal(0, noise, (96, 96, 3))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image


def radii(lines, above=127):
    rows, columns = np.nonzero(np.asarray(lines)[..., 0] > above)
    return np.hypot(rows - 48, columns - 48)


def test_draws_a_white_line_on_the_dark_side_of_an_edge():
    lines = sketch(disc())
    assert (lines.mode, lines.size) == ("RGB", (96, 96))
    found = radii(lines)
    assert 150 < len(found) < 900
    assert found.min() > 23
    assert found.max() < 30
    outward = sketch(disc("black", "white"))
    assert radii(outward).mean() > found.mean() + 0.5


@pytest.mark.parametrize("grey", [0, 90, 255])
def test_flat_areas_give_no_ink_whatever_their_tone(grey):
    assert not np.asarray(sketch(Image.new("L", (40, 30), grey))).any()


def test_sees_lines_between_colors_of_one_brightness():
    lines = np.asarray(sketch(disc((150, 0, 0), (0, 76, 0))))
    assert lines.max() == 255


def test_the_average_along_lines_drops_specks_and_keeps_the_line():
    noisy = disc("white", (120, 120, 120), noise=18)
    loose, coherent = (radii(sketch(noisy, coherence=c)) for c in (0.0, 3.0))
    is_line = [np.abs(found - 27.5) < 4 for found in (loose, coherent)]
    assert is_line[1].mean() > is_line[0].mean() + 0.1
    assert is_line[1].sum() > 150


def test_options_make_lines_thicker_and_fewer():
    thin, thick = (np.count_nonzero(sketch(disc(), sigma=sigma)) for sigma in (0.8, 3.0))
    assert thick > 1.5 * thin
    faint = disc("white", (235, 235, 235))
    assert np.asarray(sketch(faint, threshold=0.02)).any()
    assert not np.asarray(sketch(faint, threshold=0.2)).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (641, 5)])
def test_any_size_is_kept(size):
    assert sketch(NOISE.resize(size)).size == size


def test_too_long_images_are_refused():
    with refused("image", received="32767x2", expected="at most 32766 pixels"):
        sketch(Image.new("RGB", (32767, 2)))


@pytest.mark.parametrize(
    ("options", "name", "expected", "received"),
    [
        ({"sigma": 0}, "sigma", "from 0.1 to 20", "0"),
        ({"threshold": float("nan")}, "threshold", "from 0 to 0.99", "nan"),
        ({"coherence": "3"}, "coherence", "from 0 to 50", "'3'"),
        ({"model": "edges.onnx", "sigma": 2.0}, "model", "defaults", "'edges.onnx' with sigma=2.0"),
        ({"model": "edges.onnx"}, "model", "an existing .onnx file", "'edges.onnx'"),
    ],
)
def test_bad_options_are_named(options, name, expected, received, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused(name, received, expected=expected):
        sketch(NOISE, **options)


def test_an_onnx_model_draws_the_edges_of_an_image_of_any_size(tmp_path):
    model = tiny_models.onnx_edges(tmp_path / "edges.onnx")
    drawn = np.asarray(sketch(NOISE, model=model))
    assert drawn.shape == (50, 70, 3)
    red = np.pad(np.asarray(NOISE, np.float64)[..., 0] / 255, 1, mode="edge")
    mean = sum(red[i : i + 50, j : j + 70] for i in range(3) for j in range(3)) / 9
    expected = 255 / (1 + np.exp(-4 * (red[1:-1, 1:-1] - mean)))
    logits = tiny_models.onnx_edges(tmp_path / "logits.onnx", last="Identity")
    assert np.abs(np.asarray(sketch(NOISE, model=logits), int) - drawn).max() <= 1
    # Zeros lie around what the network sees; on the right and at the bottom that is the padding.
    assert np.abs(drawn[1:, 1:, 0] - expected[1:, 1:]).max() <= 1


def test_a_transformers_model_of_one_class_draws_edges(tmp_path):
    model = tiny_models.segformer(tmp_path / "edges", classes=1)
    drawn = learned_edges(NOISE, model)
    assert (drawn.mode, drawn.size) == ("RGB", NOISE.size)
    assert np.array_equal(drawn, sketch(NOISE, model=model))
    assert len(np.unique(drawn)) > 1


def test_models_that_draw_no_edges_are_refused(tmp_path):
    with refused("model", received=" with 150", expected="one class"):
        sketch(NOISE, model=tiny_models.segformer(tmp_path / "classes"))
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with refused("model", received="broken.onnx' (", expected="an ONNX file"):
        sketch(NOISE, model=str(tmp_path / "broken.onnx"))
    nan = tiny_models.onnx_edges(tmp_path / "nan.onnx", last="Log")  # of negative numbers, too
    with refused("model", received="nan.onnx'", expected="finite"):
        sketch(NOISE, model=nan)
