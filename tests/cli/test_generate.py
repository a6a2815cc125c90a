import hashlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tests import tiny
from tests.adapter.test_formats import as_original
from tests.png_settings import read_settings
from tests.refusals import refused
from tests.single_file import save_single_file
from tests.weights import use_weights

from nexus_adapters import (
    NexusAdapter,
    StableDiffusionNexusPipeline,
    extract,
    load_adapter,
    load_base,
    load_embedded,
)
from nexus_adapters.adapter.formats import export_file
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli import build_parser, main
from nexus_adapters.cli.generate import save
from nexus_adapters.cli.generate_requests import output_files, parse
from nexus_adapters.generation.images import check_scales
from nexus_adapters.generation.requests import (
    BaseRequest,
    ControlRequest,
    ExtractorOptions,
    ImageSource,
    LoraRequest,
    MapSource,
)
from nexus_adapters.injection import Control, attach, balance
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run import train_adapter

STEPS = 2
GUIDANCE = BUNDLED["embedded"].guidance_scale


@pytest.fixture(autouse=True)
def weights(tiny_weights, monkeypatch):
    use_weights(monkeypatch, tiny_weights)
    return tiny_weights


@pytest.fixture
def no_model(weights, unreadable_weights, monkeypatch):
    """What is checked is checked before anything is loaded: the base cannot be."""
    use_weights(monkeypatch, unreadable_weights)


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
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
    assert np.array_equal(pixels(out), np.asarray(expected))
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 128x128, seed 3\n"
    assert captured.err == ""  # a progress bar is for terminals
    assert "warning" not in captured.err


