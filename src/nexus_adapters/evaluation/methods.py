"""Images of test scenes by every method, each in the pipeline that users would take for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_adapter import StableDiffusionAdapterPipeline
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.embedded import EMBEDDED_GUIDANCE
from nexus_adapters.evaluation.scenes import TestScene, initial_latents
from nexus_adapters.injection import Control, attach

Images = list[UInt8[np.ndarray, "h w 3"]]


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. `guidance_scale` of 1 is no guidance."""

    steps: int = 20
    guidance_scale: float = EMBEDDED_GUIDANCE
    seed: int = 0
    batch_size: int = 50


def generate(
    base: StableDiffusionPipeline,
    adapter: NexusAdapter | T2IAdapter | ControlNetModel | None,
    scenes: Sequence[TestScene],
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
    shape = (base.unet.config.in_channels, base.unet.config.sample_size, base.unet.config.sample_size)
    latents = initial_latents(len(scenes), shape, sampling.seed)
    images: Images = []
    for first in tqdm(range(0, len(scenes), sampling.batch_size), unit="batch", disable=not show_progress):
        part = slice(first, first + sampling.batch_size)
        chosen = scenes[part]
        arguments: dict[str, Any] = {
            "prompt": [scene.prompt for scene in chosen],
            "latents": latents[part],
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "output_type": "np",
        }
        swapped = None if adapter_prompts is None else adapter_prompts[part]
        output = _run(base, adapter, chosen, arguments, policy, swapped, level_scales)
        images += list(np.rint(output * 255).astype(np.uint8))
    return images


def _run(
    base: StableDiffusionPipeline,
    adapter: NexusAdapter | T2IAdapter | ControlNetModel | None,
    scenes: Sequence[TestScene],
    arguments: dict[str, Any],
    policy: str,
    adapter_prompts: Sequence[str] | None,
    level_scales: Sequence[float] | str | None,
) -> Float[np.ndarray, "b h w 3"]:
    pipe: Any = base  # diffusers has no types for much of its pipelines
    reading = nullcontext() if adapter_prompts is None else _reading(adapter, pipe, adapter_prompts)
    conditions = [scene.condition for scene in scenes]
    with reading:
        if isinstance(adapter, T2IAdapter):
            parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
            pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
            arguments = arguments | {"image": conditions}
        if isinstance(adapter, ControlNetModel):
            pipe = StableDiffusionControlNetPipeline(
                **pipe.components, controlnet=adapter, requires_safety_checker=False
            )
            arguments = arguments | {"image": conditions}
        pipe.set_progress_bar_config(disable=True)
        if adapter is None or isinstance(adapter, T2IAdapter | ControlNetModel):
            return np.asarray(pipe(**arguments).images)
        with attach(pipe, Control(adapter, conditions, policy=policy, level_scales=level_scales)):
            return np.asarray(pipe(**arguments).images)


def _reading(adapter: object, pipe: Any, prompts: Sequence[str]) -> Any:
    """While open, a Nexus adapter reads `prompts`, whatever text it is handed."""
    if not isinstance(adapter, NexusAdapter):
        raise ValueError(f"adapter_prompts: expected None without a NexusAdapter; received {len(prompts)}")
    text, _ = pipe.encode_prompt(list(prompts), "cpu", 1, False)

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
