"""Loading bases: from folders, single files and saved pipelines of this package; always offline."""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from tests import tiny
from tests.refusals import refused
from tests.single_file import save_single_file

from nexus_adapters.bases import BaseSource, base_of, load_base, open_base
from nexus_adapters.bases.loading import denoiser_files, load_denoiser, load_encoders
from nexus_adapters.errors import MISSING
from nexus_adapters.pipelines import StableDiffusionNexusPipeline, StableDiffusionXLNexusPipeline

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
CPU = torch.device("cpu")


def tensors(pipe):
    return {
        f"{name}.{key}": tensor
        for name in MODULES
        if (part := getattr(pipe, name, None)) is not None
        for key, tensor in part.state_dict().items()
    }


def assert_same(found, expected):
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def configs(saved, tmp_path):
    """A base's folder without its weights."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.bin")
    return Path(shutil.copytree(saved, tmp_path / "configs", ignore=ignored))


@pytest.fixture
def file(saved, tmp_path):
    """The same base as one file."""
    save_single_file(StableDiffusionPipeline.from_pretrained(saved), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def loading_is_refused(monkeypatch):
    """No weights may be read."""

    def refuse(*_, **__):
        raise AssertionError("weights are read")

    for kind in (DiffusionPipeline, StableDiffusionPipeline, diffusers.UNet2DConditionModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
        monkeypatch.setattr(kind, "from_single_file", refuse, raising=False)


@pytest.mark.parametrize("source", [str, Path, lambda path: BaseSource(str(path))])
def test_a_folder_has_the_tensors_that_diffusers_loads(saved, source):
    pipe = load_base(source(saved))
    assert type(pipe) is StableDiffusionPipeline
    assert_same(pipe, DiffusionPipeline.from_pretrained(saved))
    assert {p.device for part in MODULES[:3] for p in getattr(pipe, part).parameters()} == {CPU}
    assert not any(getattr(pipe, part).training for part in MODULES[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_parts_have_the_dtype(saved, dtype):
    pipe = load_base(saved, dtype=dtype)
    expected = StableDiffusionPipeline.from_pretrained(saved)
    for part in MODULES[:3]:
        getattr(expected, part).to(dtype)
    assert_same(pipe, expected)


def test_sdxl(save):
    folder = save(tiny.sdxl)
    pipe = load_base(folder)
    assert type(pipe) is StableDiffusionXLPipeline
    assert_same(pipe, DiffusionPipeline.from_pretrained(folder))


def test_images_are_those_of_the_stock_pipeline(saved):
    def image(pipe):
        options = {"num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}
        return tiny.quiet(pipe)("a red star", generator=tiny.generators(1)[0], **options).images

    stock = StableDiffusionPipeline.from_pretrained(saved)
    assert (image(load_base(saved)) - image(stock)).abs().max() < 1e-5  # another memory format


def test_parts_in_place_of_its_own(saved):
    vae = tiny.vae()
    pipe = load_base(saved, vae=vae, safety_checker=None)
    assert pipe.vae is vae


def test_a_folder_saved_as_another_pipeline(folder):
    """It is loaded as the text-to-image pipeline of its parts, whatever it was saved as."""
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert type(load_base(folder)) is StableDiffusionPipeline


@pytest.mark.parametrize(
    ("build", "cls", "stock"),
    [
        (tiny.sd15, StableDiffusionNexusPipeline, StableDiffusionPipeline),
        (tiny.sdxl, StableDiffusionXLNexusPipeline, StableDiffusionXLPipeline),
    ],
)
def test_a_saved_nexus_pipeline(build, cls, stock, tmp_path):
    """Its stock parts are a base."""
    base = build()
    cls.from_pipe(base, adapter=tiny.adapter(base.unet)).save_pretrained(tmp_path)
    pipe = load_base(tmp_path)
    assert type(pipe) is stock
    assert_same(pipe, base)
    assert open_base(tmp_path).places() == base_of(base)[0].places()


def test_a_folder_with_fp16_alone(saved, tmp_path):
    stock = StableDiffusionPipeline.from_pretrained(saved)
    stock.to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    source = BaseSource(str(tmp_path))
    assert_same(load_base(source, dtype=torch.float16), stock)
    base = open_base(source)
    denoiser = load_denoiser(base, source, CPU, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), stock.unet.parameters(), strict=True))
    assert [file.name for file in denoiser_files(source)] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_a_variant_that_is_asked_for(folder):
    other = tiny.sd15(unet=tiny.unet(), text_encoder=tiny.text_encoder(projected=False))
    with torch.no_grad():
        for part in (other.unet, other.vae, other.text_encoder):
            next(part.parameters()).add_(1)
    other.save_pretrained(folder, variant="ema")
    assert_same(load_base(BaseSource(str(folder), variant="ema")), other)
    assert_same(load_base(folder), tiny.sd15())
    with refused("base", "fp32"):
        load_base(BaseSource(str(folder), variant="fp32"))


# What configs tell, without weights


@pytest.mark.usefixtures("loading_is_refused")
def test_opening_reads_no_weights(saved):
    base = open_base(saved)
    stock = tiny.sd15()
    expected, _ = base_of(stock)
    assert base.places() == expected.places()
    assert base.text_width == expected.text_width
    assert (base.latent_channels, base.pixels_per_latent) == (4, 8)
    assert base.size_multiple == 64
    assert base.num_train_timesteps == 1000
    assert base.pipe is None


def test_an_unknown_denoiser(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["_class_name"] = "UNetOfTomorrow"
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    for load in (open_base, load_base):
        with refused("base", str(folder), expected="UNet2DConditionModel"):
            load(folder)


def test_a_pipeline_without_a_denoiser(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with refused("base", "a StableDiffusionPipeline", expected="UNet2DConditionModel"):
        open_base(folder)


def test_an_inpainting_base(save):
    with refused("base", "9 and 4"):
        load_base(save(unet=tiny.unet(in_channels=9)))


def test_no_base(tmp_path):
    (tmp_path / "notes.txt").write_text("no base")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("[1]")
    for path, reason in (
        (tmp_path, "no model_index.json"),
        (tmp_path / "notes.txt", "a file of another kind"),
        ("nowhere", "does not exist"),
        ("owner/nowhere", "owner/nowhere"),  # the Hub cannot be asked
        (tmp_path / "nowhere.safetensors", "nowhere.safetensors"),
        (broken, "not a JSON object"),
    ):
        for load in (open_base, load_base):
            with refused("base", reason):
                load(path)
    with refused("base", "'nowhere'", hint="embedded"):
        load_base("nowhere")


def test_damaged_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    open_base(folder)
    with refused("base", str(folder)):
        load_base(folder)


def test_a_base_of_the_package_has_no_revision():
    for load in (open_base, load_base):
        with refused("base_revision", "'main'", expected="'embedded'"):
            load(BaseSource("embedded", revision="main"))


@tiny.writes_fast_tokenizers
def test_a_base_of_the_package():
    base = open_base("embedded")
    assert base.text_width > 0
    pipe = load_base()
    assert base_of(pipe)[0].places() == base.places()


# The denoiser and the encoders apart, as training loads them


def test_the_denoiser_alone(saved):
    source = BaseSource(str(saved))
    denoiser = load_denoiser(open_base(source), source, CPU, torch.float32)
    stock = DiffusionPipeline.from_pretrained(saved).unet
    assert type(denoiser) is type(stock)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), stock.parameters(), strict=True))
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert denoiser_files(source) == [saved / "unet" / "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("upcast", [True, False])
def test_the_encoders_alone(save, upcast):
    vae = tiny.vae()
    vae.register_to_config(force_upcast=upcast)
    folder = save(vae=vae)
    source = BaseSource(str(folder))
    base = open_base(source)
    load_encoders(base, source, CPU, torch.bfloat16)
    assert base.pipe.unet is None
    assert base.pipe.text_encoder.dtype == torch.bfloat16
    assert base.pipe.vae.dtype == (torch.float32 if upcast else torch.bfloat16)
    assert not any(p.requires_grad for p in base.pipe.vae.parameters())
    assert base.encode_prompts(["a red star"])["prompt_embeds"].shape == (1, tiny.TOKENS, tiny.TEXT_WIDTH)
    mean, _ = base.encode_images(tiny.condition() * 2 - 1)
    assert mean.shape == (1, 4, 8, 8)


# One file


def test_a_single_file_with_configs(file, configs, saved):
    source = BaseSource(str(file), config=str(configs))
    pipe = load_base(source)
    assert type(pipe) is StableDiffusionPipeline
    assert_same(pipe, DiffusionPipeline.from_pretrained(saved))
    assert open_base(source).places() == open_base(saved).places()
    denoiser = load_denoiser(open_base(source), source, CPU, torch.float32)
    stock = DiffusionPipeline.from_pretrained(saved).unet.state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in denoiser.state_dict().items())
    assert denoiser_files(source) == [file]


def test_a_single_files_prediction_type(file, configs):
    source = BaseSource(str(file), config=str(configs), prediction_type="v_prediction")
    assert load_base(source).scheduler.config.prediction_type == "v_prediction"
    assert open_base(source).schedule.config.prediction_type == "v_prediction"
    assert open_base(BaseSource(str(file), config=str(configs))).schedule.config.prediction_type == "epsilon"


def test_a_single_files_configs_must_be_whole(file, configs):
    shutil.rmtree(configs / "tokenizer")
    with refused("base", expected="including tokenizer"):
        open_base(BaseSource(str(file), config=str(configs)))


def test_a_file_without_configs_says_where_to_get_them(file):
    """Offline: diffusers' own would come from the Hub."""
    for load in (open_base, load_base):
        with refused("base_config", MISSING, hint="https://huggingface.co/stable-diffusion-v1-5/") as caught:
            load(file)
        assert "config and tokenizer files" in caught.value.hint