def test_settings_make_the_image_again(edges, tmp_path):
    options = ["--negative", "a cat", "--seed", 5, "--guidance", 2.5, "--scale", 0.7, "--start", 0.1]
    options += ["--end", 0.9, "--policy", "per_branch", "--width", 64, "--adapter", "slim"]
    assert run(edges, tmp_path / "a.png", *options) == 0
    settings = read_settings(tmp_path / "a.png")
    names = ["negative", "seed", "guidance", "scale", "start", "end", "policy", "width", "height"]
    again = [part for name in names for part in (f"--{name}", settings[name])]
    again += ["--adapter", str(settings["adapter"]).removeprefix("embedded ")]
    assert run(edges, tmp_path / "b.png", *again, prompt=settings["prompt"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (settings["width"], settings["height"], settings["steps"]) == (64, 64, STEPS)
    assert settings["base"] == "embedded"
    assert set(settings["versions"]) >= {"nexus-adapters", "torch", "diffusers"}
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    assert (settings["source"], settings["source_file"]) == ("map", edges.name)
    assert len(settings["source_sha256"]) == len(settings["adapter_sha256"]) == 64
    unet = BUNDLED["embedded"].folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert settings["base_unet_sha256"] == hashlib.sha256(unet.read_bytes()).hexdigest()
    assert settings["options"] == {}  # a map is taken as it is


ALWAYS = ["--policy cond_only", "--scheduler euler", "--invert"]
OPTIONS = [
    "--seed 1",
    "--steps 3",
    "--guidance 9",
    "--negative blurry",
    "--scale 0.2",
    "--start 0.5",
    "--end 0.4",
    "--policy per_branch",
    "--policy cond_only",
    "--adapter slim",
    "--invert",
    "--width 64",
    "--height 64",
    "--dtype bfloat16",
    "--level-scales 0,1,1,1",
    "--balance prompt",
    "--balance control",
    "--scheduler euler",
    "--scheduler dpm++-karras",
]


@pytest.mark.parametrize(
    "options", [pytest.param(o, marks=() if o in ALWAYS else pytest.mark.full) for o in OPTIONS]
)
def test_every_option_has_an_effect(edges, tmp_path, options, plain):
    assert run(edges, tmp_path / "out.png", *options.split()) == 0
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
        use_weights(patch, tiny_weights)
        assert run(folder / "edges.png", folder / "out.png") == 0
    return pixels(folder / "out.png")


def test_several_images_count_their_seeds_on(edges, tmp_path, capsys):
    assert run(edges, tmp_path / "out.png", "--count", 2, "--seed", 4) == 0
    made = sorted(file.name for file in tmp_path.glob("out*"))
    assert made == ["out-0001.png", "out-0002.png"]
    assert [read_settings(tmp_path / name)["seed"] for name in made] == [4, 5]
    assert run(edges, tmp_path / "single.png", "--seed", 5) == 0
    assert np.array_equal(pixels(tmp_path / "single.png"), pixels(tmp_path / "out-0002.png"))
    assert not np.array_equal(pixels(tmp_path / "out-0001.png"), pixels(tmp_path / "out-0002.png"))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_existing_files_are_kept_and_nothing_is_done(edges, tmp_path, capsys, no_model):
    kept = tmp_path / "out-0002.png"
    kept.write_text("mine")
    assert run(edges, tmp_path / "out.png", "--count", 2) == 2
    refused_in_one_line(capsys, "--out", f"'{kept}'")
    assert kept.read_text() == "mine"
    assert not (tmp_path / "out-0001.png").exists()


def test_a_file_that_comes_during_the_work_is_kept_and_so_is_the_image(tmp_path, capsys):
    (tmp_path / "out.png").write_text("of another process")
    save(tmp_path / "out.png", Image.new("RGB", (16, 8)), {"seed": 4}, force=False)
    assert (tmp_path / "out.png").read_text() == "of another process"
    (other,) = tmp_path.glob("out-*.png")
    assert read_settings(other) == {"seed": 4}
    assert capsys.readouterr().out == f"{other}: 16x8, seed 4\n"


def test_force_overwrites(edges, tmp_path):
    out = tmp_path / "out.png"
    out.write_text("mine")
    assert run(edges, out, "--force") == 0
    assert read_settings(out)["seed"] == 0


def test_a_photo_becomes_an_image_with_its_options_in_the_settings(photo, tmp_path):
    assert run(photo, tmp_path / "out.png", "--low", 10) == 0
    settings = read_settings(tmp_path / "out.png")
    assert (settings["source"], settings["condition"]) == ("image", "canny")
    assert settings["options"] == {"low": 10, "high": 200, "auto": False}
    assert pixels(tmp_path / "out.png").shape == (120, 160, 3)


def test_a_large_map_gives_an_image_of_the_bases_own_size(edges, tmp_path, capsys):
    """As in Python; what is asked for counts."""
    with Image.open(edges) as image:
        image.resize((512, 512), Image.Resampling.NEAREST).save(tmp_path / "map.png")
    assert run(tmp_path / "map.png", tmp_path / "out.png", "--steps", 1) == 0
    assert pixels(tmp_path / "out.png").shape == (128, 128, 3)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "--map" in line
    assert "512x512" in line


def options_of(*more):
    """The options of each control, in order."""
    return [
        given.reading.values(name) if isinstance(given, MapSource) else given.extractor.values(name)
        for given, name in ((control.given, control.condition_name) for control in parsed(*more).controls)
    ]


def controls_of(option, *names):
    return [part for name in names for part in (option, f"{name}.png", "--condition", name)]


def test_an_option_goes_to_the_controls_whose_condition_takes_it():
    maps = controls_of("--map", "depth", "canny", "segmentation")
    assert options_of(*maps, "--option", "unit=mm") == [{"unit": "mm"}, {}, {}]
    both = ("--option", "palette=voc", "--option", "depth.unit=m")
    assert options_of(*maps, *both) == [{"unit": "m"}, {}, {"palette": "voc"}]
    photos = controls_of("--image", "canny", "sketch")
    assert options_of(*photos, "--option", "sigma=2", "--low", "5") == [{"low": 5.0}, {"sigma": 2}]
    models = controls_of("--image", "depth", "sketch")
    assert options_of(*models, "--option", "model=a.onnx") == [{"model": "a.onnx"}, {"model": "a.onnx"}]
    assert options_of(*models, "--option", "sketch.model=a.b") == [{}, {"model": "a.b"}]
    twice = (*controls_of("--map", "canny"), *controls_of("--image", "canny"))
    assert options_of(*twice, "--option", "canny.auto=true") == [{}, {"auto": True}]


@pytest.mark.parametrize(
    ("controls", "option", "name", "expected"),
    [
        (controls_of("--map", "depth", "canny"), "palette=voc", "option palette", "depth maps (unit)"),
        (
            controls_of("--map", "depth", "canny"),
            "canny.unit=mm",
            "option unit",
            "canny maps (there are none)",
        ),
        (controls_of("--map", "depth", "canny"), "sketch.sigma=2", "--option", "of depth, canny"),
        (controls_of("--map", "depth", "canny"), "unit", "option", "KEY=VALUE"),
    ],
)
def test_an_option_that_no_control_takes_is_refused(controls, option, name, expected):
    with refused(name, expected=expected):
        parsed(*controls, "--option", option)


def test_an_inverted_map_is_one_warning(edges, tmp_path, capsys, plain):
    with Image.open(edges) as light:
        Image.eval(light, lambda value: 255 - value).save(tmp_path / "dark.png")
    assert run(tmp_path / "dark.png", tmp_path / "out.png") == 0
    assert np.array_equal(pixels(tmp_path / "out.png"), plain)
    assert read_settings(tmp_path / "out.png")["inverted"] is True
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "inverted" in err


def test_another_aspect_needs_a_resize_mode(edges, tmp_path, capsys, no_model):
    assert run(edges, tmp_path / "out.png", "--width", 128, "--height", 64) == 2
    refused_in_one_line(capsys, "--map", "128x128", "Set --resize-mode to stretch, crop or pad")


def test_a_map_of_another_aspect_is_fitted(edges, tmp_path):
    size = ("--width", 128, "--height", 64)
    assert run(edges, tmp_path / "out.png", *size, "--resize-mode", "crop") == 0
    assert pixels(tmp_path / "out.png").shape == (64, 128, 3)
    assert read_settings(tmp_path / "out.png")["resize_mode"] == "crop"


def test_a_truncated_prompt_is_a_warning(edges, tmp_path, capsys):
    assert run(edges, tmp_path / "out.png", prompt="a red star " * 9) == 0
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "was truncated" in err


def test_base_and_adapter_from_folders(edges, tmp_path, weights, plain):
    base, adapter = weights / "base", weights / "canny" / "prime-residual"
    given = ["--base", base, "--adapter", adapter, "--guidance", GUIDANCE]
    assert run(edges, tmp_path / "a.png", *given) == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), plain)
    settings = read_settings(tmp_path / "a.png")
    assert (settings["base"], settings["adapter"]) == (base.name, adapter.name)
    assert settings["adapter_sha256"] == find_saved("prime").sha256()


