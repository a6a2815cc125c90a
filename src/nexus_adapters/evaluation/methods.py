"""Pictures by every method, each in the pipeline that users would take for it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_adapter import StableDiffusionAdapterPipeline
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_xl_adapter import (
    StableDiffusionXLAdapterPipeline,
)
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.data.encoders import Encoders
from nexus_adapters.embedded import EMBEDDED_GUIDANCE
from nexus_adapters.evaluation.scenes import TestScene, initial_latents, row_generator
from nexus_adapters.injection import Control, attach
from nexus_adapters.training.controlnet_xs import controlled_by_xs

Images = list[UInt8[np.ndarray, "h w 3"]]


@runtime_checkable
class Prompted(Protocol):
    """What a picture is drawn from."""

    @property
    def prompt(self) -> str: ...

    @property
    def condition(self) -> Image.Image: ...


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. `guidance_scale` of 1 is no guidance."""

    steps: int = 20
    guidance_scale: float = EMBEDDED_GUIDANCE
    seed: int = 0
    batch_size: int = 50


def generate(
    base: StableDiffusionPipeline,
    adapter: NexusAdapter | T2IAdapter | ControlNetModel | ControlNetXSAdapter | None,
    scenes: Sequence[Prompted],
    sampling: Sampling,
    policy: str = "positive",
    adapter_prompts: Sequence[str] | None = None,
    show_progress: bool = True,
    level_scales: Sequence[float] | str | None = None,
) -> Images:
    """One image a scene, from the scene's prompt and condition; each method starts from the same noise.

    `adapter_prompts`: what a Nexus adapter reads instead of the prompts that the base reads. `level_scales`
    as in `Control`, of a Nexus adapter.
    """
    images: Images = []
    for first in tqdm(range(0, len(scenes), sampling.batch_size), unit="batch", disable=not show_progress):
        part = slice(first, first + sampling.batch_size)
        swapped = None if adapter_prompts is None else adapter_prompts[part]
        images += draw_batch(
            base, adapter, scenes[part], first, sampling, policy, swapped, level_scales=level_scales
        )
    return images


def draw_batch(
    base: StableDiffusionPipeline | Any,
    adapter: NexusAdapter | T2IAdapter | ControlNetModel | ControlNetXSAdapter | None,
    cases: Sequence[Prompted],
    first: int,
    sampling: Sampling,
    policy: str = "positive",
    adapter_prompts: Sequence[str] | None = None,
    scale: float = 1.0,
    level_scales: Sequence[float] | str | None = None,
    noise_exponent: float | None = None,
) -> Images:
    """The images of cases whose conditions are of one size, drawn together.

    `first`: the place of the first one among all cases, which decides their noise. `scale`: of the control.
    `noise_exponent`: as in `Control`, of a Nexus adapter or a T2I-Adapter. Others as in `generate`.
    """
    pipe: Any = base  # diffusers has no types for much of its pipelines
    conditions = [case.condition for case in cases]
    shape = _latent_shape(pipe, conditions[0])
    arguments: dict[str, Any] = {
        "prompt": [case.prompt for case in cases],
        "latents": initial_latents(len(cases), shape, sampling.seed, first).to(pipe.device, pipe.unet.dtype),
        "height": conditions[0].height,
        "width": conditions[0].width,
        # What a sampler draws on the way, as ancestral ones do, follows from the same.
        "generator": [row_generator(sampling.seed, first + row) for row in range(len(cases))],
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "output_type": "np",
    }
    reading = nullcontext() if adapter_prompts is None else _reading(adapter, pipe, adapter_prompts)
    with reading:
        output = _run(pipe, adapter, conditions, arguments, policy, scale, level_scales, noise_exponent)
    return list(np.rint(output * 255).astype(np.uint8))


