"""Every field of a recipe has an effect: each has a test here."""

import dataclasses
import json
import os
import shutil
import sys
import tarfile

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.refusals import refused
from tests.single_file import save_single_file
from tests.training.runs import CAPTIONS, SMALL_UNET, recipe, run, write_images

from nexus_adapters import NexusAdapter
from nexus_adapters.adapter.blocks import register_block
from nexus_adapters.adapter.stage import Stage
from nexus_adapters.bases.loading import BaseSource
from nexus_adapters.conditions import EXTRACTORS, Extractor, register_condition
from nexus_adapters.errors import MISSING
from nexus_adapters.methods import METHODS, find_method
from nexus_adapters.training import distributed
from nexus_adapters.training import run as module
from nexus_adapters.training.config import BaseOptions, DataOptions, ValidationOptions
from nexus_adapters.training.loop import DivergedError
from nexus_adapters.training.precision import Precision
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.recipe_samples import open_samples, open_training_source
from nexus_adapters.training.run_identity import flat
from nexus_adapters.training.validation_images import (
    ValidationInput,
    generate_validation_images,
    validation_inputs,
)


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
    tiny.sd15(unet=tiny.unet(**SMALL_UNET)).save_pretrained(root / "base")
    tiny.sd15(unet=tiny.unet(**SMALL_UNET)).save_pretrained(root / "base", variant="fp16")
    tiny.sd15().save_pretrained(root / "sd15")
    tiny.sd15(unet=tiny.unet(**SMALL_UNET, layers_per_block=2)).save_pretrained(root / "other base")
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
    for name, prefix in (("shard", ""), ("other shard", "other-")):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for index in range(14):
                tar.add(folder / f"{prefix}{index:02d}.png", f"{index:02d}.png")
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


# Fields whose value decides the weights, with another value; and what else both runs have.
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
    "adapter.size_ratio": (1.0, {"adapter__method": "controlnet-xs", "adapter__size_ratio": 0.5}),
    "adapter.train": ("attention", {"adapter__start_from": "{root}/reference/adapter"}),
    "adapter.block": ("scaled-in-test-fields", {}),
    "adapter.start_from": ("{root}/reference/adapter", {}),
    "adapter.start_from_optimizer": (True, {"adapter__start_from": "{root}/reference"}),
    "data.path": ("{root}/other images", {}),
    "data.shards": (
        ["{root}/other shard.tar"],
        {"data__kind": "tars", "data__path": "", "data__shards": ["{root}/shard.tar"]},
    ),
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
    "training.warmup_steps": (3, {}),
    "training.optimizer": ("muon", {}),
    "training.betas": ([0.5, 0.9], {}),
    "training.epsilon": (1e-3, {}),
    "training.weight_decay": (0.5, {}),
    "training.max_grad_norm": (1e-6, {}),  # AdamW sees no difference but through epsilon
    "training.ema_decay": (0.5, {}),
    "training.mixed_precision": ("bf16", {}),
    "cache.enabled": (False, {}),  # a cache rounds to half precision
}


# What other tests see only in a whole run.
ALWAYS = {
    "seed",
    "adapter.reads_prompt",
    "data.shards",
    "data.caption_column",
    "data.extractor",
    "loss.band",
    "loss.condition_dropout",
    "training.ema_decay",
    "training.epsilon",
    "cache.enabled",
}


@pytest.mark.parametrize(
    "key", [key if key in ALWAYS else pytest.param(key, marks=pytest.mark.full) for key in DECIDE]
)
def test_it_decides_the_weights(root, reference, tmp_path, key):
    value, others = json.loads(json.dumps(DECIDE[key]).replace("{root}", str(root)))
    if others:
        reference = run(root, tmp_path / "reference", **others).parent
    run(root, tmp_path / "out", **others | {key.replace(".", "__"): value})
    assert differ(tmp_path / "out", reference)


def calls(monkeypatch, owner, name):
    """The keyword arguments of every call of a function, which still does what it does."""
    seen, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: seen.append(kwargs) or real(*args, **kwargs))
    return seen


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


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
    with refused("base.path", str(out / "base")):
        run(root, out / "other", base__path=str(out / "base"), base__variant="bf16")