def test_another_kind_of_map_has_adapters_of_its_own(edges, tmp_path, weights, monkeypatch):
    shutil.copytree(weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "canny")
    use_weights(monkeypatch, tmp_path / "weights")
    assert run(edges, tmp_path / "a.png", "--condition", "sketch", "--adapter", "slim") == 0
    settings = read_settings(tmp_path / "a.png")
    assert (settings["condition"], settings["adapter"]) == ("sketch", "embedded slim")


@pytest.mark.full
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
    refused_in_one_line(capsys, "--steps", "got 1000")


def test_an_adapter_for_another_vae_is_the_adapters_fault(edges, tmp_path, weights, capsys):
    unet = UNet2DConditionModel.from_pretrained(weights / "base", subfolder="unet")
    NexusAdapter.for_unet(unet, vae_scale_factor=16).save_pretrained(tmp_path / "adapter")
    given = ["--base", weights / "base", "--adapter", tmp_path / "adapter"]
    assert run(edges, tmp_path / "a.png", *given) == 2
    refused_in_one_line(capsys, "--adapter", "8 pixels", "16")


def parsed(*more):
    """The request of a command line."""
    return parse(build_parser().parse_args(["generate", "--prompt", "a", "--out", "a.png", *more]))


def test_guidance_follows_the_base_where_none_is_given():
    assert parsed("--map", "m.png").guidance == GUIDANCE
    other = ["--map", "m.png", "--base", "x/y", "--adapter", "z"]
    assert parsed(*other).guidance == 7.5
    assert parsed(*other, "--guidance", "3").guidance == 3


def test_a_command_line_is_one_request():
    """Options of controls are given once for all, or once for each; what is left out has its default."""
    request = parsed(
        "--image", "a.png", "--image", "b.png", "--low", "5", "--adapter", "slim", "--adapter", "t2i",
        "--scale", "0.5", "--level-scales", "1,0.5", "--mask", "m.png", "--mask", "n.png", "--invert",
        "--count", "2", "--lora", "x/y", "--lora", "x/z", "--lora-scale", "0.3",
    )  # fmt: skip
    assert request.controls == tuple(
        ControlRequest(
            ImageSource(file, ExtractorOptions(low=5.0)),
            adapter=adapter,
            scale=0.5,
            level_scales=(1.0, 0.5),
            mask=mask,
            invert=True,
        )
        for file, adapter, mask in (("a.png", "slim", "m.png"), ("b.png", "t2i", "n.png"))
    )
    assert request.loras == (LoraRequest("x/y", 0.3), LoraRequest("x/z", 0.3))
    assert [str(file) for file in output_files("a.png", 2, False)] == ["a-0001.png", "a-0002.png"]
    assert (request.base, request.steps, request.seed) == (BaseRequest("embedded", None, None), 20, 0)
    (alone,) = parsed("--map", "m.png").controls
    assert alone == ControlRequest(MapSource("m.png"))


def test_scale_0_is_the_base(edges, tmp_path):
    assert run(edges, tmp_path / "out.png", "--scale", 0) == 0
    base = tiny.quiet(load_base())
    expected = base(
        "a red star",
        negative_prompt="",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))


