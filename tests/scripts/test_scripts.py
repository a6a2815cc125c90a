"""The training scripts in miniature, end to end: autoencoder, base, and the models that score images."""

import json
import sys
from importlib import import_module
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPModel, CLIPTextModel

from nexus_adapters import extract
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.maps import depth_map, segmentation_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import draw_scene
from nexus_adapters.metrics.learned_features import load_features
from nexus_adapters.training.checkpoint import latest_checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"
DOCS = SCRIPTS.parent / "docs"
SCENES = 4
SIZES = ("--scenes", SCENES, "--steps", 2, "--batch-size", 2)


@pytest.fixture(scope="module")
def scripts():
    """Imports a script by name, as if it had been started from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        data = import_module("embedded_data")
        patch.setattr(data, "SHARD", SCENES // 2)
        patch.setattr(data, "ENCODE_BATCH", 1)
        patch.setattr(data, "CORPUS", 100)
        yield import_module


def run(script, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, options)])
        script.main()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def autoencoder(scripts, root):
    """The folder that train_autoencoder.py writes, after two steps."""
    script = scripts("train_autoencoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SCALE_BATCHES", 1)
        run(script, "--out", root / "autoencoder", "--steps", 2, "--batch-size", 2)
    return root / "autoencoder"


@pytest.fixture(scope="module")
def text_encoder(scripts, root, autoencoder):
    """The folder that train_text_encoder.py writes, after two steps."""
    folders = ("--cache", root, "--vae", autoencoder / "vae", "--out", root / "text_encoder")
    run(scripts("train_text_encoder"), *folders, *SIZES)
    return root / "text_encoder"


def base_folders(root):
    parts = ("--vae", root / "autoencoder" / "vae", "--text-encoder", root / "text_encoder" / "model")
    return ("--cache", root, *parts, "--out", root / "base")


@pytest.fixture(scope="module")
def base(scripts, root, autoencoder, text_encoder):
    """The folder that train_base.py writes, after two steps."""
    run(scripts("train_base"), *base_folders(root), *SIZES)
    return root / "base"


def steps_logged(folder):
    return latest_checkpoint(folder / "checkpoints").step


def test_the_autoencoder_loads_and_shrinks_eight_times(autoencoder):
    vae = AutoencoderKL.from_pretrained(autoencoder / "vae")
    assert steps_logged(autoencoder) == 2
    assert vae.config.scaling_factor != 0.18215  # diffusers' default, Stable Diffusion's
    latents = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean
    assert latents.shape == (1, vae.config.latent_channels, 16, 16)
    assert vae.decode(latents).sample.shape == (1, 3, 128, 128)


@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.float32}])
def test_the_base_loads_as_a_stock_pipeline_and_draws(base, options):
    pipe = StableDiffusionPipeline.from_pretrained(base / "pipeline", local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red star", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert np.isfinite(image).all()


def test_the_base_is_small_and_has_sd15s_blocks(base):
    unet = UNet2DConditionModel.from_pretrained(base / "pipeline", subfolder="unet")
    assert sum(parameter.numel() for parameter in unet.parameters()) <= 8_000_000
    assert list(unet.config.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert list(unet.config.up_block_types) == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    sizes = [path.stat().st_size for path in (base / "pipeline").rglob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) <= 16 * 2**20


def test_half_of_the_bases_timesteps_are_cubic_and_all_spread_evenly(scripts):
    draw = scripts("train_base").draw_mixed_timesteps
    for seed in range(5):
        steps = draw(1000, 1000, torch.Generator().manual_seed(seed))
        cubic, even = steps[0::2], steps[1::2]
        assert torch.equal(even.sort().values // 2, torch.arange(500))  # one in every two timesteps
        share = (cubic > 875).float().mean().item()  # 1 - u^3 > 0.875 for u < 0.5
        assert abs(share - 0.5) < 0.01
        assert steps.min() >= 0
        assert steps.max() <= 999
    assert len({tuple(draw(4, 1000, torch.Generator().manual_seed(seed)).tolist()) for seed in range(5)}) == 5


def test_every_word_is_one_token(base):
    pipe = StableDiffusionPipeline.from_pretrained(base / "pipeline", local_files_only=True)
    tokenizer = pipe.tokenizer
    assert tokenizer.model_max_length == 77
    for seed in range(50):
        sentence = caption(draw_scene(seed, "test"))
        pieces = tokenizer.tokenize(sentence)
        assert pieces == [f"{word}</w>" for word in sentence.replace(",", " ,").replace(".", " .").split()]
        assert tokenizer.unk_token not in pieces
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_scenes_are_kept_and_read_back(scripts, root, autoencoder, base):
    data = scripts("embedded_data")
    files = sorted(root.glob("scenes-*/*.safetensors"))[:2]  # of two scenes each
    assert [path.stem for path in files] == ["0000000", "0000002"]
    before = [path.stat().st_mtime_ns for path in files]
    tokenizer = StableDiffusionPipeline.from_pretrained(base / "pipeline").tokenizer
    cache = data.load_scenes(autoencoder / "vae", tokenizer, SCENES - 1, root, "cpu")
    assert [path.stat().st_mtime_ns for path in files] == before
    assert len(cache) == SCENES - 1
    expected = data.token_ids(tokenizer, [caption(draw_scene(1), 2)])[0]
    assert torch.equal(cache.tokens[1, 2].long(), expected)


def scenes_of_their_number(data, count):
    """A cache in which scene i has i in every latent and token."""
    numbers = torch.arange(count)
    return data.SceneCache(
        latents=numbers.view(-1, 1, 1, 1).expand(-1, 12, 16, 16).half(),
        tokens=numbers.view(-1, 1, 1).expand(-1, data.PHRASINGS, 77).short(),
    )


def test_a_batch_holds_latents_and_prompt_of_the_same_scenes(scripts):
    data = scripts("embedded_data")
    scenes, empty = scenes_of_their_number(data, 50), torch.full((1, 77), -1)
    batch = data.draw_batch(scenes, empty, 2000, torch.Generator().manual_seed(3), "cpu")
    drawn = batch.latents[:, 0, 0, 0].long()
    assert len(drawn.unique()) == 50
    dropped = (batch.tokens == -1).all(1)
    assert torch.equal(batch.tokens[~dropped], drawn[~dropped, None].expand(-1, 77))
    assert abs(dropped.float().mean().item() - data.PROMPT_DROPOUT) < 0.02
    assert abs(batch.noise.std().item() - 1) < 0.01
    again = data.draw_batch(scenes, empty, 2000, torch.Generator().manual_seed(3), "cpu")
    assert torch.equal(again.tokens, batch.tokens)
    assert torch.equal(again.noise, batch.noise)


def test_prompts_are_dropped_in_one_batch_row_of_ten(scripts):
    assert scripts("embedded_data").PROMPT_DROPOUT == 0.1


def test_run_again_nothing_is_trained_anew(scripts, root, base):
    before = latest_checkpoint(base / "checkpoints").tensors("module")
    weights = base / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    saved = weights.read_bytes()
    run(scripts("train_base"), *base_folders(root), *SIZES)
    after = latest_checkpoint(base / "checkpoints").tensors("module")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert weights.read_bytes() == saved


@pytest.mark.full
def test_the_base_is_trained_further_from_saved_weights(scripts, root, base):
    start = base / "pipeline" / "unet"
    out = root / "further"
    still = ("--learning-rate", 1e-30, "--start", start, "--out", out)
    run(scripts("train_base"), *base_folders(root), *SIZES, *still)
    before, after = (
        UNet2DConditionModel.from_pretrained(unet) for unet in (start, out / "pipeline" / "unet")
    )
    assert steps_logged(out) == 2
    for name, weights in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weights), name


def test_the_base_names_no_folder_of_the_machine(root, base):
    configs = [path.read_text() for path in (base / "pipeline").rglob("*.json")]
    assert len(configs) >= 5
    assert not any(str(root) in config for config in configs)


def test_the_text_encoder_is_the_bases(text_encoder, base):
    trained = CLIPTextModel.from_pretrained(text_encoder / "model").state_dict()
    kept = CLIPTextModel.from_pretrained(base / "pipeline" / "text_encoder").state_dict()
    assert trained.keys() == kept.keys()
    assert all(torch.allclose(trained[name].half().float(), kept[name].float()) for name in trained)


def test_a_paraphrase_depends_on_the_prompt_and_the_words_before(scripts):
    module = scripts("train_text_encoder")
    torch.manual_seed(0)
    paraphraser = module.Paraphraser(50).eval()
    tokens, prompt = torch.randint(50, (2, 6)), torch.randn(2, 5, module.TEXT_WIDTH)
    is_padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    logits = paraphraser(tokens, prompt, is_padding)
    later, padded, read = tokens.clone(), prompt.clone(), prompt.clone()
    later[:, 4:] = 7
    padded[1, 3:] = 0
    read[:, 1] = 0
    assert torch.allclose(paraphraser(later, prompt, is_padding)[:, :4], logits[:, :4], atol=1e-5)
    assert torch.allclose(paraphraser(tokens, padded, is_padding)[1], logits[1], atol=1e-5)
    assert not torch.allclose(paraphraser(tokens, read, is_padding), logits, atol=1e-3)


def test_the_gallery(scripts, root, monkeypatch):
    """One sheet of each kind of drawing, in two steps."""
    gallery = scripts("gallery")
    monkeypatch.setattr(gallery, "STEPS", 2)
    gallery.main(["--out", str(root / "gallery"), "--only", "mask", "inpainting", "image-to-image"])
    assert sorted(path.name for path in (root / "gallery").iterdir()) == [
        "image-to-image.webp",
        "inpainting.webp",
        "mask.webp",
    ]
    with Image.open(root / "gallery" / "mask.webp") as sheet:
        assert sheet.width > 1000


def test_the_gallerys_page_shows_each_sheet(scripts):
    page = (DOCS / "gallery.md").read_text()
    for name in scripts("gallery").SHEETS:
        assert f"(gallery/{name}.webp)" in page
        assert (DOCS / "gallery" / f"{name}.webp").is_file()


def test_the_clip_is_one_that_features_are_taken_of(scripts, root):
    script = scripts("train_clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "TEST_SCENES", 6)
        run(script, "--out", root / "clip", "--steps", 2, "--batch-size", 2)
    measured = json.loads((root / "clip" / "retrieval.json").read_text())
    assert "_name_or_path" not in (root / "clip" / "model" / "config.json").read_text()
    assert measured["test_scenes"] == 6
    assert all(0 <= measured[key] <= 1 for key in measured if key != "test_scenes")
    model = load_features(str(root / "clip" / "model"))
    scene = draw_scene(0, "test")
    image = Image.fromarray(render(scene).image)
    assert model.images([image]).shape == model.texts([caption(scene)]).shape == (1, script.PROJECTION)
    pixels, tokens, nearly = script.draw_batch([0], "test", script.build_clip()[1], 0)
    with torch.no_grad():
        clip = CLIPModel.from_pretrained(root / "clip" / "model", dtype=torch.float32).eval()
        expected, _ = script.embed(clip, pixels, tokens, int(tokens[0, -1]))
    found = torch.nn.functional.normalize(model.images([image]), dim=1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert tokens.shape == nearly.shape == (1, 77)


def test_exchanged_captions_differ_in_two_objects_alone(scripts):
    script = scripts("train_clip")
    for seed in range(50):
        scene = draw_scene(seed)
        other = script.exchanged(scene, Random(seed))
        if other is None:
            continue
        changed = [a != b for a, b in zip(scene.objects, other.objects, strict=True)]
        assert sum(changed) == 2
        assert sorted(item.shape for item in other.objects) == sorted(item.shape for item in scene.objects)
        assert caption(other) != caption(scene)


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_judges_are_models_that_extractors_load(scripts, root, task):
    script = scripts("train_judges")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "TEST_SCENES", 2)
        run(script, task, "--out", root / "judges", "--steps", 2, "--batch-size", 2)
    measured = json.loads((root / "judges" / task / "measured.json").read_text())
    assert 0 <= measured["depth_rmse" if task == "depth" else "mean_iou"] <= 1
    image = Image.fromarray(render(draw_scene(0, "test")).image)
    options = {"model": str(root / "judges" / task / "model")}
    options |= {"palette": "voc"} if task == "segmentation" else {}
    drawn = extract(task, image, **options)
    assert drawn.size == image.size


def test_judges_learn_from_scenes_true_maps(scripts):
    script = scripts("train_judges")
    images, labels, near = script.draw_batch([3], "train", is_spoiled=False)
    scene = draw_scene(3)
    rendering = render(scene)
    colors = np.array(script.CLASSES)[labels[0].numpy()]
    assert np.array_equal(colors, segmentation_map(scene, rendering))
    assert np.array_equal(np.rint(near[0].numpy() * 255), depth_map(rendering)[..., 0])
    assert np.array_equal(np.rint(images[0].numpy().transpose(1, 2, 0) * 255), rendering.image)
    spoiled, again, _ = script.draw_batch([3], "train", is_spoiled=True)
    assert not torch.allclose(spoiled, images)
    assert torch.equal(again, labels)