def single_file(root, out):
    """A base in one file, and the arguments that let it be found."""
    out.mkdir()
    save_single_file(tiny.sd15(), out / "base.safetensors")
    return {"base__path": str(out / "base.safetensors")}


def base_config(root, out, monkeypatch):
    changes = single_file(root, out)
    run(root, out / "file", **changes, base__config=str(root / "sd15"))
    with refused("base.config", MISSING, hint="folder"):  # whose default is on the Hub
        run(root, out / "none", **changes)
    with refused("base.config", f"'{root / 'base'}'", expected="no value"):
        run(root, out / "surplus", base__config=str(root / "base"))
    assert not (out / "none").exists()


def base_prediction_type(root, out, monkeypatch):
    changes = single_file(root, out) | {"base__config": str(root / "sd15")}
    run(root, out / "epsilon", **changes)  # as the config has it
    run(root, out / "v", **changes, base__prediction_type="v_prediction")
    assert differ(out / "epsilon", out / "v")
    with refused("base.prediction_type", "'v_prediction'", expected="no value"):
        run(root, out / "surplus", base__prediction_type="v_prediction")


def imports(root, out, monkeypatch):
    """Before the rest of the recipe is read: what it names may be of there."""
    out.mkdir()
    (out / "nothing_of_fields.py").write_text("imported = True")
    monkeypatch.syspath_prepend(out)
    parse_config(recipe(root, out / "out", imports=["nothing_of_fields"]))
    assert sys.modules.pop("nothing_of_fields").imported


def adapter_block_options(root, out, monkeypatch):
    changes = {"adapter__block": "scaled-in-test-fields"}
    adapter = NexusAdapter.from_pretrained(run(root, out, **changes, adapter__block_options={"gain": 3.0}))
    assert adapter.config.block_options == {"gain": 3.0}
    assert {stage.gain for stage in adapter.adapter.body} == {3.0}
    with refused("adapter.block_options", "gian", expected="gain: float"):
        run(root, out / "unknown", **changes, adapter__block_options={"gian": 3.0})
    with refused("adapter.block", "'no such block'", hint="imports"):
        run(root, out / "none", adapter__block="no such block")


def data_of_the_hub(root, out, monkeypatch):
    """Which are passed on to the library of the dataset."""
    import datasets

    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **given: seen.append((path, given)) or 1 / 0)
    changes = {"data__kind": "table", "data__path": "somebody/images"}
    with refused("data.path", "'somebody/images'"):
        run(root, out, **changes, data__revision="v2", data__config_name="small", data__split="few")
    ((path, given),) = seen
    assert path == "somebody/images"
    assert (given["revision"], given["name"], given["split"]) == ("v2", "small", "few")


def data_condition(root, out, monkeypatch):
    with refused("data.condition", "'hedges'", expected="canny"):
        run(root, out / "extracted", data__condition="hedges")
    changes = {"data__condition_column": "map", "data__condition": "hedges"}
    rows = validated(root, out / "given", **changes)  # maps that are there need no extractor
    assert not any("structure_score" in row for row in rows)
    scenes = {"kind": "scenes", "count": 12, "resolution": 64}
    for condition in ("canny", "depth"):  # which scenes have
        run(root, out / condition, data=scenes | {"condition": condition})
    assert differ(out / "canny", out / "depth")
    with refused("data.condition", "'hedges'", expected="for data.kind 'scenes'"):
        run(root, out / "hedges", data=scenes | {"condition": "hedges"})
    with refused("data.extractor", "sigma", expected="no options, since the sketch maps of scenes are exact"):
        run(root, out / "options", data=scenes | {"condition": "sketch", "extractor": {"sigma": 2.0}})


