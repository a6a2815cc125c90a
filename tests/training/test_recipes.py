"""The package's recipes, with configs in the true shapes of their bases; nothing is downloaded."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
from tests import tiny
from tests.training.runs import write_images

from nexus_adapters.methods import find_method
from nexus_adapters.study.plan import Study
from nexus_adapters.study.results import is_planned, load_result
from nexus_adapters.training.checks import check_base
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
    "sd15-canny-from-t2i": (
        "85,817,600 parameters",
        "859,520,964",
        "5,000 with batch size 8 x 1 accumulation steps",
    ),
    "sdxl-canny-from-t2i": (
        "94,030,080 parameters",
        "2,567,463,684",
        "5,000 with batch size 4 x 4 accumulation steps",
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
    if recipe.stem.endswith("-from-t2i"):
        settings.append("adapter.start_from=")  # from what is not here
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
    recipe = next(path for path in RECIPES if path.stem == "sd15-canny")
    folder = write_images(tmp_path / "images", count=20)
    settings = [f"output_dir={tmp_path / 'o'}", f"base.path={bases / 'sd15'}", f"data.path={folder}"]
    settings += ["training.mixed_precision=no", "training.device=cpu"]

    def gib(*more):
        report = dry_run(load_recipe(recipe, [*settings, *more]))
        (line,) = [line for line in report.splitlines() if line.startswith("memory")]
        return float(line.partition("base ")[2].partition(",")[0]), float(
            re.search(r"samples ([\d.]+)", line)[1]
        )

    base, activations = gib()
    assert base == pytest.approx(859_520_964 * 4 / 2**30, abs=0.01)
    assert gib("training.batch_size=4")[1] == pytest.approx(2 * activations, rel=0.1)
    assert gib("training.gradient_checkpointing=true")[1] < 0.3 * activations


T2I = {  # as TencentARC's are, but narrow: those of SD 1.5 read one channel
    "sd15": {"in_channels": 1, "channels": [8, 16, 24, 24], "downscale_factor": 8},
    "sdxl": {"in_channels": 3, "channels": [8, 16, 24, 24], "downscale_factor": 16},
}


@pytest.fixture
def t2i(request, tmp_path):
    """A random T2I-Adapter of the base's architecture, in the files that the Hub has: pickled tensors."""
    torch.manual_seed(3)
    kind = "full_adapter" if request.param == "sd15" else "full_adapter_xl"
    made = T2IAdapter(**T2I[request.param], num_res_blocks=2, adapter_type=kind).eval()
    made.save_pretrained(tmp_path / "t2i", safe_serialization=False)
    return made


@pytest.mark.parametrize("method", ["prime", "slim"])
@pytest.mark.parametrize("t2i", T2I, indirect=True)
def test_a_recipe_starts_from_a_t2i_adapters_features(t2i, tmp_path, method, request):
    """Before its first step Prime gives exactly these; Slim starts from the nearest fit, and says so."""
    name = request.node.callspec.params["t2i"]
    pipe = tiny.sd15() if name == "sd15" else tiny.sdxl()
    pipe.save_pretrained(tmp_path / "base")
    recipe = RECIPES[0].with_name(f"{name}-canny-from-t2i.toml")
    settings = [f"base.path={tmp_path / 'base'}", "base.variant=", f"adapter.start_from={tmp_path / 't2i'}"]
    made = load_recipe(recipe, [*settings, f"output_dir={tmp_path / 'out'}", f"adapter.method={method}"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base, options, start = check_base(made)
    adapter = find_method(method).build(base, pipe.unet, options).eval()
    adapter.load_state_dict(adapter.state_dict() | start)
    maps = tiny.condition(2, 128, 128)[:, :1]  # gray
    text = torch.randn(2, 5, adapter.config.text_width)
    with torch.no_grad():
        found = adapter(maps.expand(-1, 3, -1, -1), text)
        wanted = t2i(maps.expand(-1, t2i.config.in_channels, -1, -1))
    pairs = list(zip(found, wanted, strict=True))
    assert len(pairs) == 4
    is_near = [torch.allclose(ours, theirs, atol=1e-6, rtol=1e-5) for ours, theirs in pairs]
    said = [str(warning.message) for warning in caught]
    if method == "prime":
        assert all(is_near)
        # Only a stem for one channel is rounded, where it is divided by three.
        assert name == "sd15" or all(torch.equal(ours, theirs) for ours, theirs in pairs)
    else:
        assert not any(is_near)
    assert any("least-squares fit" in text for text in said) == (method == "slim")


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
