"""A block, a method, a base, a condition and a metric of a user's own, defined in this file alone.

Each is trained with for two steps, saved, loaded in a fresh process that imports this file by `--import`,
evaluated and reported. The base has what Stable Diffusion lacks: a transformer whose features are tokens,
added by hooks, flow matching, and a pipeline that guides by two calls a step.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.refusals import refused
from tests.training.runs import recipe, write_images
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from nexus_adapters import (
    Control,
    NexusAdapter,
    attach,
    load_adapter,
    load_base,
    register_base,
    register_block,
    register_condition,
    register_method,
    register_metric,
)
from nexus_adapters.adapter.stage import Stage
from nexus_adapters.bases import Base, Place, open_base
from nexus_adapters.bases.base import CallLayout
from nexus_adapters.conditions import Extractor
from nexus_adapters.methods import method_of
from nexus_adapters.methods.feature_method import FeatureMethod
from nexus_adapters.methods.method import AdapterOptions
from nexus_adapters.methods.nexus import base_geometry
from nexus_adapters.metrics import Metric
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run import train_adapter

WIDTH, PATCH = 16, 2


# A block: one class with a decorator.


@register_block("toy-gain")
class GainStage(Stage):
    """The paper's stage times a learned gain."""

    def __init__(self, *, channels: int, gain: float = 1.0, **stage: Any) -> None:
        super().__init__(channels=channels, **stage)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), gain))

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self.gain * super().forward(x, prompt_embeds)


# A method: a network, and how it is built.


class ToyAdapter(ModelMixin, ConfigMixin):
    """Features that see the mean color around them, and nothing else."""

    @register_to_config
    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], unshuffle: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(in_channels, width, 1) for width in channels)

    def forward(self, condition: Tensor) -> list[Tensor]:
        strides = self.config["strides"]
        pooled = [nn.functional.avg_pool2d(condition, stride, ceil_mode=True) for stride in strides]
        return [layer(x) for layer, x in zip(self.layers, pooled, strict=True)]


class ToyMethod(FeatureMethod):
    label = "Toy adapter"
    reads_prompt = False
    classes = (ToyAdapter,)

    def build(self, base: Base, denoiser: nn.Module, options: AdapterOptions) -> nn.Module:
        strides = tuple(base.pixels_per_latent * place.stride for place in base.places())
        return ToyAdapter(tuple(place.channels for place in base.places()), strides, strides[0])


register_method(ToyMethod("toy"))


class OwnAdapter(NexusAdapter):
    """A subclass, for a method of its own."""


class OwnMethod(ToyMethod):
    classes = (OwnAdapter,)


register_method(OwnMethod("toy-own"))


# A base: the network with its pipeline, and what adapters need to know of them.


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels: int = 4, text_width: int = tiny.TEXT_WIDTH) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, WIDTH, PATCH, stride=PATCH)
        self.text = nn.Linear(text_width, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.out = nn.Linear(WIDTH, in_channels * PATCH**2)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        x = self.embed(hidden_states)
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2) + timestep.to(x).reshape(-1, 1, 1) / 1000
        text = self.text(encoder_hidden_states).mean(dim=1, keepdim=True)
        for block in self.blocks:
            text, tokens = block(text, tokens)
        patches = self.out(tokens).transpose(1, 2).unflatten(2, (height, width))
        return (nn.functional.pixel_shuffle(patches, PATCH),)