def _run(
    pipe: Any,
    adapter: NexusAdapter | T2IAdapter | ControlNetModel | ControlNetXSAdapter | None,
    conditions: list[Image.Image],
    arguments: dict[str, Any],
    policy: str,
    scale: float,
    level_scales: Sequence[float] | str | None,
    noise_exponent: float | None,
) -> Float[np.ndarray, "b h w 3"]:
    kind: Any
    is_xl = hasattr(pipe, "text_encoder_2")
    is_ours = isinstance(adapter, NexusAdapter)
    if isinstance(adapter, T2IAdapter):  # fading and this policy its own pipelines do not know
        own = adapter.config.get("noise_exponent", 0.0) if noise_exponent is None else noise_exponent
        is_ours = bool(own) or policy == "cond_only"
        if policy == "per_branch":  # it reads no branch's text
            policy = "positive"
    if isinstance(adapter, T2IAdapter) and not is_ours:  # in the pipeline that it is made for
        if adapter.config["in_channels"] == 1:
            conditions = [condition.convert("L") for condition in conditions]
        kind = StableDiffusionXLAdapterPipeline if is_xl else StableDiffusionAdapterPipeline
        pipe = _pipeline(kind, pipe, adapter=adapter)
        arguments |= {"image": conditions, "adapter_conditioning_scale": scale}
    elif isinstance(adapter, ControlNetModel):
        kind = StableDiffusionXLControlNetPipeline if is_xl else StableDiffusionControlNetPipeline
        pipe = _pipeline(kind, pipe, controlnet=adapter)
        arguments |= {"image": conditions, "controlnet_conditioning_scale": scale}
    pipe.set_progress_bar_config(disable=True)
    controlled: Any = nullcontext()
    if isinstance(adapter, ControlNetXSAdapter):
        controlled = controlled_by_xs(pipe, adapter, conditions, scale)
    if is_ours:
        control = Control(
            adapter,
            conditions,
            scale=scale,
            policy=policy,
            level_scales=level_scales if isinstance(adapter, NexusAdapter) else None,
            noise_exponent=noise_exponent,
        )
        controlled = attach(pipe, control)
    with controlled:
        return np.asarray(pipe(**arguments).images)


def _pipeline(kind: Any, base: Any, **added: object) -> Any:
    """A pipeline of another kind with the base's parts, as far as it takes them."""
    taken = inspect.signature(kind).parameters
    parts = {name: part for name, part in base.components.items() if name in taken}
    if "requires_safety_checker" in taken:
        added["requires_safety_checker"] = False
    if "force_zeros_for_empty_prompt" in taken:
        added["force_zeros_for_empty_prompt"] = base.config.force_zeros_for_empty_prompt
    return kind(**parts, **added)


def _latent_shape(pipe: Any, condition: Image.Image) -> tuple[int, int, int]:
    factor = pipe.vae_scale_factor
    return pipe.unet.config.in_channels, condition.height // factor, condition.width // factor


def _reading(adapter: object, pipe: Any, prompts: Sequence[str]) -> Any:
    """While open, a Nexus adapter reads `prompts`, whatever text it is handed."""
    if not isinstance(adapter, NexusAdapter):
        raise ValueError(f"adapter_prompts: expected None without a NexusAdapter; received {len(prompts)}")
    encoders = Encoders(pipe)
    if any(prompts):
        text = encoders.encode_prompts(prompts)["prompt_embeds"]
    else:  # as guidance reads none
        text = encoders.encode_empty_prompt()["prompt_embeds"].expand(len(prompts), -1, -1)

    def swap(_: torch.nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], text.to(args[1])

    return adapter.register_forward_pre_hook(swap)


def reconstruct(vae: Any, scenes: Sequence[TestScene], batch_size: int = 50) -> Images:
    """An `AutoencoderKL`'s reconstructions: what no method can exceed in structure."""
    images: Images = []
    for first in range(0, len(scenes), batch_size):
        images += decode(vae, encode(vae, scenes[first : first + batch_size]))
    return images


@torch.no_grad()
def encode(vae: Any, scenes: Sequence[TestScene]) -> Float[Tensor, "b c y x"]:
    """The scenes' most likely latents, as the autoencoder gives them: not scaled."""
    originals = np.stack([scene.rendering.image for scene in scenes])
    pixels = torch.from_numpy(originals).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents: Tensor = vae.encode(pixels).latent_dist.mode()
    return latents


@torch.no_grad()
def decode(vae: Any, latents: Float[Tensor, "b c y x"]) -> Images:
    """The images of latents that are not scaled."""
    output = vae.decode(latents).sample
    return list(((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
