import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.conditions import tiny_models
from tests.refusals import refused

from nexus_adapters.conditions import extract
from nexus_adapters.conditions.depth import depth
from nexus_adapters.conditions.segmentation import PALETTES, segmentation
from nexus_adapters.conditions.transformers_models import load_model

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "ade20k": tiny_models.segformer(folder / "ade20k"),
        "coco": tiny_models.maskformer(folder / "coco"),
        "other": tiny_models.segformer(folder / "other", classes=19),
        "depth": tiny_models.dpt(folder / "depth"),
    }


def test_palettes():
    assert {name: len(colors) for name, colors in PALETTES.items()} == {
        "ade20k": 150,
        "coco": 133,
        "voc": 256,
    }
    # The classes that everyone knows by their color: ADE20K's wall, sky and person; COCO's person and sky.
    assert PALETTES["ade20k"][[0, 2, 12]].tolist() == [[120, 120, 120], [6, 230, 230], [150, 5, 61]]
    assert PALETTES["coco"][[0, 119]].tolist() == [[220, 20, 60], [70, 130, 180]]
    assert PALETTES["voc"][[0, 1, 2, 3, 15]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128],
    ]  # fmt: skip
    for name, colors in PALETTES.items():
        twice = len(colors) - len(np.unique(colors, axis=0))
        assert twice == (1 if name == "ade20k" else 0)  # ADE20K's mountain and plate share a grey


@pytest.mark.parametrize("name", ["ade20k", "coco"])
def test_each_pixel_has_its_classs_color(models, name):
    loaded = load_model("segmentation", models[name], "cpu")
    with torch.no_grad():
        output = loaded.network(**loaded.processor(images=[NOISE], return_tensors="pt"))
    labels = loaded.processor.post_process_semantic_segmentation(output, [(50, 70)])[0].numpy()
    drawn = segmentation(NOISE, models[name])
    assert (drawn.mode, drawn.size) == ("RGB", NOISE.size)
    assert np.array_equal(drawn, PALETTES[name][labels])
    assert np.array_equal(drawn, segmentation(NOISE, models[name], palette=name))


def test_a_model_whose_processor_cuts_images_into_squares(tmp_path):
    """EoMT's: its patches' places are lists and no tensors."""
    drawn = segmentation(NOISE, tiny_models.eomt(tmp_path / "eomt"))
    colors = {(0, 0, 0), *map(tuple, PALETTES["ade20k"].tolist())}
    assert drawn.size == NOISE.size
    assert {tuple(color) for color in np.asarray(drawn).reshape(-1, 3).tolist()} <= colors


def test_pixels_without_a_class_are_black(models, monkeypatch):
    loaded = load_model("segmentation", models["ade20k"], "cpu")
    labels = torch.full((50, 70), -1)
    labels[:25] = 4
    monkeypatch.setattr(
        type(loaded.processor), "post_process_semantic_segmentation", lambda *_, **__: [labels], raising=True
    )
    drawn = np.asarray(segmentation(NOISE, models["ade20k"]))
    assert (drawn[:25] == PALETTES["ade20k"][4]).all()
    assert (drawn[25:] == 0).all()


def test_several_images_of_several_sizes_keep_their_order(models):
    images = [NOISE, NOISE.resize((64, 40)), NOISE.rotate(180)]
    together = extract("segmentation", images, model=models["ade20k"])
    for image, drawn in zip(images, together, strict=True):
        single = extract("segmentation", image, model=models["ade20k"])
        assert (np.asarray(drawn) != np.asarray(single)).any(axis=2).mean() < 0.01


def test_a_model_of_other_classes_needs_a_palette(models):
    with refused("palette", received="auto", expected="ade20k, coco, voc for a model with 19 classes"):
        segmentation(NOISE, models["other"])
    drawn = segmentation(NOISE, models["other"], palette="voc")
    colors = {tuple(color) for color in PALETTES["voc"][:19].tolist()}
    assert {tuple(color) for color in np.asarray(drawn).reshape(-1, 3).tolist()} <= colors
    with refused("palette", received="coco with 133", expected="at least 150 colors"):
        segmentation(NOISE, models["ade20k"], palette="coco")
    with refused("palette", received="'ade'", expected="auto or one of ade20k, coco, voc"):
        segmentation(NOISE, models["ade20k"], palette="ade")


@pytest.mark.parametrize(
    ("draw", "model", "task"),
    [
        (segmentation, "no/such", "segmentation"),
        (depth, "ade20k", "depth estimation"),
        (segmentation, "depth", "segmentation"),
    ],
)
def test_what_is_no_such_model_is_refused_in_one_line(models, draw, model, task):
    with refused("model", received=f"{model}'", expected=f"a model for {task}") as caught:
        draw(NOISE, models.get(model, model))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fill_the_network_are_refused(models, tmp_path):
    """The library puts noise in the place of what is missing, with a warning."""
    folder = Path(models["ade20k"])
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    missing = next(name for name in weights if "decode_head.classifier.weight" in name)
    save_file(
        {k: v for k, v in weights.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "segformer"
    with refused("model", received="its weights lack decode_head.classifier.weight and 0 more"):
        segmentation(NOISE, str(tmp_path))


def test_an_absent_device_is_refused(models):
    with refused("device", received="'cuda:7'"):
        segmentation(NOISE, models["ade20k"], device="cuda:7")