class ToyBlock(nn.Module):
    """Returns (text, tokens), as the blocks of SD3 and Flux do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, text: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return text, tokens + torch.tanh(self.linear(tokens + text))


class ToyPipeline(DiffusionPipeline):
    """Guides by one call for the negative and one for the positive prompt."""

    def __init__(self, vae, text_encoder, tokenizer, transformer, scheduler) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 8

    def encode(self, prompts: list[str]) -> Tensor:
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=tiny.TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int = 64,
        width: int = 64,
        num_inference_steps: int = 2,
        guidance_scale: float = 2.0,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompt_embeds, negative_prompt_embeds = self.encode(prompts), self.encode([""] * len(prompts))
        if latents is None:
            latents = torch.randn(len(prompts), 4, height // 8, width // 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            negative = self.transformer(latents, t[None], negative_prompt_embeds)[0]
            positive = self.transformer(latents, t[None], prompt_embeds)[0]
            guided = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(guided, t, latents).prev_sample
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        images = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
        return ImagePipelineOutput(images=images)

    def save_pretrained(self, folder: Path) -> None:
        index: dict[str, Any] = {"_class_name": "ToyPipeline"}
        for name, part in self.components.items():
            part.save_pretrained(folder / name)
            index[name] = ["toy", type(part).__name__]
        (folder / "model_index.json").write_text(json.dumps(index))

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: Any = None, **given: Any) -> ToyPipeline:
        kinds = {
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "tokenizer": CLIPTokenizer,
            "transformer": ToyTransformer,
            "scheduler": FlowMatchEulerDiscreteScheduler,
        }
        return cls(
            **{
                name: given[name] if name in given else kind.from_pretrained(Path(folder) / name)
                for name, kind in kinds.items()
            }
        )


@register_base("toy")
class ToyBase(Base):
    denoiser_name = "transformer"
    denoiser_class = ToyTransformer
    latents_argument = "hidden_states"

    @classmethod
    def pipeline_class(cls, index: Any) -> Any:
        return ToyPipeline

    def places(self) -> tuple[Place, ...]:
        return tuple(
            Place(WIDTH, PATCH, module=f"blocks.{number}", output=1, layout="tokens") for number in range(2)
        )

    @property
    def text_width(self) -> int:
        return self.config["text_width"]

    def knows(self, pipe: Any) -> bool:
        return isinstance(pipe, ToyPipeline)

    def layout_of(self, running: Any, text: Tensor) -> CallLayout | None:
        if not self.knows(running.pipe):
            return None
        negative, positive = (running.variables[f"{name}prompt_embeds"] for name in ("negative_", ""))
        called = 0 if text is negative else 1
        return CallLayout(torch.cat([negative, positive]), (False, True), called)

    def encode_prompts(self, prompts: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"prompt_embeds": self.pipe.encode(list(prompts)).float()}

    @cached_property
    def schedule(self) -> Any:
        return FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler.config))

    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        share = (t.float() / self.num_train_timesteps).reshape(-1, 1, 1, 1).to(latents)
        return (1 - share) * latents + share * noise, noise - latents


# A condition that compares its own maps, and a metric: a record each.


def threshold(image: Image.Image, level: float = 0.5) -> Image.Image:
    return image.convert("L").point(lambda value: 255 * (value > 255 * level)).convert("RGB")


def share_alike(found: Image.Image, wanted: Image.Image) -> float:
    return float((np.asarray(found) == np.asarray(wanted)).mean())


register_condition(
    Extractor(
        "toy-threshold",
        threshold,
        "light and dark",
        compare=lambda found, wanted: {"toy_alike": share_alike(found, wanted)},
        agreement=share_alike,
    )
)
register_metric(
    Metric(
        "toy_darkness",
        label="darkness (toy)",
        better="lower",
        function=lambda generated: 1 - float(np.asarray(generated.image).mean()) / 255,
    )
)


# The tests. A fresh process runs `main` below, by the command's own `--import`.

TRAININGS: dict[str, dict[str, Any]] = {
    "block": {"adapter": {"method": "slim", "block": "toy-gain", "block_options": {"gain": 0.5}}},
    "method": {"adapter": {"method": "toy"}},
    "toy-world": {"adapter": {"method": "prime", "heads": 2, "head_width": 4}, "base": {"path": "toy-base"}},
}


def toy_pipeline() -> ToyPipeline:
    torch.manual_seed(3)
    parts = tiny.sd15_components()
    return tiny.quiet(
        ToyPipeline(
            parts["vae"],
            parts["text_encoder"],
            parts["tokenizer"],
            ToyTransformer().eval(),
            FlowMatchEulerDiscreteScheduler(),
        )
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, images, and a finished run of two steps of each kind, with a validation image."""
    root = tmp_path_factory.mktemp("world")
    tiny.sd15().save_pretrained(root / "sd15")
    (root / "toy-base").mkdir()
    toy_pipeline().save_pretrained(root / "toy-base")
    write_images(root / "images")
    for name, own in TRAININGS.items():
        content = recipe(root, root / name, training__max_train_steps=2, validation__every_steps=2)
        content["validation"] |= {"samples": 1, "images": 1}
        content["data"]["condition"] = "toy-threshold"
        content["adapter"] = own["adapter"]
        content["base"] = {"path": str(root / own.get("base", {}).get("path", "sd15"))}
        train_adapter(parse_config(content))
    return root


