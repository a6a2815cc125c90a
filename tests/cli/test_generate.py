import hashlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tests import tiny
from tests.single_file import save_single_file
from tests.weights import write_tiny

from nexus_adapters import NexusAdapter, embedded, extract, load_embedded
from nexus_adapters.cli import main
from nexus_adapters.cli.control_arguments import BALANCES, POLICIES
from nexus_adapters.cli.files import read_settings
from nexus_adapters.cli.generate import native_side
from nexus_adapters.cli.structure import image_size
from nexus_adapters.injection import Control, attach, balance, control, strength

STEPS = 2


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def weights(tiny_weights, monkeypatch):
    monkeypatch.setattr(embedded, "WEIGHTS", tiny_weights)
    return tiny_weights


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded: what is checked is checked before."""

    def load(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("nexus_adapters.cli.generate.load_model", load)


@pytest.fixture
def edges(tmp_path):
    path = tmp_path / "edges.png"
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[30:90:12, 20:100] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((160, 120)).convert("RGB").save(path)
    return path


def run(source, out, *more, prompt="a red star"):
    option = "--image" if source.name.startswith("photo") else "--map"
    options = ["--prompt", prompt, option, source, "--out", out, "--steps", STEPS, *more]
    return main(["generate", *map(str, options)])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_embedded_model_is_the_default(edges, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert run(edges, out, "--seed", 3) == 0
    pipe = tiny.quiet(load_embedded())
    with Image.open(edges) as condition:
        expected = pipe(
            "a red star",
            negative_prompt="",
            image=condition,
            num_inference_steps=STEPS,
            guidance_scale=embedded.EMBEDDED_GUIDANCE,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
    assert np.array_equal(pixels(out), np.asarray(expected))
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 128x128, seed 3\n"
    assert "2/2" in captured.err  # the pipeline's progress bar
    assert "warning" not in captured.err


def test_settings_make_the_image_again(edges, tmp_path):
    options = ["--negative", "a cat", "--seed", 5, "--guidance", 2.5, "--scale", 0.7, "--start", 0.1]
    options += ["--end", 0.9, "--policy", "per_branch", "--width", 64, "--adapter", "slim"]
    assert run(edges, tmp_path / "a.png", *options) == 0
    settings = read_settings(tmp_path / "a.png")
    names = ["negative", "seed", "guidance", "scale", "start", "end", "policy", "width", "height"]
    again = [part for name in names for part in (f"--{name}", settings[name])]
    again += ["--adapter", str(settings["adapter"]).removeprefix("embedded ").removesuffix("-residual")]
    assert run(edges, tmp_path / "b.png", *again, prompt=settings["prompt"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (settings["width"], settings["height"], settings["steps"]) == (64, 64, STEPS)
    assert settings["base"] == "embedded"
    assert set(settings["versions"]) >= {"nexus-adapters", "torch", "diffusers"}
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    assert (settings["source"], settings["source_file"]) == ("map", str(edges))
    assert len(settings["source_sha256"]) == len(settings["adapter_sha256"]) == 64
    unet = embedded.WEIGHTS / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    assert settings["base_unet_sha256"] == hashlib.sha256(unet.read_bytes()).hexdigest()
    assert settings["options"] == {}  # a map is taken as it is


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", 1),
        ("--steps", 3),
        ("--guidance", 9),
        ("--negative", "blurry"),
        ("--scale", 0.2),
        ("--start", 0.5),
        ("--end", 0.4),
        ("--policy", "per_branch"),
        ("--policy", "cond_only"),
        ("--adapter", "slim"),
        ("--invert",),
        ("--width", "64"),
        ("--height", "64"),
        ("--dtype", "bfloat16"),
        ("--level-scales", "0,1,1,1"),
        ("--balance", "prompt"),
        ("--balance", "control"),
        ("--scheduler", "euler"),
        ("--scheduler", "dpm++-karras"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_option_has_an_effect(edges, tmp_path, options, plain):
    assert run(edges, tmp_path / "out.png", *options) == 0
    changed = pixels(tmp_path / "out.png")
    assert changed.shape != plain.shape or np.abs(changed - plain).max() > 0


@pytest.fixture(scope="module")
def plain(tiny_weights, tmp_path_factory):
    """The image without any option."""
    folder = tmp_path_factory.mktemp("plain")
    marks = np.zeros((128, 128, 3), np.uint8)
    marks[30:90:12, 20:100] = 255
    Image.fromarray(marks).save(folder / "edges.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "WEIGHTS", tiny_weights)
        assert run(folder / "edges.png", folder / "out.png") == 0
    return pixels(folder / "out.png")


def test_several_images_count_their_seeds_on(edges, tmp_path, capsys):
    assert run(edges, tmp_path / "out.png", "--num", 3, "--seed", 4) == 0
    made = sorted(file.name for file in tmp_path.glob("out*"))
    assert made == ["out-0001.png", "out-0002.png", "out-0003.png"]
    assert [read_settings(tmp_path / name)["seed"] for name in made] == [4, 5, 6]
    assert run(edges, tmp_path / "single.png", "--seed", 5) == 0
    assert np.array_equal(pixels(tmp_path / "single.png"), pixels(tmp_path / "out-0002.png"))
    assert not np.array_equal(pixels(tmp_path / "out-0001.png"), pixels(tmp_path / "out-0002.png"))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_existing_files_are_kept_and_nothing_is_done(edges, tmp_path, capsys, no_model):
    kept = tmp_path / "out-0002.png"
    kept.write_text("mine")
    assert run(edges, tmp_path / "out.png", "--num", 2) == 2
    assert capsys.readouterr().err.startswith("nexus generate: error: --out: expected a new file; received")
    assert kept.read_text() == "mine"
    assert not (tmp_path / "out-0001.png").exists()


def test_a_file_that_comes_during_the_work_is_kept_and_so_is_the_image(edges, tmp_path, monkeypatch, capsys):
    drawn = Image.new("RGB", (128, 128))

    def write_meanwhile(*_):
        (tmp_path / "out.png").write_text("mine")
        return drawn

    monkeypatch.setattr("nexus_adapters.cli.generate.generate", write_meanwhile)
    assert run(edges, tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_text() == "mine"
    (beside,) = tmp_path.glob("out-*.png")
    assert read_settings(beside)["seed"] == 0
    assert str(beside) in capsys.readouterr().out


def test_force_overwrites(edges, tmp_path):
    out = tmp_path / "out.png"
    out.write_text("mine")
    assert run(edges, out, "--force") == 0
    assert read_settings(out)["seed"] == 0


def test_a_photo_is_resized_before_its_edges_are_drawn(photo, tmp_path, monkeypatch):
    seen = []
    blank = Image.new("RGB", (80, 64))
    monkeypatch.setattr(
        "nexus_adapters.cli.generate.generate", lambda _, controls, settings: seen.extend(controls) or blank
    )
    assert run(photo, tmp_path / "out.png", "--width", 80, "--low", 10, "--high", 30) == 0
    with Image.open(photo) as image:
        expected = extract("canny", image.resize((80, 64), Image.Resampling.LANCZOS), low=10, high=30)
    found = seen[0].condition[0].permute(1, 2, 0) * 255
    assert np.array_equal(found.round().byte(), expected)
    assert np.asarray(expected).any()


def test_a_photo_becomes_an_image_with_its_options_in_the_settings(photo, tmp_path):
    assert run(photo, tmp_path / "out.png", "--low", 10, "--high", 30) == 0
    settings = read_settings(tmp_path / "out.png")
    assert (settings["source"], settings["condition"]) == ("image", "canny")
    assert settings["options"] == {"low": 10, "high": 30, "auto": False}
    assert run(photo, tmp_path / "plain.png") == 0
    assert read_settings(tmp_path / "plain.png")["options"] == {"low": 100, "high": 200, "auto": False}
    assert pixels(tmp_path / "out.png").shape == (120, 160, 3)


@pytest.mark.parametrize(
    ("source", "given", "expected"),
    [
        ((128, 128), (None, None), (128, 128)),
        ((250, 131), (None, None), (248, 128)),  # rounded down
        ((256, 256), (None, None), (256, 256)),  # four times the area: kept
        ((4000, 3000), (None, None), (144, 112)),  # far more: the base's own area
        ((3000, 400), (None, None), (352, 48)),
        ((4000, 3000), (512, None), (512, 384)),
        ((4000, 3000), (None, 96), (128, 96)),
        ((4000, 3000), (40, 24), (40, 24)),
        ((4000, 8), (64, None), (64, 8)),
    ],
)
def test_size(source, given, expected):
    assert image_size(source, *given, native=128) == expected


def test_inverted_maps_are_told_and_can_be_turned(edges, tmp_path, capsys):
    with Image.open(edges) as image:
        Image.eval(image, lambda value: 255 - value).save(tmp_path / "dark.png")
    assert run(tmp_path / "dark.png", tmp_path / "a.png") == 0
    warning = "nexus generate: warning: --map: the map looks inverted, dark lines on white;"
    assert warning in capsys.readouterr().err
    assert run(tmp_path / "dark.png", tmp_path / "b.png", "--invert") == 0
    assert "warning" not in capsys.readouterr().err
    assert run(edges, tmp_path / "c.png") == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png"))


def test_a_cut_prompt_is_told(edges, tmp_path, capsys):
    assert run(edges, tmp_path / "out.png", prompt="a red star " * 9) == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "was truncated" in err


def test_base_and_adapter_from_folders(edges, tmp_path, weights):
    base, adapter = weights / "base", weights / "canny" / "prime-residual"
    given = ["--base", base, "--adapter", adapter, "--guidance", embedded.EMBEDDED_GUIDANCE]
    assert run(edges, tmp_path / "a.png", *given) == 0
    assert run(edges, tmp_path / "b.png", "--adapter", adapter) == 0
    assert run(edges, tmp_path / "c.png") == 0
    for name in "ab":
        assert np.array_equal(pixels(tmp_path / f"{name}.png"), pixels(tmp_path / "c.png"))
    settings = read_settings(tmp_path / "a.png")
    assert (settings["base"], settings["adapter"]) == (str(base), str(adapter))
    assert settings["adapter_sha256"] == read_settings(tmp_path / "c.png")["adapter_sha256"]


def test_another_kind_of_map_has_adapters_of_its_own(edges, tmp_path, weights, monkeypatch):
    shutil.copytree(weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "canny")
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "weights")
    assert run(edges, tmp_path / "a.png", "--condition", "sketch", "--adapter", "slim") == 0
    settings = read_settings(tmp_path / "a.png")
    assert (settings["condition"], settings["adapter"]) == ("sketch", "embedded slim-residual")


def test_the_unets_hash_is_of_what_is_loaded(edges, tmp_path, weights):
    base, adapter = tmp_path / "base", weights / "canny" / "slim"
    shutil.copytree(weights / "base", base)
    assert run(edges, tmp_path / "a.png", "--base", base, "--adapter", adapter) == 0
    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert run(edges, tmp_path / "b.png", "--base", base, "--adapter", adapter) == 0
    found = [read_settings(tmp_path / f"{name}.png")["base_unet_sha256"] for name in "ab"]
    assert found == [hashlib.sha256(unet.read_bytes()).hexdigest()] * 2


def test_as_many_steps_as_the_schedule_has_are_refused_where_it_begins_too_late(
    edges, tmp_path, weights, capsys
):
    """Stable Diffusion's own setting: leading spacing with an offset of 1."""
    base, adapter = tmp_path / "base", weights / "canny" / "slim"
    shutil.copytree(weights / "base", base)
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.save_pretrained(base / "scheduler")
    given = ["--base", base, "--adapter", adapter, "--steps", 1000]
    assert run(edges, tmp_path / "a.png", *given) == 2
    expected = "--steps: expected fewer than the 1000 timesteps of training; received 1000"
    assert expected in capsys.readouterr().err