def refused_in_one_line(capsys, name, *shown):
    """Nothing on stdout; on stderr, in one line, the option and what was wrong with its value."""
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(rf"nexus generate: error: {re.escape(name)}(:| is required)", err), err
    assert all(str(text) in err for text in shown), err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("options", "name", "shown"),
    [
        (["--scale", "nan"], "--scale", "got nan"),
        (["--start", "inf"], "--start", "got inf"),
        (["--start", "-0.1"], "--start", "got -0.1"),
        (["--end", "1.5"], "--end", "got 1.5"),
        (["--start", "0.6", "--end", "0.5"], "--end", "--start, 0.6, to 1, got 0.5"),
        (["--guidance", "nan"], "--guidance", "got nan"),
        (["--noise-exponent", "nan"], "--noise-exponent", "got nan"),
        (["--noise-exponent", "-1"], "--noise-exponent", "got -1.0"),
        (["--steps", "0"], "--steps", "from 1 to 1000, got 0"),
        (["--count", "0"], "--count", "from 1 to 9999, got 0"),
        (["--seed", "-1"], "--seed", "got -1"),
        (["--width", "100"], "--width", "multiple of 8, got 100"),
        (["--height", "-8"], "--height", "multiple of 8, got -8"),
        (["--condition", "cany"], "--condition", "canny, depth, segmentation, sketch, got 'cany'"),
        (["--low", "3"], "--low", "got 3.0"),
        (["--option", "auto=true"], "--option auto", "got True"),
        (["--option", "auto"], "--option", "'auto'"),
        (["--option", "unit=mm"], "--option unit", "got 'mm'"),
        (["--option", "invert=true"], "--option invert", "--no-invert"),
        (["--condition", "depth", "--option", "unit=cm"], "--option unit", "mm, m, inverse"),
        (["--scale", "1", "--scale", "2"], "--scale", "2 values"),
        (["--level-scales", "1,x"], "--level-scales", "'1,x'"),
        (["--balance", "prompt", "--policy", "positive"], "--balance", "'prompt' and --policy"),
        (["--balance", "prompt", "--level-scales", "1"], "--balance", "'prompt' and --level-scales"),
        (["--mask", "none.png"], "--mask", "'none.png', which does not exist"),
        (["--lora", "none"], "--lora", "'none', which does not exist"),
        (["--lora-scale", "1"], "--lora-scale", "1.0 and no --lora"),
        (["--lora", "a/b", "--lora-scale", "1", "--lora-scale", "2"], "--lora-scale", "got 2"),
        (["--lora", "a/b", "--lora-scale", "nan"], "--lora-scale", "got nan"),
        (["--out", "a.jpg"], "--out", "'a.jpg'"),
        (["--out", "none/a.png"], "--out", "'none/a.png'"),
        (["--max-megapixels", "0.001"], "--map", "0.001 megapixels"),
        (["--max-megapixels", "0"], "--max-megapixels", "got 0.0"),
        (["--base", "none"], "--adapter", "--base none"),
        (["--base", "./none", "--adapter", "prime"], "--adapter", "'./none'"),
        (["--adapter", "prim"], "--adapter", "'embedded' are prime, slim, prime-paper, slim-paper, t2i"),
        (["--adapter", "prim"], "--adapter", "got 'prim'"),
        (["--condition", "sketch", "--adapter", "t2i"], "--adapter", "prime, slim for sketch"),
        (["--base", "a/b", "--adapter", "prime"], "--adapter", "does not fit 'a/b'"),
        (["--adapter", "pyproject.toml"], "--adapter", "'pyproject.toml'"),
        (["--adapter", "./nothing"], "--adapter", "'./nothing'"),
        (["--adapter", "empty"], "--adapter", "'empty'"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_loaded(
    edges, tmp_path, monkeypatch, capsys, no_model, options, name, shown
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "empty").mkdir()
    assert run(edges, tmp_path / "out.png", *options) == 2
    refused_in_one_line(capsys, name, shown)
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
    refused_in_one_line(capsys, "--image" if name == "photo" else "--map", f"'{path}'")


@pytest.mark.parametrize("size", [(7, 64), (64, 4)])
def test_tiny_sources_are_refused(tmp_path, capsys, no_model, size):
    Image.new("RGB", size).save(tmp_path / "map.png")
    assert run(tmp_path / "map.png", tmp_path / "out.png") == 2
    refused_in_one_line(capsys, "--map", f"got {size[0]}x{size[1]}")


def test_bad_thresholds_are_refused_before_anything_is_loaded(photo, tmp_path, capsys, no_model):
    assert run(photo, tmp_path / "out.png", "--low", 300) == 2
    refused_in_one_line(capsys, "--high", "300.0", "got 200")


def test_another_aspect_is_refused(edges, tmp_path, capsys, no_model):
    assert run(edges, tmp_path / "out.png", "--width", 256, "--height", 128) == 2
    refused_in_one_line(capsys, "--map", "128x128 pixels for an image of 256x128")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device that must be missing is here")
def test_a_missing_device_is_refused(edges, tmp_path, capsys, no_model):
    assert run(edges, tmp_path / "out.png", "--device", "cuda") == 2
    refused_in_one_line(capsys, "--device", "cpu", "got cuda")


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


@pytest.fixture(scope="module")
def bad_models(tiny_weights, tmp_path_factory):
    """name -> (--base, --adapter, the option that is named, what else is said)."""
    weights, tmp_path = tiny_weights, tmp_path_factory.mktemp("bad")
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
    (tmp_path / "none.toml").touch()
    return {
        "text width": (good_base, tmp_path / "text", "--adapter", ["text_width 16", "got 24"]),
        "channels": (good_base, tmp_path / "wide", "--adapter", ["(8, 16, 24, 24)", "got (8, 16, 16, 24)"]),
        "misfit of the embedded base": (None, tmp_path / "text", "--adapter", ["text_width 16"]),
        "unet as adapter": (
            good_base,
            good_base / "unet",
            "--adapter",
            ["UNet2D", f"'{good_base / 'unet'}'"],
        ),
        "pipeline as adapter": (good_base, good_base, "--adapter", [f"'{good_base}'", "without an adapter"]),
        "xl": (
            tmp_path / "xl",
            good_adapter,
            "--adapter",
            ["an adapter for SDXL", "an adapter for SD 1.x/2.x"],
        ),
        "inpainting": (
            _with_inputs(weights / "base", tmp_path / "inpainting", 9),
            good_adapter,
            "--base",
            ["9 and 4"],
        ),
        "no features": (
            _with_blocks(weights / "base", tmp_path / "blocks"),
            good_adapter,
            "--base",
            ["AttnDownBlock2D"],
        ),
        "bad index": (tmp_path / "empty", good_adapter, "--base", ["JSONDecodeError"]),
        "no index": (tmp_path, good_adapter, "--base", [f"'{tmp_path}', which has no model_index.json"]),
        "no such folder": (tmp_path / "gone", good_adapter, "--base", [f"'{tmp_path / 'gone'}'"]),
        "a file": (tmp_path / "none.toml", good_adapter, "--base", [f"'{tmp_path / 'none.toml'}'"]),
        "no such file": (tmp_path / "a.safetensors", good_adapter, "--base", ["a.safetensors'"]),
        "cut weights": (_cut(base, "unet"), good_adapter, "--base", [f"'{base}'"]),
        "hub base": ("nobody/nothing", good_adapter, "--base", ["'nobody/nothing'"]),
        "hub adapter": (good_base, "nobody/nothing", "--adapter", ["'nobody/nothing'"]),
    }


def _with_blocks(base, copy):
    """A UNet whose down blocks take no features."""
    shutil.copytree(base, copy)
    file = copy / "unet" / "config.json"
    file.write_text(file.read_text().replace('"CrossAttnDownBlock2D"', '"AttnDownBlock2D"', 1))
    return copy


def _with_inputs(base, copy, in_channels):
    shutil.copytree(base, copy)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    UNet2DConditionModel.from_config(unet.config, in_channels=in_channels).save_pretrained(copy / "unet")
    return copy


def _cut(base, part):
    file = base / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return base


def test_bad_models_are_one_line(edges, tmp_path, bad_models, capfd):
    for name, (base, adapter, option, shown) in bad_models.items():
        given = ["--adapter", adapter] if base is None else ["--base", base, "--adapter", adapter]
        assert run(edges, tmp_path / "out.png", *given) == 2, name
        refused_in_one_line(capfd, option, *shown)
        assert not (tmp_path / "out.png").exists()


def test_a_misfit_is_refused_before_the_hubs_base_is_fetched(
    edges, tmp_path, weights, bad_models, monkeypatch, capsys
):
    """Its configs are enough for that."""
    fetched = []

    def hf_hub_download(source, name, revision=None):
        fetched.append((source, name))
        return weights / "base" / name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda *_: pytest.fail("fetched all"))
    monkeypatch.setattr(NexusAdapter, "from_pretrained", lambda *_, **__: pytest.fail("loaded weights"))
    _, narrow, option, shown = bad_models["text width"]
    assert run(edges, tmp_path / "out.png", "--base", "some/base", "--adapter", narrow) == 2
    refused_in_one_line(capsys, option, *shown)
    assert {source for source, _ in fetched} == {"some/base"}
    configs = {"unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"}
    assert {name for _, name in fetched} == {"model_index.json"} | configs


@pytest.mark.full
def test_an_adapter_of_one_variant_of_files(edges, tmp_path, weights):
    """As half-precision saves are often published: without plain files."""
    saved = weights / "canny" / "prime"
    adapter = NexusAdapter.from_pretrained(saved)
    adapter.save_pretrained(tmp_path / "whole", variant="fp16")
    adapter.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="30KB")
    for folder in (saved, tmp_path / "whole", tmp_path / "shards"):
        assert run(edges, tmp_path / f"{folder.name}.png", "--adapter", folder) == 0
        assert np.array_equal(pixels(tmp_path / f"{folder.name}.png"), pixels(tmp_path / "prime.png"))


