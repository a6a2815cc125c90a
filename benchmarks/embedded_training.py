"""Take four measurements behind the training of the embedded model.

    python benchmarks/embedded_training.py

- Initialization of the autoencoder: PSNR on test scenes after a short training from orthogonal skip paths and
  from PyTorch's default.
- Attention on a CPU: time of a training step of the base's UNet with PyTorch's fused attention, relative to
  separate products and softmax in the same round.
- Mixed precision: time of such a step with bfloat16 autocast, relative to float32.
- Optimizer: the base's loss on test scenes after a short training with Muon and with AdamW.

Writes results/embedded_training.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from machine import benchmark_parser, median_and_spread, report
from torch import Tensor

from nexus_adapters import load_base
from nexus_adapters.bases.families import base_of
from nexus_adapters.embedded.held_out import TestScene, load_test_scenes
from nexus_adapters.evaluation.generation import encode, reconstruct
from nexus_adapters.metrics.structure import psnr_db
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.loop import step_generator
from nexus_adapters.training.loss import denoising_losses
from nexus_adapters.training.precision import autocast

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import train_autoencoder
import train_base
from embedded_data import run_training

STARTS = {"orthogonal": train_autoencoder.preserve_signal, "default": lambda _: None}
LEARNING_RATES = {"muon": 2e-3, "adamw": 8e-4}
TIMESTEPS = (300, 500, 700, 850)

FULL = {
    "autoencoder_steps": 200,
    "autoencoder_batch_size": 16,
    "base_steps": 100,
    "base_batch_size": 32,
    "base_train_scenes": 1000,
    "timing_rounds": 7,
    "test_scenes": 48,
}
QUICK = dict.fromkeys(FULL, 2)

# Attention implementation and precision.
STEPS: dict[str, tuple[Callable[[], Any], Callable[[], torch.autocast]]] = {
    "plain": (AttnProcessor, lambda: autocast("cpu")),
    "fused": (AttnProcessor2_0, lambda: autocast("cpu")),
    "float32": (AttnProcessor, lambda: torch.autocast("cpu", enabled=False)),
    "bfloat16": (AttnProcessor, lambda: torch.autocast("cpu", torch.bfloat16)),
}
RATIOS = (("fused", "plain"), ("bfloat16", "float32"))


def psnr_after_training(start: str, steps: int, batch_size: int, scenes: list[TestScene]) -> float:
    """Return the mean PSNR in dB on `scenes` after training on crops at the highest learning rate."""
    torch.manual_seed(0)
    vae = train_autoencoder.build_autoencoder(STARTS[start])
    options = TrainingOptions(
        max_train_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        learning_rate=2e-3,
        warmup_steps=50,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
    )
    loss_of_step = train_autoencoder.build_loss(vae, 10 * steps, batch_size, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        run_training(vae, loss_of_step, options, Path(folder), f"{start} start", {})
    images = reconstruct(vae.eval(), scenes)
    pairs = zip(images, scenes, strict=True)
    return round(float(np.mean([psnr_db(image, scene.rendering.image) for image, scene in pairs])), 2)


def step_times(rounds: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of the base UNet's forward and backward for each of `STEPS`, and the `RATIOS`."""
    torch.manual_seed(0)
    unet = train_base.build_unet()
    latents = torch.randn(batch_size, train_base.LATENT_CHANNELS, 16, 16)
    text = torch.randn(batch_size, 77, train_base.TEXT_WIDTH)
    spent: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds + 1):
        for name, (processor, precision) in STEPS.items():
            unet.set_attn_processor(processor())
            started = time.perf_counter()
            with precision():
                loss = unet(latents, 500, text).sample.float().square().mean()
            loss.backward()
            spent[name].append(1000 * (time.perf_counter() - started))
    timed = {name: values[1:] for name, values in spent.items()}  # the first round also allocates
    measured = {f"{name}_ms": median_and_spread(values, digits=1) for name, values in timed.items()}
    for name, reference in RATIOS:
        ratios = [a / b for a, b in zip(timed[name], timed[reference], strict=True)]
        measured[f"{name}_to_{reference}"] = median_and_spread(ratios)
    return measured


@torch.no_grad()
def as_inputs(pipe: StableDiffusionPipeline, scenes: list[TestScene]) -> tuple[Tensor, Tensor]:
    """Return scaled latents and prompt embeddings."""
    latents, text = [], []
    for first in range(0, len(scenes), 50):
        part = scenes[first : first + 50]
        latents.append(encode(pipe.vae, part) * pipe.vae.config.scaling_factor)
        text.append(pipe.encode_prompt([scene.prompt for scene in part], "cpu", 1, False)[0])
    return torch.cat(latents), torch.cat(text)


def loss_by_optimizer(
    steps: int, batch_size: int, train_scenes: int, test_scenes: list[TestScene]
) -> dict[str, dict[str, float]]:
    """Return optimizer -> timestep -> loss on test scenes after training with a rate that falls to zero."""
    pipe = load_base()
    base, _ = base_of(pipe)
    latents, text = as_inputs(pipe, load_test_scenes(train_scenes, "train"))
    found = {}
    for name, rate in LEARNING_RATES.items():
        torch.manual_seed(0)
        unet = train_base.build_unet()

        def loss_of_step(step: int, unet: torch.nn.Module = unet) -> Tensor:
            generator = step_generator(0, step)
            rows = torch.randint(len(latents), (batch_size,), generator=generator)
            noise = torch.randn(latents[rows].shape, generator=generator)
            timesteps = train_base.draw_mixed_timesteps(batch_size, 1000, generator)
            with autocast("cpu"):
                return denoising_losses(base, unet, latents[rows], noise, timesteps, text[rows]).mean()

        options = TrainingOptions(
            max_train_steps=steps,
            batch_size=batch_size,
            gradient_accumulation_steps=1,
            learning_rate=rate,
            optimizer=name,
            schedule="cosine",
            warmup_steps=20,
        )
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run_training(unet, loss_of_step, options, Path(folder), name, {})
            spent_s = time.perf_counter() - started
        found[name] = loss_by_timestep(pipe, unet, test_scenes) | {"step_s": round(spent_s / steps, 3)}
    return found


@torch.no_grad()
def loss_by_timestep(
    pipe: StableDiffusionPipeline, unet: torch.nn.Module, scenes: list[TestScene]
) -> dict[str, float]:
    """Return timestep -> mean loss over `scenes`, with the same noise at each timestep."""
    base, _ = base_of(pipe)
    latents, text = as_inputs(pipe, scenes)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    losses = {}
    for timestep in TIMESTEPS:
        steps = torch.full((len(scenes),), timestep)
        loss = denoising_losses(base, unet, latents, noise, steps, text).mean()
        losses[str(timestep)] = round(loss.item(), 4)
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    args = parser.parse_args(arguments)
    settings = (QUICK if args.quick else FULL) | {"learning_rates": LEARNING_RATES, "seed": 0}
    scenes = load_test_scenes(settings["test_scenes"])
    measured = {
        "psnr_db_by_start": {
            start: psnr_after_training(
                start, settings["autoencoder_steps"], settings["autoencoder_batch_size"], scenes
            )
            for start in STARTS
        },
        "unet_training_step": step_times(settings["timing_rounds"], settings["base_batch_size"]),
        "base_loss_by_optimizer": loss_by_optimizer(
            settings["base_steps"], settings["base_batch_size"], settings["base_train_scenes"], scenes
        ),
    }
    report("embedded_training", args, settings, measured)


if __name__ == "__main__":
    main()
