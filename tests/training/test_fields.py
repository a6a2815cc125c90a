"""Every field of a recipe has an effect: a test for each, and none without."""

import dataclasses
import json
import shutil
import sys
import tarfile

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.refusals import refused
from tests.single_file import save_single_file
from tests.training.runs import CAPTIONS, recipe, run, write_images

from nexus_adapters import NexusAdapter
from nexus_adapters.adapter.blocks import register_block
from nexus_adapters.adapter.stage import Stage
from nexus_adapters.data import feed
from nexus_adapters.errors import MISSING
from nexus_adapters.methods import METHODS
from nexus_adapters.training import distributed as processes
from nexus_adapters.training import run as module
from nexus_adapters.training.config import BaseOptions, TrainConfig
from nexus_adapters.training.loop import DivergedError
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run_folder import flat


@register_block("scaled-in-test-fields")
class Scaled(Stage):
    """A block of one's own."""

    def __init__(self, *, gain: float = 2.0, **stage: object) -> None:
        super().__init__(**stage)
        self.gain = gain

    def forward(self, x: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(x, prompt_embeds)


WEIGHTS = "adapter/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fields")
    tiny.sd15().save_pretrained(root / "base")
    tiny.sd15().save_pretrained(root / "base", variant="fp16")
    tiny.sd15(unet=tiny.unet(layers_per_block=2)).save_pretrained(root / "other base")
    folder = write_images(root / "images")
    write_images(root / "other images", count=12)
    for index in range(14):  # a second image, map and caption for each line
        tiny.image(seed=300 + index).save(folder / f"other-{index:02d}.png")
        tiny.image(seed=400 + index).save(folder / f"map-{index:02d}.png")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line |= {
            "image": f"other-{index:02d}.png",
            "map": f"map-{index:02d}.png",
            "title": CAPTIONS[index % 3],
        }
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tarfile.open(root / "shard.tar", "w") as tar:
        for index in range(14):
            tar.add(folder / f"{index:02d}.png", f"{index:02d}.png")
            text = folder / "caption.txt"
            text.write_text(CAPTIONS[index % 4])
            tar.add(text, f"{index:02d}.txt")
            text.unlink()
    return root


@pytest.fixture(scope="module")
def reference(root):
    run(root, root / "reference")
    return root / "reference"


def differ(ours, theirs):
    ours, theirs = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    if {name: tensor.shape for name, tensor in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        return True
    return not all(torch.equal(ours[name], theirs[name]) for name in ours)


# Fields whose value decides the weights, with another value; and what else that value needs.
DECIDE = {
    "seed": (1, {}),
    "base.path": ("{root}/other base", {}),
    "adapter.method": ("slim", {}),
    "adapter.residual": (False, {}),
    "adapter.zero_init": (True, {}),
    "adapter.groups": (4, {"adapter__method": "slim"}),
    "adapter.heads": (2, {}),
    "adapter.head_width": (3, {}),
    "adapter.noise_exponent": (1.0, {}),
    "adapter.reads_prompt": (False, {}),
    "adapter.size_ratio": (0.5, {"adapter__method": "controlnet-xs"}),
    "adapter.block": ("scaled-in-test-fields", {}),
    "adapter.start_from": ("{root}/reference/adapter", {}),
    "data.path": ("{root}/other images", {}),
    "data.kind": ("scenes", {"data__count": 12, "data__path": ""}),
    "data.shards": (["{root}/shard.tar"], {"data__kind": "tars", "data__count": 12, "data__path": ""}),
    "data.image_column": ("image", {}),
    "data.condition_column": ("map", {}),
    "data.caption_column": ("title", {}),
    "data.extractor": ({"low": 900.0, "high": 1500.0}, {}),
    "data.count": (9, {}),
    "data.resolution": (128, {}),
    "loss.timesteps": ("uniform", {}),
    "loss.band": ([0.0, 0.5], {}),
    "loss.min_snr_gamma": (0.01, {}),
    "loss.prompt_dropout": (1.0, {}),
    "loss.condition_dropout": (0.9, {}),
    "training.max_train_steps": (3, {}),
    "training.batch_size": (3, {}),
    "training.gradient_accumulation_steps": (2, {}),
    "training.learning_rate": (1e-3, {}),
    "training.schedule": ("constant", {}),
    "training.warmup_steps": (2, {}),
    "training.optimizer": ("muon", {}),
    "training.betas": ([0.5, 0.9], {}),
    "training.epsilon": (1e-3, {}),
    "training.weight_decay": (0.5, {}),
    "training.max_grad_norm": (1e-6, {}),  # AdamW sees no difference but through epsilon
    "training.ema_decay": (0.5, {}),
    "training.mixed_precision": ("bf16", {}),
    "cache.enabled": (False, {}),  # a cache rounds to half precision
    "validation.samples": (1, {"validation__every_steps": 2, "validation__images": 0}),
}


@pytest.mark.parametrize("key", DECIDE)
def test_it_decides_the_weights(root, reference, tmp_path, key):
    value, others = DECIDE[key]
    filled = json.loads(json.dumps(value).replace("{root}", str(root)))
    run(root, tmp_path / "out", **others, **{key.replace(".", "__"): filled})
    assert differ(tmp_path / "out", reference)


def calls(monkeypatch, owner, name):
    """The keyword arguments of every call of a function, which goes on doing what it does."""
    seen, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: seen.append(kwargs) or real(*args, **kwargs))
    return seen


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def output_dir(root, out, monkeypatch):
    assert run(root, out) == out / "adapter"