def sd2_file(folder, width=1024):
    """Of an SD 2.x what diffusers recognizes it by: the shape of its text's keys."""
    name = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = {
        name: torch.zeros(320, width),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
    }
    save_file(tensors, folder / "sd2.safetensors")
    return folder / "sd2.safetensors"


def test_a_file_of_sd2_does_not_say_what_it_predicts(tmp_path, configs):
    file = sd2_file(tmp_path)
    with refused("prediction_type", MISSING, hint="v_prediction") as caught:
        open_base(file)
    assert "epsilon" in caught.value.hint
    with refused("base_config", MISSING, hint="https://huggingface.co/stabilityai/stable-diffusion-2"):
        open_base(BaseSource(str(file), prediction_type="v_prediction"))
    open_base(BaseSource(str(file), config=str(configs)))  # whose scheduler says it


def test_a_file_of_sd2_whose_configs_do_not_say_either(tmp_path, configs):
    """diffusers would take epsilon for what is not said."""
    file, scheduler = sd2_file(tmp_path), configs / "scheduler" / "scheduler_config.json"
    content = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({k: v for k, v in content.items() if k != "prediction_type"}))
    with refused("prediction_type", MISSING, hint="v_prediction"):
        open_base(BaseSource(str(file), config=str(configs)))
    open_base(BaseSource(str(file), config=str(configs), prediction_type="v_prediction"))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["adapter.conv_in.weight", "adapter.body.0.cross_attention.to_k.weight"], "a Nexus or T2I-Adapter"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["lora_unet_down_blocks_0.alpha"], "a LoRA"),
        (["something.weight"], "something else (something.weight)"),
    ],
)
def test_a_file_without_a_denoiser_is_named(tmp_path, configs, names, what):
    file = tmp_path / "slim.safetensors"
    save_file({name: torch.zeros(4, 4) for name in names}, file)
    for config in ("", str(configs)):
        for load in (open_base, load_base):
            with refused("base", f"'{file}', which seems to be {what}"):
                load(BaseSource(str(file), config=config))


def test_what_is_no_safetensors_file(tmp_path, configs):
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"not a model")
    with refused("base", str(file), expected="safetensors"):
        load_base(file)
    with refused("base", str(file)):
        load_base(BaseSource(str(file), config=str(configs)))


def test_loading_is_quiet(saved, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base(saved)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_loading_a_single_file_shows_no_bars(file, configs, capfd):
    capfd.readouterr()
    load_base(BaseSource(str(file), config=str(configs)))
    shown = capfd.readouterr()
    assert "it/s" not in shown.out + shown.err
