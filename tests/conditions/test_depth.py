import numpy as np
import pytest
import torch
from PIL import Image
from tests.conditions import tiny_models
from tests.refusals import refused

from nexus_adapters.conditions import extract
from nexus_adapters.conditions.depth import depth, nearness
from nexus_adapters.conditions.transformers_models import load_model

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"dpt": tiny_models.dpt(folder / "dpt"), "glpn": tiny_models.glpn(folder / "glpn")}


def raw(image, model):
    """What the network says, by the library's own pipeline steps."""
    loaded = load_model("depth estimation", model, "cpu")
    with torch.no_grad():
        inputs = loaded.processor(images=[image], return_tensors="pt")
        found = loaded.network(**inputs)
    size = [(image.height, image.width)]
    return loaded.processor.post_process_depth_estimation(found, size)[0]["predicted_depth"].numpy()


@pytest.mark.parametrize("name", ["dpt", "glpn"])
def test_near_is_bright_and_the_scale_is_the_images_own(models, name):
    values = raw(NOISE, models[name]).astype(np.float64)
    near = 1 / np.maximum(values, 1e-3) if name == "glpn" else values  # glpn: meters
    expected = (near - near.min()) / np.ptp(near)
    (found,) = nearness([NOISE], models[name])
    assert found.dtype == np.uint16
    assert (found.min(), found.max()) == (0, 65535)
    assert len(np.unique(found)) > 300  # more than 8 bits hold
    assert np.abs(found / 65535 - expected).max() <= 1 / 65535
    drawn = np.asarray(depth(NOISE, models[name]))
    assert drawn.shape == (50, 70, 3)
    assert (drawn == drawn[..., :1]).all()
    assert np.abs(drawn[..., 0] / 255 - expected).max() <= 0.501 / 255


def test_what_a_model_predicts_can_be_told(models):
    auto, told = (
        nearness([NOISE], models["glpn"], predicts=predicts)[0] for predicts in ("auto", "distance")
    )
    assert np.array_equal(auto, told)
    (other,) = nearness([NOISE], models["glpn"], predicts="nearness")
    assert np.corrcoef(auto.ravel(), other.ravel())[0, 1] < 0
    with refused("predicts", received="'far'", expected="auto, nearness, distance"):
        depth(NOISE, models["dpt"], predicts="far")


def test_metric_variants_of_an_architecture_are_told_by_their_config(models, monkeypatch):
    loaded = load_model("depth estimation", models["dpt"], "cpu")
    monkeypatch.setattr(loaded.network.config, "depth_estimation_type", "metric", raising=False)
    (metric,) = nearness([NOISE], models["dpt"])
    (told,) = nearness([NOISE], models["dpt"], predicts="distance")
    assert np.array_equal(metric, told)


def test_padding_is_undone_where_a_processor_pads(models, monkeypatch):
    """As ZoeDepth's does, whose own processor needs torchvision (transformers 5.23)."""
    kind = type(load_model("depth estimation", models["dpt"], "cpu").processor)
    real, seen = kind.post_process_depth_estimation, []

    def post_process(self, outputs, source_sizes=None, target_sizes=None):
        seen.append((source_sizes, target_sizes))
        return real(self, outputs, target_sizes)

    monkeypatch.setattr(kind, "post_process_depth_estimation", post_process)
    nearness([NOISE, NOISE], models["dpt"])
    assert seen == [([(50, 70)] * 2, [(50, 70)] * 2)]


def test_several_images_of_several_sizes_keep_their_order(models):
    images = [NOISE, NOISE.resize((64, 40)), NOISE.rotate(180), NOISE.convert("L")]
    together = extract("depth", images, model=models["dpt"])
    assert [drawn.size for drawn in together] == [image.size for image in images]
    for image, drawn in zip(images, together, strict=True):
        single = np.asarray(extract("depth", image, model=models["dpt"]), int)
        assert np.abs(np.asarray(drawn, int) - single).max() <= 1  # products of matrices round by the batch


def test_an_image_without_depth_is_black(models, monkeypatch):
    loaded = load_model("depth estimation", models["dpt"], "cpu")
    with torch.no_grad():
        for parameter in (flat := loaded.network.head.head[-2]).parameters():
            monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    assert flat.weight.abs().sum() == 0
    assert not np.asarray(depth(NOISE, models["dpt"])).any()


def test_a_model_is_loaded_once(models):
    assert load_model("depth estimation", models["glpn"]) is load_model(
        "depth estimation", models["glpn"], "cpu"
    )


def test_values_that_are_not_finite_are_refused(models, monkeypatch):
    loaded = load_model("depth estimation", models["dpt"], "cpu")
    bias = loaded.network.head.head[-2].bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with refused("model", received="dpt'", expected="finite"):
        depth(NOISE, models["dpt"])


def test_an_image_that_a_model_cannot_take_is_told(models):
    with refused("model", received=models["glpn"], expected="depth estimation that can process this image"):
        depth(NOISE.resize((20, 20)), models["glpn"])


def test_a_model_that_cannot_be_loaded_is_refused_with_the_ways_out(tmp_path):
    with refused("model", received="none'", hint="--option model=FOLDER_OR_ID"):
        depth(Image.new("RGB", (64, 64)), model=str(tmp_path / "none"))