def base_revision(root, out, monkeypatch):
    assert BaseOptions("somebody/model", revision="v2").source.arguments()["revision"] == "v2"
    seen = calls(monkeypatch, UNet2DConditionModel, "from_pretrained")
    run(root, out, base__revision="main")
    assert seen[0]["revision"] == "main"


def base_variant(root, out, monkeypatch):
    shutil.copytree(root / "base", out / "base")
    for file in (out / "base").rglob("*.safetensors"):
        if "fp16" not in file.name:
            file.unlink()
    run(root, out / "out", base__path=str(out / "base"), base__variant="fp16")
    # Where there is no plain save, the one that is there is read.
    assert not differ(run(root, out / "none", base__path=str(out / "base")).parent, out / "out")
    with refused("base.path", str(out / "base")):
        run(root, out / "other", base__path=str(out / "base"), base__variant="bf16")


def single_file(root, out):
    """A base in one file, and the arguments that let it be found."""
    out.mkdir()
    save_single_file(tiny.sd15(), out / "base.safetensors")
    return {"base__path": str(out / "base.safetensors")}


def base_config(root, out, monkeypatch):
    changes = single_file(root, out)
    run(root, out / "file", **changes, base__config=str(root / "base"))
    run(root, out / "folder")
    assert not differ(out / "file", out / "folder")  # the same base, whole
    with refused("base.config", MISSING, hint="folder"):  # whose default is on the Hub
        run(root, out / "none", **changes)
    with refused("base.config", f"'{root / 'base'}'", expected="no value"):
        run(root, out / "surplus", base__config=str(root / "base"))
    assert not (out / "none").exists()


def base_prediction_type(root, out, monkeypatch):
    changes = single_file(root, out) | {"base__config": str(root / "base")}
    run(root, out / "epsilon", **changes, base__prediction_type="epsilon")
    run(root, out / "v", **changes, base__prediction_type="v_prediction")
    assert differ(out / "epsilon", out / "v")
    run(root, out / "left", **changes)
    assert not differ(out / "epsilon", out / "left")  # as the config has it
    with refused("base.prediction_type", "'v_prediction'", expected="no value"):
        run(root, out / "surplus", base__prediction_type="v_prediction")


def imports(root, out, monkeypatch):
    """Before the rest of the recipe is read: what it names may be of there."""
    out.mkdir()
    (out / "nothing_of_fields.py").write_text("imported = True")
    monkeypatch.syspath_prepend(out)
    run(root, out / "out", imports=["nothing_of_fields"])
    assert sys.modules.pop("nothing_of_fields").imported