@pytest.fixture(scope="module")
def evaluated(world: Path) -> Path:
    """Each run evaluated by the command in a process that knows of them only by `--import`."""
    calls = [
        [
            "evaluate",
            *("--import", __file__),
            *("--base", str(world / TRAININGS[name].get("base", {}).get("path", "sd15"))),
            *("--adapter", f"{name}={world / name}"),
            *("--data", str(world / "images"), "--kind", "folder", "--condition", "toy-threshold"),
            *("--resolution", "64", "--count", "2", "--steps", "2", "--batch-size", "2"),
            *("--out", str(world / f"{name}-evaluated")),
        ]
        for name in TRAININGS
    ]
    map_file = str(world / "map.png")
    tiny.image().save(map_file)
    calls += [
        [
            "generate",
            *("--import", __file__, "--base", str(world / "toy-base"), "--prompt", "a red star"),
            *("--adapter", str(world / "toy-world"), "--condition", "toy-threshold", "--map", map_file),
            *("--steps", "2", "--out", str(world / "toy.png")),
        ],
        ["info", "--import", __file__, str(world / "method")],
    ]
    code = (
        "import json, sys; from nexus_adapters.cli import main;"
        "sys.exit(max(main(call) for call in json.loads(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return world


@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_is_trained_and_validated(world: Path, name: str) -> None:
    rows = [json.loads(line) for line in (world / name / "log.jsonl").read_text().splitlines()]
    validated = [row for row in rows if "val_loss" in row]
    assert validated[-1]["step"] == 2
    assert 0 <= validated[-1]["structure_score"] <= 1
    trained = load_adapter(world / name)
    before = load_adapter(world / name)  # the same twice: nothing is drawn at random while loading
    for (key, one), (_, other) in zip(trained.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(one, other), key
    card = (world / name / "adapter" / "README.md").read_text()
    assert "toy-threshold" in card


@pytest.mark.parametrize("name", TRAININGS)
def test_it_is_evaluated_and_reported_in_a_fresh_process(evaluated: Path, name: str) -> None:
    folder = evaluated / f"{name}-evaluated"
    results = json.loads((folder / "results.json").read_text())["methods"]
    assert set(results) == {"reference", "base", name}
    assert {"toy_alike", "toy_darkness"} <= set(results[name]["metrics"])
    assert results["reference"]["metrics"]["toy_alike"]["value"] == 1
    assert "darkness (toy) ↓" in (folder / "report.md").read_text()
    drawn = [folder / which / "images" / "00000.png" for which in ("base", name)]
    assert drawn[0].read_bytes() != drawn[1].read_bytes()  # the adapter does something


def test_the_commands_generate_with_it_and_describe_it(evaluated: Path) -> None:
    with Image.open(evaluated / "toy.png") as image:
        assert image.size == (64, 64)
        assert "toy-base" in image.info["nexus-adapters"]


def test_a_control_that_a_base_cannot_have_is_refused(world: Path, tmp_path: Path) -> None:
    for method in ("controlnet", "controlnet-xs"):
        content = recipe(world, tmp_path / method, adapter={"method": method})
        content["base"] = {"path": str(world / "toy-base")}
        with refused("base.path", "ToyTransformer"):
            train_adapter(parse_config(content))


def test_a_method_of_ones_own_comes_before_the_packages(world: Path) -> None:
    """For a subclass of `NexusAdapter`, which the package's own method would take, too."""
    geometry = base_geometry(open_base(world / "toy-base"))
    own = OwnAdapter.for_geometry(geometry, heads=2, head_width=4)
    assert method_of(own).name == "toy-own"
    assert method_of(load_adapter(world / "toy-world")).name == "prime"


@pytest.mark.parametrize("name", TRAININGS)
def test_its_checkpoint_and_its_weights_file_load_too(world: Path, name: str) -> None:
    trained = load_adapter(world / name)
    file = world / name / "adapter" / "diffusion_pytorch_model.safetensors"
    checkpoint = world / name / "checkpoints" / "step-00000002"
    for source in (file, checkpoint, checkpoint / "module.safetensors"):
        found = load_adapter(source)
        assert type(found) is type(trained)
        assert found.state_dict().keys() == trained.state_dict().keys()
        if source != checkpoint / "module.safetensors":  # there may be an average, which the run is for
            for key, tensor in found.state_dict().items():
                assert torch.equal(tensor, trained.state_dict()[key]), key


def test_a_users_own_adapter_is_checked_tensor_by_tensor(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "method" / "adapter", tmp_path / "adapter")
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    lost = tensors.popitem()[0]
    save_file(tensors, file)
    for source in (folder, file):
        with refused("adapter", lost):
            load_adapter(source)
    (folder / "config.json").unlink()
    with refused("adapter"):
        load_adapter(folder)


def test_a_block_keeps_its_options(world: Path) -> None:
    adapter = load_adapter(world / "block")
    assert isinstance(adapter, NexusAdapter)
    assert (adapter.config["block"], adapter.config["block_options"]) == ("toy-gain", {"gain": 0.5})
    assert isinstance(adapter.adapter.body[0], GainStage)


def test_the_base_loads_by_the_one_loader_and_is_controlled(world: Path) -> None:
    pipe = tiny.quiet(load_base(world / "toy-base"))
    assert isinstance(pipe, ToyPipeline)
    adapter = load_adapter(world / "toy-world")
    condition = tiny.condition(1)

    def generate(**control: Any) -> np.ndarray:
        torch.manual_seed(0)
        if not control:
            return pipe("a red star", output_type="np").images
        with attach(pipe, Control(adapter, condition, **control)):
            return pipe("a red star", output_type="np").images

    plain, zero = generate(), generate(scale=0.0)
    assert np.array_equal(plain, zero)
    drawn = {policy: generate(policy=policy) for policy in ("positive", "per_branch", "cond_only")}
    images = [plain, *drawn.values()]
    for place, one in enumerate(images):
        assert all(not np.array_equal(one, other) for other in images[place + 1 :])
    assert np.array_equal(generate(), plain)  # nothing is left attached


def test_two_calls_a_step_get_the_positive_features_or_none(world: Path) -> None:
    """Against the features added by hand."""
    pipe = tiny.quiet(load_base(world / "toy-base"))
    adapter, condition = load_adapter(world / "toy-world"), tiny.condition(1)
    with torch.no_grad():
        features = adapter(condition, pipe.encode(["a red star"]))
    tokens = [feature.flatten(2).transpose(1, 2) for feature in features]

    def by_hand(branches: tuple[int, ...]) -> np.ndarray:
        calls = {"n": 0}

        def count(*_: Any) -> None:
            calls["n"] += 1

        def adder(number: int) -> Any:
            def add(_: Any, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                is_positive = calls["n"] % 2 == 0  # counted before the blocks: 1 negative, 2 positive, ...
                wanted = int(is_positive) in branches
                return output[0], output[1] + tokens[number] * wanted

            return add

        handles = [pipe.transformer.register_forward_pre_hook(count)]
        handles += [block.register_forward_hook(adder(n)) for n, block in enumerate(pipe.transformer.blocks)]
        torch.manual_seed(0)
        images = pipe("a red star", output_type="np").images
        for handle in handles:
            handle.remove()
        return images

    for policy, branches in {"positive": (0, 1), "cond_only": (1,)}.items():
        torch.manual_seed(0)
        with attach(pipe, Control(adapter, condition, policy=policy)):
            found = pipe("a red star", output_type="np").images
        np.testing.assert_allclose(found, by_hand(branches), atol=1e-5)


def test_the_geometry_follows_from_the_places(world: Path) -> None:
    assert base_geometry(open_base(world / "toy-base")) == {
        "channels": (WIDTH, WIDTH),
        "pools": (False, False),
        "unshuffle": 8 * PATCH,
        "text_width": tiny.TEXT_WIDTH,
    }