@pytest.mark.full
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


def test_too_little_memory_is_one_line(edges, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", full)
    assert run(edges, tmp_path / "out.png") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nexus generate: error: not enough memory on cpu for 128x128;")
    assert "--width" in line


def test_an_image_that_is_not_finite_is_not_saved_as_a_black_one(edges, tmp_path, monkeypatch, capsys):
    def broken(*_, output_type, **__):
        assert output_type == "np"
        return SimpleNamespace(images=np.full((1, 128, 128, 3), np.nan, np.float32))

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", broken)
    assert run(edges, tmp_path / "out.png", "--seed", 3) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nexus generate: error: image of seed 3: expected finite pixels")
    assert not (tmp_path / "out.png").exists()


def test_missing_weights_are_a_failure_of_one_line(edges, tmp_path, monkeypatch, capsys):
    use_weights(monkeypatch, tmp_path)
    assert run(edges, tmp_path / "out.png") == 1
    err = capsys.readouterr().err
    assert err.startswith("nexus generate: error: ")
    assert f"'{tmp_path / 'canny' / 'prime-residual' / 'config.json'}'" in err
    assert err.count("\n") == 1


@pytest.mark.full
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
    pipe = tiny.quiet(load_base())
    adapters = [load_adapter(name) for name in ("slim", "t2i", "prime")]
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
            guidance_scale=GUIDANCE,
            width=128,
            height=128,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    assert np.array_equal(pixels(tmp_path / "out.png"), np.asarray(expected))
    settings = read_settings(tmp_path / "out.png")
    assert (settings["scale"], settings["adapter"], settings["source"]) == (1, "embedded slim", "map")
    second, third = settings["more_controls"]
    assert (second["scale"], second["adapter"], second["source_file"]) == (0.5, t2i.name, other.name)
    assert (third["adapter"], third["source"], third["mask"]) == (
        "embedded prime",
        "image",
        mask.name,
    )
    assert len({each["adapter_sha256"] for each in (settings, second, third)}) == 3


def test_a_mask_and_a_balance(edges, tmp_path, plain):
    _, mask = another(tmp_path)
    assert run(edges, tmp_path / "masked.png", "--mask", mask) == 0
    assert np.abs(pixels(tmp_path / "masked.png") - plain).max() > 0
    assert len(read_settings(tmp_path / "masked.png")["mask_sha256"]) == 64
    assert run(edges, tmp_path / "balance.png", "--balance", "control") == 0
    settings = read_settings(tmp_path / "balance.png")
    assert settings["balance"] == "control"
    assert {name: settings[name] for name in ("policy", "level_scales")} == balance("control")


def test_a_nearly_black_map_is_one_warning(edges, tmp_path, capsys):
    Image.fromarray(np.uint8(pixels(edges) // 20)).save(edges)
    assert run(edges, tmp_path / "out.png") == 0
    assert capsys.readouterr().err.count("nearly black") == 1


def test_no_map_is_refused(tmp_path, capsys, no_model):
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "a.png")]) == 2
    refused_in_one_line(capsys, "--image or --map")