def data_aspect_buckets(root, out, monkeypatch):
    folder = write_images(out / "wide")
    for path in list(folder.glob("0*.png")):
        Image.open(path).resize((128, 64)).save(path)
    changes = {"data__path": str(folder), "data__resolution": 256}
    run(root, out / "square", **changes)
    run(root, out / "buckets", **changes, data__aspect_buckets=True)
    assert differ(out / "square", out / "buckets")


def data_allow_outside(root, out, monkeypatch):
    (out / "images").mkdir(parents=True)
    shutil.copy(next((root / "images").glob("*.png")), out / "outside.png")
    rows = json.dumps({"file_name": "../outside.png", "text": "a"})
    (out / "images" / "metadata.jsonl").write_text(rows)
    data = DataOptions(path=str(out / "images"))
    with refused("data.image_column", "../outside.png", hint="allow_outside"):
        open_training_source(data, out / "cache")
    source = open_training_source(dataclasses.replace(data, allow_outside=True), out / "cache")
    assert source.load(0).captions == ("a",)


def data_max_bad_fraction(root, out, monkeypatch):
    folder = write_images(out / "bad")
    (folder / "03.png").write_text("no image")
    run(root, out / "some", data__path=str(folder))
    with refused("data.max_bad_fraction", "1, such as", expected="at most 0.01 of 14 samples"):
        run(root, out / "none", data__path=str(folder), data__max_bad_fraction=0.01)


def data_workers(root, out, monkeypatch):
    """Other processes read the samples."""
    out.mkdir()

    def extract(image):
        with (out / "processes").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return image

    with EXTRACTORS.temporary():
        register_condition(Extractor("process-in-test-fields", extract, "Says who extracts."))
        changes = {"data__condition": "process-in-test-fields", "cache__enabled": False}
        run(root, out / "run", **changes, data__workers=1)
    (found,) = set((out / "processes").read_text().split())
    assert int(found) != os.getpid()


def folders(root, out, monkeypatch):
    assert run(root, out / "out", cache__folder=str(out / "cache")) == out / "out" / "adapter"
    assert list((out / "cache").glob("*.safetensors"))


def training_cuda_graphs(root, out, monkeypatch):
    recorded = []
    record = lambda call, samples, **_: recorded.append(samples) or call  # noqa: E731
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    run(root, out / "a", training__cuda_graphs=True)
    assert not recorded  # on a CPU
    monkeypatch.setattr(module, "supports_cuda_graphs", lambda device: True)
    run(root, out / "b", training__cuda_graphs=True)
    assert len(recorded) == 1  # once for all steps
    assert not differ(out / "a", out / "b")