def test_an_adapter_for_another_vae_is_the_adapters_fault(edges, tmp_path, weights, capsys):
    unet = UNet2DConditionModel.from_pretrained(weights / "base", subfolder="unet")
    NexusAdapter.for_unet(unet, vae_scale_factor=16).save_pretrained(tmp_path / "adapter")
    given = ["--base", weights / "base", "--adapter", tmp_path / "adapter"]
    assert run(edges, tmp_path / "a.png", *given) == 2
    expected = (
        "--adapter: expected 8 pixels of the condition per latent, as the pipeline's VAE has; received 16"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_help_tells_the_embedded_bases_guidance(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"embedded base('s,|:) {embedded.EMBEDDED_GUIDANCE:g}\)", shown)


def test_guidance_of_a_given_base_is_the_stock_one(edges, tmp_path, weights):
    given = ["--base", weights / "base", "--adapter", weights / "canny" / "slim"]
    assert run(edges, tmp_path / "a.png", *given) == 0
    assert run(edges, tmp_path / "b.png") == 0
    assert read_settings(tmp_path / "a.png")["guidance"] == 7.5
    assert read_settings(tmp_path / "b.png")["guidance"] == embedded.EMBEDDED_GUIDANCE


def test_scale_0_is_the_base(edges, tmp_path):
    assert run(edges, tmp_path / "out.png", "--scale", 0) == 0
    base = tiny.quiet(embedded.load_embedded_base())
    expected = base(
        "a red star",
        negative_prompt="",
        num_inference_steps=STEPS,
        guidance_scale=embedded.EMBEDDED_GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "nan"], "--scale: expected a finite number; received nan"),
        (["--start", "inf"], "--start: expected a finite number; received inf"),
        (["--start", "-0.1"], "--start: expected a number from 0 to 1; received -0.1"),
        (["--end", "1.5"], "--end: expected a number from --start, 0.0, to 1; received 1.5"),
        (
            ["--start", "0.6", "--end", "0.5"],
            "--end: expected a number from --start, 0.6, to 1; received 0.5",
        ),
        (["--guidance", "nan"], "--guidance: expected a finite number; received nan"),
        (["--steps", "0"], "--steps: expected an integer from 1 to 1000; received 0"),
        (["--num", "0"], "--num: expected an integer from 1 to 9999; received 0"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to"),
        (["--width", "100"], "--width: expected a positive multiple of 8; received 100"),
        (["--height", "-8"], "--height: expected a positive multiple of 8; received -8"),
        (
            ["--condition", "cany"],
            "--condition: expected one of canny, depth, segmentation, sketch; received 'cany'",
        ),
        (["--low", "3"], "--low: expected --image beside it"),
        (["--scale", "1", "--scale", "2"], "--scale: expected 1 or 1, as many as maps; received 2"),
        (["--level-scales", "1,x"], "--level-scales: expected numbers with commas between them"),
        (
            ["--balance", "prompt", "--policy", "positive"],
            "--balance: expected no --policy and no --level-scales beside it; received 'prompt' with them",
        ),
        (["--mask", "none.png"], "--mask: expected an image file; received 'none.png', which does not exist"),
        (["--lora", "none"], "--lora: expected a file, a folder or a Hub id; received 'none', which is none"),
        (["--lora-scale", "1"], "--lora-scale: expected --lora beside it; received it alone"),
        (
            ["--base-config", "."],
            "--base-config: expected --base FILE.safetensors beside it; received another base",
        ),
        (
            ["--base", "none.safetensors", "--adapter", "a/b"],
            "--base: expected an existing file; received 'none.safetensors'",
        ),
        (["--out", "a.jpg"], "--out: expected a file name that ends in .png; received 'a.jpg'"),
        (["--out", "none/a.png"], "--out: expected an existing folder; received 'none'"),
        (["--max-megapixels", "0.001"], "--map: expected an image of at most 0.001 megapixels"),
        (["--base", "none"], "--adapter: expected a folder or Hub id beside --base; received none"),
        (
            ["--base", "./none", "--adapter", "prime"],
            "--base: expected a folder or the Hub id of a Stable Diffusion pipeline; received './none', "
            "which does not exist and is no Hub id",
        ),
        (
            ["--base", ".", "--adapter", "prime"],
            "--base: expected a folder or the Hub id of a Stable Diffusion pipeline; received '.', which has "
            "no model_index.json",
        ),
        (
            ["--adapter", "prim"],
            "--adapter: expected a folder, a Hub id, or without --base one of prime, slim; received 'prim'\n",
        ),
        (
            ["--base", "a/b", "--adapter", "prime"],
            "--adapter: expected a folder, a Hub id, or without --base one of prime, slim; received 'prime' "
            "beside --base\n",
        ),
        (
            ["--base", "a/b", "--adapter", "pyproject.toml"],
            "--adapter: expected a folder or the Hub id of a saved NexusAdapter or T2IAdapter; received "
            "'pyproject.toml', which is a file",
        ),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_loaded(
    edges, tmp_path, monkeypatch, capsys, no_model, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    assert run(edges, tmp_path / "out.png", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nexus generate: error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n"], ids=["missing", "empty", "text", "stub"]
)
@pytest.mark.parametrize("name", ["map", "photo"])
def test_bad_files_are_one_line(tmp_path, capsys, no_model, name, content):
    path = tmp_path / f"{name}.png"
    if content is not None:
        path.write_bytes(content)
    assert run(path, tmp_path / "out.png") == 2
    err = capsys.readouterr().err
    argument = "--image" if name == "photo" else "--map"
    assert err.startswith(f"nexus generate: error: {argument}: expected")
    assert err.count("\n") == 1


@pytest.mark.parametrize("size", [(7, 64), (64, 4)])
def test_tiny_sources_are_refused(tmp_path, capsys, no_model, size):
    Image.new("RGB", size).save(tmp_path / "map.png")
    assert run(tmp_path / "map.png", tmp_path / "out.png") == 2
    expected = f"--map: expected at least 8 pixels a side; received {size[0]}x{size[1]}"
    assert expected in capsys.readouterr().err


def test_bad_thresholds_are_told_before_anything_is_loaded(photo, tmp_path, capsys, no_model):
    assert run(photo, tmp_path / "out.png", "--low", 300) == 2
    expected = "error: --high: expected a finite threshold of at least low, 300.0; received 200"
    assert expected in capsys.readouterr().err


def test_another_aspect_is_refused(edges, tmp_path, capsys, no_model):
    assert run(edges, tmp_path / "out.png", "--width", 256, "--height", 128) == 2
    err = capsys.readouterr().err
    assert "--map: expected the image's aspect" in err
    assert "128x128 for an image of 128x256" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device that must be missing is here")
def test_a_missing_device_is_told(edges, tmp_path, capsys, no_model):
    assert run(edges, tmp_path / "out.png", "--device", "cuda") == 2
    assert "--device: expected one that is here (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a"], "the following arguments are required: --out"),
        (["--prompt", "a", "--out", "a.png", "--map", "b", "--policy", "all"], "--policy: invalid choice"),
        (["--prompt", "a", "--out", "a.png", "--map", "b", "--scale", "x"], "--scale: invalid float"),
    ],
)
def test_usage_errors_are_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(["generate", *argv])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def bad_models(weights, tmp_path):
    """name -> (--base, --adapter, message)."""
    good_base, good_adapter = weights / "base", weights / "canny" / "prime"
    base = tmp_path / "base"
    tiny.sd15().save_pretrained(base)
    narrow = {
        "channels": (8, 16, 24, 24),
        "pools": (0, 1, 1, 1),
        "unshuffle": 8,
        "heads": 1,
        "head_width": 12,
    }
    NexusAdapter(**narrow, text_width=24).save_pretrained(tmp_path / "text")
    NexusAdapter(**narrow | {"channels": (8, 16, 16, 24)}, text_width=16).save_pretrained(tmp_path / "wide")
    tiny.sdxl().save_pretrained(tmp_path / "xl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model_index.json").write_text("{")
    return {
        "text width": (good_base, tmp_path / "text", "--adapter: expected text_width 16, as .*; received 24"),
        "channels": (
            good_base,
            tmp_path / "wide",
            r"--adapter: expected channels \(8, 16, 24, 24\), as .*; received \(8, 16, 16, 24\)",
        ),
        "misfit of the embedded base": (None, tmp_path / "text", "--adapter: expected text_width 16"),
        "unet as adapter": (good_base, good_base / "unet", "--adapter: .*, whose config.json says UNet2D"),
        "pipeline as adapter": (good_base, good_base, "--adapter: .*, which has no config.json"),
        "xl": (
            tmp_path / "xl",
            good_adapter,
            "--adapter: expected text_width 32, as .*; received 16|--adapter: expected pools",
        ),
        "inpainting": (
            _with_inputs(weights / "base", tmp_path / "inpainting", 9),
            good_adapter,
            "--base: expected a UNet with 4 channels in and out, as the VAE has; received 9 and 4",
        ),
        "bad index": (tmp_path / "empty", good_adapter, "--base: .*JSONDecodeError"),
        "cut weights": (_cut(base, "unet"), good_adapter, "--base: expected .*; received '.*base'"),
        "hub base": ("nobody/nothing", good_adapter, "--base: expected .*; received 'nobody/nothing'"),
        "hub adapter": (good_base, "nobody/nothing", "--adapter: expected .*; received 'nobody/nothing'"),
    }