def test_level_scales_of_another_count_are_refused(edges, tmp_path, capsys):
    assert run(edges, tmp_path / "a.png", "--level-scales", "1,1") == 2
    refused_in_one_line(capsys, "--level-scales", "4 numbers", "got 2")


def lora(folder, seed):
    unet = UNet2DConditionModel.from_pretrained(BUNDLED["embedded"].folder / "unet")
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


def test_loras(edges, tmp_path, plain, capsys):
    first, second = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    both = ["--lora", first, "--lora", second.parent, "--lora-scale", 1, "--lora-scale", 0.5]
    assert run(edges, tmp_path / "both.png", *both) == 0
    assert np.abs(pixels(tmp_path / "both.png") - plain).max() > 0
    settings = read_settings(tmp_path / "both.png")["loras"]
    assert [(each["path"], each["scale"]) for each in settings] == [
        (first.name, 1),
        (second.parent.name, 0.5),
    ]
    capsys.readouterr()
    assert run(edges, tmp_path / "x.png", "--lora", edges) == 2
    err = capsys.readouterr().err
    assert "nexus generate: error: --lora: " in err
    assert f"'{edges}'" in err


@pytest.mark.full
def test_scales_of_loras(edges, tmp_path, plain):
    first, second = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    images = {}
    for name, options in {
        "one": ["--lora", first],
        "folder": ["--lora", first.parent],
        "half": ["--lora", first, "--lora-scale", 0.5],
        "none": ["--lora", first, "--lora-scale", 0],
        "both": ["--lora", first, "--lora", second],
    }.items():
        assert run(edges, tmp_path / f"{name}.png", *options) == 0
        images[name] = pixels(tmp_path / f"{name}.png")
    assert np.array_equal(images["one"], images["folder"])
    assert np.abs(images["none"] - plain).max() <= 1
    assert len({images[name].tobytes() for name in ("one", "half", "none", "both")}) == 4


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
    settings = read_settings(tmp_path / "file.png")
    assert settings["base_config"] == configs.name
    content = (tmp_path / "base.safetensors").read_bytes()
    assert settings["base_unet_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_base_in_one_file_needs_its_configs(edges, tmp_path, weights, capsys):
    """Offline; the error says what they are and where they can be had."""
    pipe = StableDiffusionPipeline.from_pretrained(weights / "base")
    save_single_file(pipe, tmp_path / "base.safetensors")
    given = ["--base", tmp_path / "base.safetensors", "--adapter", weights / "canny" / "prime"]
    capsys.readouterr()
    assert run(edges, tmp_path / "a.png", *given) == 2
    refused_in_one_line(capsys, "--base-config", "https://huggingface.co/", "configs and tokenizer")


@pytest.mark.parametrize("option", [("--base-config", "."), ("--prediction-type", "epsilon")])
def test_what_is_only_for_a_base_in_one_file(edges, tmp_path, weights, capsys, option):
    given = ["--base", weights / "base", "--adapter", weights / "canny" / "prime"]
    for base in ([], given):
        assert run(edges, tmp_path / "a.png", *base, *option) == 2
        refused_in_one_line(capsys, option[0], f"'{option[1]}'")


@pytest.mark.full
def test_what_a_base_in_one_file_predicts(edges, tmp_path, weights):
    pipe = StableDiffusionPipeline.from_pretrained(weights / "base")
    save_single_file(pipe, tmp_path / "base.safetensors")
    given = ["--base", tmp_path / "base.safetensors", "--base-config", weights / "base"]
    given += ["--adapter", weights / "canny" / "prime"]
    for name, options in {"plain": [], "epsilon": ["epsilon"], "v": ["v_prediction"]}.items():
        more = [part for value in options for part in ("--prediction-type", value)]
        assert run(edges, tmp_path / f"{name}.png", *given, *more) == 0
    images = {name: pixels(tmp_path / f"{name}.png") for name in ("plain", "epsilon", "v")}
    assert np.array_equal(images["plain"], images["epsilon"])
    assert np.abs(images["v"] - images["plain"]).max() > 0
    settings = read_settings(tmp_path / "v.png")
    assert settings["prediction_type"] == "v_prediction"


def test_two_kinds_of_maps_by_the_same_name(edges, tmp_path):
    """Each control has the adapter of its own condition."""
    other, _ = another(tmp_path)
    options = ["--map", other, "--condition", "canny", "--condition", "sketch", "--adapter", "prime"]
    assert run(edges, tmp_path / "out.png", *options) == 0
    settings = read_settings(tmp_path / "out.png")
    (second,) = settings["more_controls"]
    hashes = [find_saved("prime", condition).sha256() for condition in ("canny", "sketch")]
    assert [settings["adapter_sha256"], second["adapter_sha256"]] == hashes
    assert hashes[0] != hashes[1]


@pytest.mark.full
def test_a_saved_pipeline_as_the_base(edges, tmp_path, weights):
    """Its stock parts; and its adapter, where the pipeline is given as that, too."""
    load_embedded().save_pretrained(tmp_path / "pipeline")
    both = ["--base", tmp_path / "pipeline", "--adapter", tmp_path / "pipeline", "--guidance", GUIDANCE]
    assert run(edges, tmp_path / "a.png", *both) == 0
    assert run(edges, tmp_path / "b.png") == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_weights):
    """A training's folder, for the embedded base; finished, with its last checkpoint."""
    root = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        use_weights(patch, tiny_weights)
        train_adapter(parse_config({
            "output_dir": str(root / "run"),
            "adapter": {"method": "slim"},
            "data": {"kind": "scenes", "count": 4, "resolution": 128},
            "training": {"max_train_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1},
            "validation": {"every_steps": 0},
            "cache": {"folder": str(root / "cache")},
        }))  # fmt: skip
    return root / "run"


@pytest.mark.full
def test_every_kind_of_saved_adapter(edges, tmp_path, weights, run_folder, plain):
    """The same adapter in whatever form gives the same image."""
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    adapter = NexusAdapter.from_pretrained(run_folder / "adapter")
    export_file(adapter, tmp_path / "one.safetensors")
    pipe = StableDiffusionNexusPipeline(
        **load_base().components, adapter=adapter, requires_safety_checker=False
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    forms = [run_folder / "adapter", run_folder, checkpoint, tmp_path / "one.safetensors"]
    images = []
    for place, form in enumerate([*forms, tmp_path / "pipeline"]):
        out = tmp_path / f"{place}.png"
        assert run(edges, out, "--adapter", form) == 0
        images.append(pixels(out).tobytes())
        assert read_settings(out)["adapter"] == form.name
    assert len(set(images)) == 1
    assert images[0] != plain.tobytes()


@pytest.mark.full
def test_a_t2i_adapter_as_first_published(edges, tmp_path, weights):
    t2i = T2IAdapter.from_pretrained(weights / "canny" / "t2i")
    stored = t2i.state_dict()
    widened = {
        f"body.{2 * stage}.in_conv.{part}": stored[f"adapter.body.{stage}.in_conv.{part}"]
        for stage in (1, 2)
        for part in ("weight", "bias")
    }
    torch.save({**as_original(t2i), **widened}, tmp_path / "t2i.pth")
    assert run(edges, tmp_path / "pth.png", "--adapter", tmp_path / "t2i.pth") == 0
    assert run(edges, tmp_path / "name.png", "--adapter", "t2i") == 0
    assert np.array_equal(pixels(tmp_path / "pth.png"), pixels(tmp_path / "name.png"))


@pytest.fixture
def controlnet(tmp_path, weights):
    unet = UNet2DConditionModel.from_pretrained(weights / "base" / "unet")
    tiny.controlnet(unet).save_pretrained(tmp_path / "controlnet")
    return tmp_path / "controlnet"


def test_a_controlnet_generates_in_its_own_pipeline(edges, tmp_path, weights, controlnet):
    assert run(edges, tmp_path / "a.png", "--adapter", controlnet, "--scale", 0.5) == 0
    pipe = tiny.quiet(
        StableDiffusionControlNetPipeline(
            **load_base().components,
            controlnet=ControlNetModel.from_pretrained(controlnet),
            requires_safety_checker=False,
        )
    )
    with Image.open(edges) as condition:
        expected = pipe(
            "a red star",
            negative_prompt="",
            image=condition,
            controlnet_conditioning_scale=0.5,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            width=128,
            height=128,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected))
    assert read_settings(tmp_path / "a.png")["adapter"] == controlnet.name


@pytest.mark.parametrize(
    ("options", "name", "shown"),
    [
        (["--start", "0.5"], "--start", "got 0.5"),
        (["--end", "0.5"], "--end", "got 0.5"),
        (["--policy", "cond_only"], "--policy", "got cond_only"),
        (["--balance", "prompt"], "--balance", "got prompt"),
        (["--level-scales", "1,1,1,1"], "--level-scales", "1.0, 1.0"),
        (["--noise-exponent", "0.5"], "--noise-exponent", "got 0.5"),
        (["--mask", "{mask}"], "--mask", "mask.png"),
        (["--map", "{other}"], "--adapter", "2 maps"),
    ],
)
def test_what_has_no_effect_with_a_controlnet_is_refused(
    edges, tmp_path, controlnet, capsys, no_model, options, name, shown
):
    other, mask = another(tmp_path)
    given = [option.format(other=other, mask=mask) for option in options]
    assert run(edges, tmp_path / "a.png", "--adapter", controlnet, *given) == 2
    refused_in_one_line(capsys, name, "ControlNet", shown)


BLOCK = """
from nexus_adapters import register_block
from nexus_adapters.adapter.stage import Stage

@register_block("test-cli-brighter")
class Brighter(Stage):
    def forward(self, x, prompt_embeds):
        return super().forward(x, prompt_embeds) + 1
"""


def test_a_block_of_ones_own_is_imported_by_an_option(edges, tmp_path, weights, plain, capsys):
    adapter = shutil.copytree(weights / "canny" / "prime-residual", tmp_path / "adapter")
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"block": "test-cli-brighter"}))
    file = tmp_path / "blocks_of_test_generate.py"
    file.write_text(BLOCK)
    assert run(edges, tmp_path / "a.png", "--adapter", adapter) == 2
    refused_in_one_line(capsys, "--adapter", "'test-cli-brighter'", "--import MODULE")
    assert run(edges, tmp_path / "a.png", "--adapter", adapter, "--import", file) == 0
    assert np.abs(pixels(tmp_path / "a.png") - plain).max() > 0


@pytest.mark.parametrize("name", ["gone.py", "gone_module", "bad.py"])
def test_modules_that_cannot_be_imported_are_one_line(edges, tmp_path, monkeypatch, capsys, no_model, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("1 / 0")
    assert run(edges, tmp_path / "a.png", "--import", name) == 2
    refused_in_one_line(capsys, "--import", f"'{name}'")


@pytest.mark.parametrize(("scale", "is_reported"), [("-0.5", True), ("0", False)])
def test_a_negative_scale_is_reported(scale, is_reported):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_scales(parsed("--map", "m.png", f"--scale={scale}"))
    assert [str(each.message).partition(":")[0] for each in caught] == ["scale"] * is_reported
