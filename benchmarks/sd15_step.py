"""Measure the time of a training step and of an image at Stable Diffusion 1.5's size on a GPU.

    python benchmarks/sd15_step.py

All methods run the trainer's step in turns in one process (512x512, batch 8, bfloat16 if supported, AdamW,
latents and embeddings as from the cache, random weights). Then the base alone predicts with guidance, and the
VAE decodes. Writes results/sd15_step.json, from which sd15_cost.py computes the hours per cell. On a CPU,
training_cost.py times Prime with batch 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from machine import benchmark_parser, median_and_spread, report
from torch import nn
from tqdm import tqdm
from training_cost import TOKENS, sd15_encoders, sd15_unet

from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import find_method
from nexus_adapters.training.config import LossOptions, TrainingOptions
from nexus_adapters.training.loss import Objective
from nexus_adapters.training.optimizer import build_optimizer
from nexus_adapters.training.precision import Precision, choose_precision

# Label in the results -> name of the method.
METHODS = {
    "t2i": "t2i",
    "slim": "slim-paper",
    "prime": "prime-paper",
    "controlnet-xs": "controlnet-xs",
    "controlnet": "controlnet",
}
SIDE, BATCH_SIZE = 512, 8


def batch_of(count: int, side: int, width: int, device: torch.device) -> Batch:
    """Return random samples as if from a cache."""
    latents = torch.randn(count, 4, side // 8, side // 8)
    return Batch(
        indices=torch.arange(count),
        latents=latents,
        noise=torch.randn_like(latents),
        u=torch.rand(count, dtype=torch.float64),
        condition=torch.rand(count, 3, side, side),
        has_condition=torch.ones(count, dtype=torch.bool),
        prompt_embeds=torch.randn(count, TOKENS, width),
    ).to(device)


def training_step(
    name: str, base: UNetBase, unet: Any, batch: Batch, precision: Precision, **options: float
) -> Callable[[], None]:
    """Return an optimizer step of the method with this name; `options` are the method's options."""
    method = find_method(name)
    with batch.latents.device:
        adapter: Any = method.build(base, unet, method.Options(name, **options))
    nn.Module.to(adapter, batch.latents.device, memory_format=torch.channels_last).train()
    network = method.network(adapter, unet)
    called = network if method.is_fused else unet
    places = FeaturePlaces(unet, base.places())
    objective = Objective(base, called, places, method, network, precision, LossOptions())
    optimizer = build_optimizer(TrainingOptions(), adapter)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective.of(batch).backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()

    return step


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device has finished."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision("auto", device)
    count, side = (1, 128) if args.quick else (BATCH_SIZE, SIDE)
    rounds = 1 if args.quick else args.rounds
    with torch.device(device):  # random weights are generated there, which is far faster
        unet: Any = sd15_unet(args.quick)
        vae, _ = sd15_encoders(args.quick)
    for part in (unet, vae):
        nn.Module.to(part, device, precision.dtype, memory_format=torch.channels_last)
        part.requires_grad_(False).eval()
    batch = batch_of(count, side, unet.config.cross_attention_dim, device)
    # The miniature has too few channels for ControlNet-XS's own ratio.
    options = {"controlnet-xs": {"size_ratio": 0.5}} if args.quick else {}
    base = UNetBase(unet.config, vae.config, DDPMScheduler())
    steps = {
        label: training_step(name, base, unet, batch, precision, **options.get(name, {}))
        for label, name in METHODS.items()
    }

    latents, text = batch.latents.to(precision.dtype), batch.prompt_embeds.to(precision.dtype)
    both = {"encoder_hidden_states": torch.cat([text, text])}
    moment = torch.zeros(2 * count, device=device)

    @torch.no_grad()
    def predict() -> None:
        unet(torch.cat([latents, latents]), moment, **both)

    @torch.no_grad()
    def decode() -> None:
        vae.decode(latents)

    calls: dict[str, Callable[[], None]] = {**steps, "predict": predict, "decode": decode}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds + 2), unit="round"):
        for name, call in calls.items():
            spent[name].append(seconds_of(call, device))
    # The first rounds also allocate memory and choose kernels.
    found = {name: median_and_spread(values[2:]) for name, values in spent.items()}
    settings = {
        "pixels": side,
        "batch_size": count,
        "rounds": rounds,
        "precision": str(precision.dtype).removeprefix("torch."),
        "optimizer": "adamw",
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    measured = {
        "step_s": {name: found[name] for name in METHODS},
        "predict_s": found["predict"],
        "decode_s": found["decode"],
    }
    report("sd15_step", args, settings, measured)


if __name__ == "__main__":
    main()