def _with_inputs(base, copy, in_channels):
    shutil.copytree(base, copy)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    UNet2DConditionModel.from_config(unet.config, in_channels=in_channels).save_pretrained(copy / "unet")
    return copy


def _cut(base, part):
    file = base / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return base


def test_bad_models_are_one_line(edges, tmp_path, weights, capfd):
    for name, (base, adapter, message) in bad_models(weights, tmp_path).items():
        given = ["--adapter", adapter] if base is None else ["--base", base, "--adapter", adapter]
        assert run(edges, tmp_path / "out.png", *given) == 2, name
        err = capfd.readouterr().err
        assert err.count("\n") == 1, (name, err)
        assert err.startswith("nexus generate: error: --"), (name, err)
        assert re.search(message, err), (name, err)
        assert not (tmp_path / "out.png").exists()


def test_a_misfit_is_told_before_the_hubs_base_is_fetched(edges, tmp_path, weights, monkeypatch, capsys):
    """Its configs are enough for that."""
    fetched = []

    def snapshot_download(source, allow_patterns):
        fetched.append((source, allow_patterns))
        return weights / "base"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda *_: pytest.fail("fetched all"))
    _, narrow, message = bad_models(weights, tmp_path)["text width"]
    assert run(edges, tmp_path / "out.png", "--base", "some/base", "--adapter", narrow) == 2
    assert re.search(message, capsys.readouterr().err)
    assert fetched == [("some/base", ["model_index.json", "unet/config.json", "vae/config.json"])]