def adapter_block_options(root, out, monkeypatch):
    changes = {"adapter__block": "scaled-in-test-fields"}
    run(root, out / "default", **changes)
    adapter = run(root, out / "given", **changes, adapter__block_options={"gain": 3.0})
    assert differ(out / "default", out / "given")
    assert NexusAdapter.from_pretrained(adapter).config.block_options == {"gain": 3.0}
    with refused("adapter.block_options", "gian", expected="gain: float"):
        run(root, out / "unknown", **changes, adapter__block_options={"gian": 3.0})
    with refused("adapter.block", "'no such block'", hint="imports"):
        run(root, out / "none", adapter__block="no such block")


def data_split(root, out, monkeypatch):
    from datasets import Dataset, DatasetDict

    images = [str(path) for path in sorted((root / "images").glob("[0-9]*.png"))]
    parts = {
        name: Dataset.from_dict({"image": images[:n], "text": n * ["cat"]})
        for name, n in (("train", 14), ("few", 9))
    }
    DatasetDict(parts).save_to_disk(out / "table")
    options = {"data__kind": "table", "data__path": str(out / "table")}
    run(root, out / "train", **options)
    run(root, out / "few", **options, data__split="few")
    assert differ(out / "train", out / "few")


def data_revision(root, out, monkeypatch):
    from nexus_adapters.training import recipe_samples as sources

    seen = []
    monkeypatch.setattr(sources, "TableSource", lambda *args, **kwargs: seen.append(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(root, out, data__kind="table", data__path="somebody/images", data__revision="v2")
    assert seen[0]["revision"] == "v2"


def data_config_name(root, out, monkeypatch):
    from nexus_adapters.training import recipe_samples as sources

    seen = []
    monkeypatch.setattr(sources, "TableSource", lambda *args, **kwargs: seen.append(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(root, out, data__kind="table", data__path="somebody/images", data__config_name="small")
    assert seen[0]["config_name"] == "small"


def data_condition(root, out, monkeypatch):
    with refused("data.condition", "'hedges'", expected="canny"):
        run(root, out / "drawn", data__condition="hedges")
    changes = {"validation__every_steps": 2, "validation__images": 1, "data__condition_column": "map"}
    run(root, out / "given", data__condition="hedges", **changes)  # maps that are there need no extractor
    assert not any("structure_score" in row for row in logged(out / "given"))
    for condition in ("depth", "sketch"):  # which scenes have
        changes = {"data__kind": "scenes", "data__count": 12, "data__condition": condition, "data__path": ""}
        run(root, out / condition, **changes)
    assert differ(out / "depth", out / "sketch")
    with refused("data.condition", "'hedges'", expected="for data.kind 'scenes'"):
        run(root, out / "hedges", **changes | {"data__condition": "hedges"})
    with refused("data.extractor", "sigma", expected="no options, since scenes have exact maps for sketch"):
        run(root, out / "options", **changes, data__extractor={"sigma": 2.0})


def data_aspect_buckets(root, out, monkeypatch):
    folder = write_images(out / "wide")
    for path in list(folder.glob("0*.png")):
        Image.open(path).resize((128, 64)).save(path)
    changes = {"data__path": str(folder), "data__resolution": 256}
    run(root, out / "square", **changes)
    run(root, out / "buckets", **changes, data__aspect_buckets=True)
    assert differ(out / "square", out / "buckets")


def data_max_bad_fraction(root, out, monkeypatch):
    folder = write_images(out / "bad")
    (folder / "03.png").write_text("no image")
    run(root, out / "some", data__path=str(folder))
    with refused("data.max_bad_fraction", "1, such as", expected="at most 0.01 of 14 samples"):
        run(root, out / "none", data__path=str(folder), data__max_bad_fraction=0.01)


def data_workers(root, out, monkeypatch):
    seen = calls(monkeypatch, feed, "DataLoader")
    run(root, out, data__workers=1)
    assert seen[0]["num_workers"] == 1


def cache_folder(root, out, monkeypatch):
    run(root, out / "out", cache__folder=str(out / "cache"))
    assert list((out / "cache").glob("*.safetensors"))


def training_gradient_checkpointing(root, out, monkeypatch):
    real, unets = module.load_denoiser, []
    monkeypatch.setattr(module, "load_denoiser", lambda *args: unets.append(real(*args)) or unets[-1])
    run(root, out, training__gradient_checkpointing=True)
    (unet,) = unets
    assert unet.is_gradient_checkpointing


def training_compile(root, out, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    run(root, out, training__compile=True)
    assert len(compiled) == 2  # adapter and UNet


def training_cuda_graphs(root, out, monkeypatch):
    graphed = []
    monkeypatch.setattr(module, "GraphedDenoiser", lambda unet: graphed.append(unet) or unet)
    run(root, out / "a", training__cuda_graphs=True)
    assert not graphed  # on a CPU
    monkeypatch.setattr(module, "has_graphs", lambda device: True)
    run(root, out / "b", training__cuda_graphs=True)
    assert len(graphed) == 1
    run(root, out / "c")
    assert len(graphed) == 1


def training_channels_last(root, out, monkeypatch):
    formats = []
    real = module.build_optimizer

    def build(options, adapter):
        weight = adapter.adapter.conv_in.weight
        formats.append(weight.is_contiguous(memory_format=torch.channels_last))
        return real(options, adapter)

    monkeypatch.setattr(module, "build_optimizer", build)
    run(root, out / "a", training__channels_last=False)
    run(root, out / "b", training__channels_last=True)
    assert formats == [False, True]


def training_device(root, out, monkeypatch):
    seen = calls(monkeypatch, processes, "Accelerator")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for device in ("auto", "cpu"):
            processes.open_accelerator(parse_config(recipe(root, out, training__device=device)))
    assert [call["cpu"] for call in seen] == [False, True]


def training_max_bad_steps(root, out, monkeypatch):
    real = module.Objective.of
    monkeypatch.setattr(module.Objective, "of", lambda self, batch: real(self, batch) * float("nan"))
    run(root, out / "patient", training__max_bad_steps=9)
    with pytest.raises(DivergedError, match=r"no finite gradient in 2 steps in a row"):
        run(root, out / "strict", training__max_bad_steps=2)


def checkpoint_every_steps(root, out, monkeypatch):
    run(root, out, checkpoint__every_steps=3)
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["3", "4"]


def checkpoint_keep(root, out, monkeypatch):
    run(root, out, checkpoint__every_steps=1, checkpoint__keep=3)
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["2", "3", "4"]


def validated(root, out, **changes):
    run(root, out, **{"validation__every_steps": 2, "validation__images": 1} | changes)
    return [row for row in logged(out) if "val_loss" in row]


def validation_every_steps(root, out, monkeypatch):
    assert [row["step"] for row in validated(root, out / "a", validation__every_steps=1)] == [1, 2, 3, 4]
    # The last step in any case, for the card.
    assert [row["step"] for row in validated(root, out / "b", validation__every_steps=3)] == [3, 4]


def validation_images(root, out, monkeypatch):
    validated(root, out / "a")
    assert Image.open(out / "a/images/step-00000002.png").size == (64, 128 + 70)
    validated(root, out / "b", validation__images=0)
    assert not (out / "b/images").exists()


def validation_prompts(root, out, monkeypatch):
    pictures_differ(root, out, validation__prompts=["blurry cat"])


def validation_num_inference_steps(root, out, monkeypatch):
    pictures_differ(root, out, validation__num_inference_steps=3)


def validation_guidance_scale(root, out, monkeypatch):
    pictures_differ(root, out, validation__guidance_scale=9.0)


def pictures_differ(root, out, **changes):
    validated(root, out / "a")
    validated(root, out / "b", **changes)
    ours, theirs = (Image.open(out / name / "images/step-00000002.png") for name in "ab")
    assert ours.tobytes() != theirs.tobytes()


def validation_early_stop_patience(root, out, monkeypatch):
    monkeypatch.setattr(module, "structure_score", lambda *_: lambda *_: 0.5)  # never better
    rows = validated(root, out, validation__every_steps=1, validation__early_stop_patience=1)
    assert [row["step"] for row in rows] == [1, 2]
    assert json.loads((out / "adapter/training.json").read_text())["stopped_early"] is True
    before = (out / WEIGHTS).read_bytes()
    run(root, out, validation__every_steps=1, validation__images=1, validation__early_stop_patience=1)
    assert (out / WEIGHTS).read_bytes() == before  # a run that stopped early is finished


def log_every_steps(root, out, monkeypatch):
    run(root, out, log__every_steps=2)
    assert [row["step"] for row in logged(out)] == [2, 4]


def log_trackers(root, out, monkeypatch):
    monkeypatch.setattr(processes, "get_available_trackers", lambda: ["tensorboard"])
    with refused("log.trackers", "'wandb'", expected="installed trackers (tensorboard)"):
        run(root, out / "a", log__trackers=["wandb"])
    started = []
    monkeypatch.setattr(processes, "Accelerator", lambda **given: fake(given, started))
    pictures = {"validation__every_steps": 4, "validation__images": 1}
    run(root, out / "b", log__trackers=["tensorboard"], log__project="mine", **pictures)
    assert started[0]["log_with"] == ["tensorboard"]
    assert started[1][0] == "mine"
    assert {told["step"] for told in started[2:] if isinstance(told, dict)} == {1, 2, 3, 4}
    assert [told for told in started[2:] if not isinstance(told, dict)] == [("pictures", 4), "finished"]


class Tracker:
    """Keeps what it is told."""

    name = "wandb"

    def __init__(self, told):
        self.told = told

    def log_images(self, values, step):
        for name, pictures in values.items():
            assert pictures.shape[0] == 1
            assert pictures.shape[3] == 3
            self.told.append((name, step))

    def finish(self):
        self.told.append("finished")


def fake(given, started):
    """An Accelerator whose tracker is a list."""
    from accelerate import Accelerator

    started.append(given)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    accelerator.trackers = [Tracker(started)]
    accelerator.init_trackers = lambda project, config: started.append((project, config))
    accelerator.log = lambda values, step: started.append(values | {"step": step})
    return accelerator


def hub_repo_id(root, out, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            assert token == "from the environment"

        def create_repo(self, repo_id, private, exist_ok):
            seen.update(repo_id=repo_id, private=private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = {path.name for path in folder_path.iterdir()}
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    run(root, out, hub__repo_id="me/adapter", hub__private=True)
    assert (seen["repo_id"], seen["private"]) == ("me/adapter", True)
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} <= seen["files"]


SHOW = {
    "output_dir": output_dir,
    "base.revision": base_revision,
    "base.variant": base_variant,
    "base.config": base_config,
    "base.prediction_type": base_prediction_type,
    "imports": imports,
    "adapter.block_options": adapter_block_options,
    "data.split": data_split,
    "data.config_name": data_config_name,
    "data.revision": data_revision,
    "data.condition": data_condition,
    "data.aspect_buckets": data_aspect_buckets,
    "data.max_bad_fraction": data_max_bad_fraction,
    "data.workers": data_workers,
    "cache.folder": cache_folder,
    "training.gradient_checkpointing": training_gradient_checkpointing,
    "training.compile": training_compile,
    "training.cuda_graphs": training_cuda_graphs,
    "training.channels_last": training_channels_last,
    "training.device": training_device,
    "training.max_bad_steps": training_max_bad_steps,
    "checkpoint.every_steps": checkpoint_every_steps,
    "checkpoint.keep": checkpoint_keep,
    "validation.every_steps": validation_every_steps,
    "validation.images": validation_images,
    "validation.prompts": validation_prompts,
    "validation.num_inference_steps": validation_num_inference_steps,
    "validation.guidance_scale": validation_guidance_scale,
    "validation.early_stop_patience": validation_early_stop_patience,
    "log.every_steps": log_every_steps,
    "log.trackers": log_trackers,
    "log.project": log_trackers,
    "hub.repo_id": hub_repo_id,
    "hub.private": hub_repo_id,
}


@pytest.mark.parametrize("key", SHOW)
def test_it_shows(root, tmp_path, monkeypatch, key):
    SHOW[key](root, tmp_path / "out", monkeypatch)


def test_no_field_is_left_out(root):
    filled = {"data__extractor": {"low": 1.0}}
    whole = set(flat(dataclasses.asdict(parse_config(recipe(root, root / "out", **filled)))))
    whole |= {f"adapter.{f.name}" for each in METHODS.values() for f in dataclasses.fields(each.Options)}
    keys = {"data.extractor" if key.startswith("data.extractor.") else key for key in whole}
    assert keys == set(DECIDE) | set(SHOW)
    assert not set(DECIDE) & set(SHOW)
    assert dataclasses.is_dataclass(TrainConfig)