def training_device(root, out, monkeypatch):
    seen = []
    monkeypatch.setattr(distributed, "Accelerator", lambda **given: seen.append(given["cpu"]) or 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cpu"):
        with pytest.raises(ZeroDivisionError):
            run(root, out, training__device=device)
    assert seen == [False, True]


def training_compile(root, out, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    run(root, out, training__compile=True)
    assert len(compiled) == 2  # adapter and UNet


def checkpoints_and_log(root, out, monkeypatch):
    changes = {"training__max_train_steps": 5, "checkpoint__every_steps": 2, "checkpoint__keep": 2}
    changes["training__schedule"] = "constant"
    run(root, out, **changes, log__every_steps=2, checkpoint__keep_every=1)
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["1", "2", "3", "4", "5"]
    run(root, out, **changes | {"training__max_train_steps": 7}, log__every_steps=2)
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["6", "7"]
    assert [row["step"] for row in logged(out)] == [2, 4, 6]


def validated(root, out, **changes):
    run(root, out, **{"validation__every_steps": 2, "validation__images": 1, "log__every_steps": 1} | changes)
    return [row for row in logged(out) if "val_loss" in row]


def validation_every_steps(root, out, monkeypatch):
    changes = {"training__max_train_steps": 3, "validation__images": 0}
    rows = validated(root, out, **changes)
    assert [row["step"] for row in rows] == [2, 3]  # the last one in any case, for the card
    assert not (out / "images").exists()


def validation_samples(root, out, monkeypatch):
    folder = write_images(out / "images", count=20)
    changes = {"validation__every_steps": 2, "validation__images": 0, "data__path": str(folder)}
    run(root, out / "one", **changes, validation__samples=1)
    run(root, out / "two", **changes, validation__samples=2)
    assert differ(out / "one", out / "two")  # the others are trained on


def validation_images(root, out, monkeypatch):
    validated(root, out)
    assert Image.open(out / "images/step-00000002.png").size == (64, 128 + 70)


def validation_settings(root, out, monkeypatch):
    """Of the pipeline that generates them."""
    unet = UNet2DConditionModel.from_pretrained(root / "base", subfolder="unet")
    adapter, inputs = tiny.adapter(unet), [ValidationInput("a red star", tiny.image())]
    base, method, precision = (
        BaseSource(str(root / "base")),
        find_method("prime"),
        Precision("cpu", torch.float32),
    )
    images = set()
    for steps, guidance in ((2, 2.0), (3, 2.0), (2, 9.0)):
        options = ValidationOptions(num_inference_steps=steps, guidance_scale=guidance)
        (image,) = generate_validation_images(unet, base, method, adapter, precision, inputs, options, 0)
        images.add(image.tobytes())
    assert len(images) == 3


def validation_prompts(root, out, monkeypatch):
    samples = open_samples(parse_config(recipe(root, out)).data, out, 8)
    for prompts, expected in (((), [CAPTIONS[3], CAPTIONS[0]]), (("a cat",), ["a cat", "a cat"])):
        inputs = validation_inputs(samples, [3, 4, 5], ValidationOptions(images=2, prompts=prompts))
        assert [each.prompt for each in inputs] == expected


def validation_early_stop_patience(root, out, monkeypatch):
    changes = {"validation__every_steps": 1, "validation__early_stop_patience": 1}
    changes |= {"data__condition": "same-in-test-fields", "training__max_train_steps": 4}
    with EXTRACTORS.temporary():
        same = {"agreement": lambda found, wanted: 0.5}  # never better
        register_condition(Extractor("same-in-test-fields", lambda image: image, "The image.", **same))
        rows = validated(root, out, **changes)
        assert [row["step"] for row in rows] == [1, 2]
        record = json.loads((out / "adapter/training.json").read_text())
        assert (record["stopped_early"], record["weights_of_step"]) == (True, 1)
        before = (out / WEIGHTS).read_bytes()
        validated(root, out, **changes)
    assert (out / WEIGHTS).read_bytes() == before  # a run that stopped early is finished


def log_trackers(root, out, monkeypatch):
    monkeypatch.setattr(distributed, "get_available_trackers", lambda: ["tensorboard"])
    with refused("log.trackers", "'wandb'", expected="installed trackers (tensorboard)"):
        run(root, out / "a", log__trackers=["wandb"])
    tracker = Tracker()

    def accelerator(log_with, **given):
        assert log_with == ["tensorboard"]
        found = Accelerator(**given)
        found.init_trackers = lambda project, config: found.trackers.append(tracker.start(project, config))
        return found

    monkeypatch.setattr(distributed, "Accelerator", accelerator)
    validated(root, out / "b", log__trackers=["tensorboard"], log__project="mine")
    assert tracker.project == "mine"
    assert tracker.config["seed"] == 0
    assert [step for step, values in tracker.rows if "loss" in values] == [1, 2]
    assert [step for step, values in tracker.rows if "val_loss" in values] == [2]
    assert tracker.images == [(2, (1, 128 + 70, 64, 3))]
    assert tracker.is_finished


class Tracker:
    """Keeps what it gets."""

    name = "wandb"

    def __init__(self):
        self.rows, self.images, self.is_finished = [], [], False

    def start(self, project, config):
        self.project, self.config = project, config
        return self

    def log(self, values, step, **_):
        self.rows.append((step, values))

    def log_images(self, values, step):
        self.images += [(step, sheet.shape) for sheet in values.values()]

    def finish(self):
        self.is_finished = True


def hub_repo_id(root, out, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            assert token == "from the environment"

        def create_repo(self, repo_id, private, exist_ok):
            seen.update(repo_id=repo_id, private=private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = {path.name for path in folder_path.iterdir()}
            seen["card"] = ModelCard.load(folder_path / "README.md").data
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    hub = {"repo_id": "me/adapter", "private": True, "license": "apache-2.0", "base_model": "owner/base"}
    run(root, out, hub=hub)
    assert (seen["repo_id"], seen["private"]) == ("me/adapter", True)
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} <= seen["files"]
    card = seen["card"].to_dict()
    assert (card["license"], card["base_model"]) == ("apache-2.0", "owner/base")
    assert card["base_model_relation"] == "adapter"


SHOW = {
    "output_dir": folders,
    "base.revision": base_revision,
    "base.variant": base_variant,
    "base.config": base_config,
    "base.prediction_type": base_prediction_type,
    "imports": imports,
    "adapter.block_options": adapter_block_options,
    "data.split": data_of_the_hub,
    "data.config_name": data_of_the_hub,
    "data.revision": data_of_the_hub,
    "data.kind": data_condition,
    "data.condition": data_condition,
    "data.aspect_buckets": data_aspect_buckets,
    "data.allow_outside": data_allow_outside,
    "data.max_bad_fraction": data_max_bad_fraction,
    "data.workers": data_workers,
    "cache.folder": folders,
    "training.compile": training_compile,
    "training.cuda_graphs": training_cuda_graphs,
    "training.device": training_device,
    "checkpoint.every_steps": checkpoints_and_log,
    "checkpoint.keep": checkpoints_and_log,
    "checkpoint.keep_every": checkpoints_and_log,
    "validation.every_steps": validation_every_steps,
    "validation.samples": validation_samples,
    "validation.images": validation_images,
    "validation.prompts": validation_prompts,
    "validation.num_inference_steps": validation_settings,
    "validation.guidance_scale": validation_settings,
    "validation.early_stop_patience": validation_early_stop_patience,
    "validation.select": validation_early_stop_patience,
    "log.every_steps": checkpoints_and_log,
    "log.trackers": log_trackers,
    "log.project": log_trackers,
    "hub.repo_id": hub_repo_id,
    "hub.private": hub_repo_id,
    "hub.license": hub_repo_id,
    "hub.base_model": hub_repo_id,
}


@pytest.mark.parametrize(
    "show",
    [
        pytest.param(show, marks=pytest.mark.full) if show is data_aspect_buckets else show
        for show in dict.fromkeys(SHOW.values())
    ],
)
def test_it_shows(root, tmp_path, monkeypatch, show):
    show(root, tmp_path / "out", monkeypatch)


def test_gradient_checkpointing_and_channels_last(root, tmp_path, watched):
    for is_on in (True, False):
        changes = {"training__gradient_checkpointing": is_on, "training__channels_last": is_on}
        run(root, tmp_path / str(is_on), adapter__method="watched", **changes)
        assert watched.denoiser.is_gradient_checkpointing == is_on
        weight = watched.adapter.adapter.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_on


def test_max_bad_steps(root, tmp_path, watched):
    watched.after_pass = lambda features: [feature * float("nan") for feature in features]
    changes = {"adapter__method": "watched", "training__max_bad_steps": 1}
    with pytest.raises(DivergedError, match=r"no finite gradient in 1 steps in a row"):
        run(root, tmp_path / "out", **changes)
    watched.after_pass = lambda features: features


# Whose tests watch what is trained.
WATCHED = {"training.gradient_checkpointing", "training.channels_last", "training.max_bad_steps"}


def test_no_field_is_left_out(root):
    filled = {"data__extractor": {"low": 1.0}}
    whole = set(flat(dataclasses.asdict(parse_config(recipe(root, root / "out", **filled)))))
    whole |= {f"adapter.{f.name}" for each in METHODS.values() for f in dataclasses.fields(each.Options)}
    keys = {"data.extractor" if key.startswith("data.extractor.") else key for key in whole}
    assert sorted(keys) == sorted([*DECIDE, *SHOW, *WATCHED])