def test_an_adapter_of_one_variant_of_files(edges, tmp_path, weights):
    """As half-precision saves are often published: without plain files."""
    saved = weights / "canny" / "prime"
    adapter = NexusAdapter.from_pretrained(saved)
    adapter.save_pretrained(tmp_path / "whole", variant="fp16")
    adapter.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="30KB")
    for folder in (saved, tmp_path / "whole", tmp_path / "shards"):
        assert run(edges, tmp_path / f"{folder.name}.png", "--adapter", folder) == 0
        assert np.array_equal(pixels(tmp_path / f"{folder.name}.png"), pixels(tmp_path / "prime.png"))


@pytest.mark.parametrize("max_shard_size", ["10GB", "50KB"])
def test_a_base_of_one_variant_of_files(edges, tmp_path, weights, max_shard_size):
    base = tmp_path / "base"
    shutil.copytree(weights / "base", base)
    for file in [*base.rglob("*.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    unet = UNet2DConditionModel.from_pretrained(weights / "base" / "unet")
    shutil.rmtree(base / "unet")
    unet.save_pretrained(base / "unet", variant="fp16", max_shard_size=max_shard_size)
    given = ["--adapter", weights / "canny" / "slim"]
    assert run(edges, tmp_path / "a.png", "--base", base, *given) == 0
    assert run(edges, tmp_path / "b.png", "--base", weights / "base", *given) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    files = b"".join(file.read_bytes() for file in sorted((base / "unet").glob("*.safetensors")))
    assert read_settings(tmp_path / "a.png")["base_unet_sha256"] == hashlib.sha256(files).hexdigest()


@pytest.mark.parametrize(("sample_size", "native"), [(64, 64), ([64, 64], 64), ((48, 80), 62), (None, 64)])
def test_what_a_unet_says_it_was_trained_on(sample_size, native):
    assert native_side(sample_size) == native


def test_too_little_memory_is_one_line(edges, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", full)
    assert run(edges, tmp_path / "out.png") == 1
    expected = "nexus generate: error: not enough memory on cpu for 128x128; --width, --height"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)


def test_missing_weights_are_a_failure_of_one_line(edges, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    assert run(edges, tmp_path / "out.png") == 1
    err = capsys.readouterr().err
    assert err.startswith("nexus generate: error: embedded weights: expected config.json in")
    assert err.count("\n") == 1


def test_policies_are_those_of_control():
    assert POLICIES == control.POLICIES
    assert tuple(strength.BALANCES) == BALANCES


def test_a_bad_argument_imports_nothing_heavy():
    code = (
        "import sys\nfrom nexus_adapters.cli import main\n"
        "argv = ['generate', '--prompt', 'a', '--map', 'none.png', '--out', 'a.png', '--scale', 'nan']\n"
        "assert main(argv) == 2\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_line_but_ours_in_a_process_of_its_own(edges, tmp_path):
    """Imports log, too, and only once in a process."""
    argv = ["generate", "--prompt", "a", "--map", str(edges), "--out", str(tmp_path / "out.png")]
    argv += ["--base", "nobody/nothing", "--adapter", "nobody/nothing"]
    code = f"import sys\nfrom nexus_adapters.cli import main\nsys.exit(main({argv!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("nexus generate: error: --")


def test_the_shipped_model_generates(edges, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert run(edges, tmp_path / "out.png", prompt="a striped red star on a green background") == 0
    assert pixels(tmp_path / "out.png").shape == (128, 128, 3)


def another(tmp_path):
    """A second map, and a mask."""
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[20:100, 30:90:12] = 255
    Image.fromarray(pixels).save(tmp_path / "other.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "other.png", tmp_path / "mask.png"


def test_several_controls(edges, tmp_path, weights):
    """Each option once for all, or once for each map in order; variants and T2I-Adapters mix."""
    other, mask = another(tmp_path)
    t2i = weights / "canny" / "t2i"
    options = ["--map", other, "--image", edges, "--scale", 1, "--scale", 0.5, "--scale", 0.25, "--end", 0.8]
    options += ["--adapter", "slim", "--adapter", t2i, "--adapter", "prime", "--mask", mask]
    options += ["--policy", "cond_only"]
    assert run(edges, tmp_path / "out.png", *options) == 0
    pipe = tiny.quiet(embedded.load_embedded_base())
    adapters = [embedded.embedded_adapter(name) for name in ("slim-residual", "t2i", "prime-residual")]
    maps = [Image.open(edges), Image.open(other), extract("canny", Image.open(edges).convert("RGB"))]
    settings = {"end": 0.8, "policy": "cond_only", "mask": Image.open(mask)}
    controls = [
        Control(adapter, condition, scale, **settings)
        for adapter, condition, scale in zip(adapters, maps, (1, 0.5, 0.25), strict=True)
    ]
    with attach(pipe, *controls):
        expected = pipe(
            "a red star",
            negative_prompt="",
            num_inference_steps=STEPS,
            guidance_scale=embedded.EMBEDDED_GUIDANCE,
            width=128,
            height=128,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))
    told = read_settings(tmp_path / "out.png")
    assert (told["scale"], told["adapter"], told["source"]) == (1, "embedded slim-residual", "map")
    second, third = told["more_controls"]
    assert (second["scale"], second["adapter"], second["source_file"]) == (0.5, str(t2i), str(other))
    assert (third["adapter"], third["source"], third["mask"]) == (
        "embedded prime-residual",
        "image",
        str(mask),
    )
    assert len({each["adapter_sha256"] for each in (told, second, third)}) == 3


def test_a_mask_and_a_balance(edges, tmp_path, plain):
    _, mask = another(tmp_path)
    assert run(edges, tmp_path / "masked.png", "--mask", mask) == 0
    assert np.abs(pixels(tmp_path / "masked.png") - plain).max() > 0
    assert len(read_settings(tmp_path / "masked.png")["mask_sha256"]) == 64
    assert run(edges, tmp_path / "balance.png", "--balance", "control") == 0
    told = read_settings(tmp_path / "balance.png")
    assert told["balance"] == "control"
    assert {name: told[name] for name in ("policy", "level_scales")} == balance("control")
    assert run(edges, tmp_path / "policy.png", "--policy", "cond_only") == 0
    assert np.array_equal(pixels(tmp_path / "balance.png"), pixels(tmp_path / "policy.png"))


def test_no_map_is_told(tmp_path, capsys, no_model):
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "a.png")]) == 2
    assert "--image, --map: expected at least one of them; received none" in capsys.readouterr().err


def test_level_scales_of_another_count_are_told(edges, tmp_path, capsys):
    assert run(edges, tmp_path / "a.png", "--level-scales", "1,1") == 2
    assert "--level-scales: expected 4 numbers, one per feature" in capsys.readouterr().err


def lora(folder, seed):
    unet = UNet2DConditionModel.from_pretrained(embedded.WEIGHTS / "base" / "unet")
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


def test_loras(edges, tmp_path, plain, capsys):
    first, second = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    images = {}
    for name, options in {
        "one": ["--lora", first],
        "folder": ["--lora", first.parent],
        "half": ["--lora", first, "--lora-scale", 0.5],
        "none": ["--lora", first, "--lora-scale", 0],
        "both": ["--lora", first, "--lora", second, "--lora-scale", 1, "--lora-scale", 0.5],
    }.items():
        assert run(edges, tmp_path / f"{name}.png", *options) == 0
        images[name] = pixels(tmp_path / f"{name}.png")
    assert np.array_equal(images["one"], images["folder"])
    assert np.abs(images["none"] - plain).max() <= 1
    assert len({images[name].tobytes() for name in ("one", "half", "none", "both")}) == 4
    told = read_settings(tmp_path / "both.png")["loras"]
    assert [(each["path"], each["scale"]) for each in told] == [(str(first), 1), (str(second), 0.5)]
    assert run(edges, tmp_path / "x.png", "--lora", edges) == 2
    assert "--lora: expected LoRA weights for the base; received" in capsys.readouterr().err


def test_xl(edges, tmp_path):
    tiny.sdxl().save_pretrained(tmp_path / "xl")
    tiny.adapter(tiny.unet(tiny.SDXL_UNET)).save_pretrained(tmp_path / "adapter")
    given = ["--base", tmp_path / "xl", "--adapter", tmp_path / "adapter", "--width", 64]
    assert run(edges, tmp_path / "a.png", *given) == 0
    assert run(edges, tmp_path / "b.png", *given, "--scale", 0) == 0
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() > 0


def test_a_base_in_one_file(edges, tmp_path, weights):
    """With its configs from a folder, of whose weights none are read; offline."""
    pipe = StableDiffusionPipeline.from_pretrained(weights / "base")
    save_single_file(pipe, tmp_path / "base.safetensors")
    adapter = ["--adapter", weights / "canny" / "prime"]
    assert run(edges, tmp_path / "folder.png", "--base", weights / "base", *adapter) == 0
    configs = tmp_path / "configs"
    shutil.copytree(weights / "base", configs, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    given = ["--base", tmp_path / "base.safetensors", "--base-config", configs, *adapter]
    assert run(edges, tmp_path / "file.png", *given) == 0
    difference = np.abs(pixels(tmp_path / "file.png") - pixels(tmp_path / "folder.png"))
    assert difference.max() <= 1
    told = read_settings(tmp_path / "file.png")
    assert told["base_config"] == str(configs)
    content = (tmp_path / "base.safetensors").read_bytes()
    assert told["base_unet_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_base_in_one_file_needs_its_configs(edges, tmp_path, weights, capsys, no_model):
    (tmp_path / "base.safetensors").write_bytes(b"x")
    given = ["--base", tmp_path / "base.safetensors", "--adapter", weights / "canny" / "prime"]
    assert run(edges, tmp_path / "a.png", *given) == 2
    assert (
        "--base-config: expected a folder beside a --base in one file; received none"
        in capsys.readouterr().err
    )
