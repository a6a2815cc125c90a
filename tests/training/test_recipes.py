"""The package's recipes, with configs in the true shapes of their bases; nothing is downloaded."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tests import tiny
from tests.training.runs import write_images

from nexus_adapters.study.plan import Study
from nexus_adapters.study.results import is_planned, load_result
from nexus_adapters.training.recipe import load_recipe
from nexus_adapters.training.run import dry_run

PLANS = Path(__file__).parents[2] / "benchmarks" / "plans"
RECIPES = [  # the others are evaluations
    path
    for path in sorted((Path(__file__).parents[2] / "src" / "nexus_adapters" / "recipes").glob("*.toml"))
    if not path.name.startswith("evaluate-")
]
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with the configs of SD 1.5 and SDXL, and empty files for weights: a dry run reads none."""
    root = tmp_path_factory.mktemp("bases")
    tiny.sd15().save_pretrained(root / "sd15")
    tiny.sdxl().save_pretrained(root / "sdxl")
    with torch.device("meta"):
        shapes = {"sd15": {"cross_attention_dim": 768, "attention_head_dim": 8}, "sdxl": SDXL}
        for name, config in shapes.items():
            UNet2DConditionModel(**config).save_config(root / name / "unet")
            AutoencoderKL(block_out_channels=(128, 256, 512, 512), **_BLOCKS).save_config(root / name / "vae")
    for file in root.rglob("*.safetensors"):
        file.write_bytes(b"")
    return root


_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}

EXPECTED = {
    "embedded-canny": (
        "1,197,120 parameters",
        "7,585,804",
        "1,000 with batch size 32 x 1 accumulation steps",
    ),
    "sd15-canny": (
        "85,817,600 parameters",
        "859,520,964",
        "200,000 with batch size 2 x 4 accumulation steps",
    ),
    "sdxl-canny": (
        "94,030,080 parameters",
        "2,567,463,684",
        "30,000 with batch size 4 x 4 accumulation steps",
    ),
}


DEFAULT = {"embedded-canny", "sd15-canny"}


@pytest.mark.parametrize(
    "recipe",
    [path if path.stem in DEFAULT else pytest.param(path, marks=pytest.mark.full) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_fits_its_base(recipe, bases, tmp_path):
    settings = [f"output_dir={tmp_path / 'out'}"]
    if not recipe.stem.startswith("embedded"):
        folder = write_images(tmp_path / "images", count=20)
        lines = (folder / "metadata.jsonl").read_text().replace('"text"', '"condition": "00.png", "text"')
        (folder / "metadata.jsonl").write_text(lines)
        settings += [
            f"base.path={bases / recipe.stem.partition('-')[0]}",
            "base.variant=",
            f"data.path={folder}",
        ]
    report = dry_run(load_recipe(recipe, settings))
    name = recipe.stem if recipe.stem in EXPECTED else "sd15-canny"
    for expected in EXPECTED[name]:
        assert expected in report
    assert "GiB" in report


@pytest.mark.full
def test_the_estimate_of_memory_is_near_what_is_known(bases, tmp_path):
    """SD 1.5's UNet in float32 is 3.2 GiB; checkpointing saves most of the activations."""
    folder = write_images(tmp_path / "images", count=20)
    settings = [f"output_dir={tmp_path / 'o'}", f"base.path={bases / 'sd15'}", f"data.path={folder}"]
    settings += ["training.mixed_precision=no", "training.device=cpu"]

    def gib(*more):
        line = dry_run(load_recipe(RECIPES[1], [*settings, *more])).splitlines()[-1]
        return float(line.partition("base ")[2].partition(",")[0]), float(line.rpartition(" ")[2])

    base, activations = gib()
    assert base == pytest.approx(859_520_964 * 4 / 2**30, abs=0.01)
    assert gib("training.batch_size=4")[1] == pytest.approx(2 * activations, rel=0.1)
    assert gib("training.gradient_checkpointing=true")[1] < 0.3 * activations


@pytest.mark.parametrize(
    "plan", ["ablations", *(pytest.param(plan, marks=pytest.mark.full) for plan in ("study", "sweep"))]
)
def test_what_was_measured_is_of_the_plans_as_they_are(plan):
    """Names and options have changed since; the networks and all that decides them have not."""
    study = Study(PLANS / f"{plan}.toml")
    found = {cell: load_result(study.results, cell) for cell in study.cells()}
    measured = {cell: result for cell, result in found.items() if result is not None}
    assert len(measured) > 0.9 * len(found)
    assert [cell.name for cell, result in measured.items() if not is_planned(study, cell, result)] == []
