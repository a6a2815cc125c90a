"""Compare a training step of this trainer with that of a plain recipe, which encodes samples in every step.

    python benchmarks/training_cost.py

Both train a Prime on a frozen UNet with AdamW, with the same batch, precision and threads. The plain recipe
runs VAE and text encoder in every step, in PyTorch's default memory format, like diffusers' example trainers.
This trainer's step reads encoded samples as from its cache, with VAE and text encoder released, in
channels-last. Times are ratios in the same round of one process. Memory is the peak of a fresh process for
each; for this trainer it includes encoding. At SD 1.5's size (512x512, batch 1, random weights) and with the
embedded base (batch 32). Writes results/training_cost.json. The target at SD 1.5's size is 1.5 times the
samples per second with less memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from machine import benchmark_parser, median_and_spread, report
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from nexus_adapters import NexusAdapter, load_base
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.data.batch import Batch, Entry, as_batch, draw_for_sample
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import find_method
from nexus_adapters.training.config import LossOptions, TrainingOptions
from nexus_adapters.training.loss import Objective
from nexus_adapters.training.optimizer import build_optimizer
from nexus_adapters.training.precision import choose_precision

SIDES = ("plain", "ours")
METHOD = "prime-paper"
TOKENS = 77
VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def sd15_encoders(tiny: bool) -> tuple[Any, Any]:
    """Return VAE and text encoder with SD 1.5's shapes and random weights, or a miniature of them."""
    torch.manual_seed(0)
    width = 32 if tiny else 768
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1 if tiny else 12,
        num_attention_heads=width // 16,
    )
    channels = (32,) * 4 if tiny else (128, 256, 512, 512)
    return AutoencoderKL(block_out_channels=channels, **VAE_BLOCKS), CLIPTextModel(config)


def sd15_unet(tiny: bool) -> Any:
    """Return a UNet with SD 1.5's shapes and random weights, or a miniature of it."""
    torch.manual_seed(1)
    width, channels = (32, (32, 32, 64, 64)) if tiny else (768, (320, 640, 1280, 1280))
    return UNet2DConditionModel(cross_attention_dim=width, block_out_channels=channels, attention_head_dim=8)


def embedded_encoders(tiny: bool) -> tuple[Any, Any]:
    """Return the VAE and text encoder that ship with the package."""
    base: Any = load_base()
    return base.vae, base.text_encoder


def embedded_unet(tiny: bool) -> Any:
    """Return the UNet that ships with the package, in PyTorch's default layout."""
    unet: Any = load_base().unet
    return unet.to(memory_format=torch.contiguous_format)


# Encoders, UNet, side in pixels, batch size.
CASES: dict[str, tuple[Callable[[bool], tuple[Any, Any]], Callable[[bool], Any], int, int]] = {
    "sd15": (sd15_encoders, sd15_unet, 512, 1),
    "embedded": (embedded_encoders, embedded_unet, 128, 32),
}


class Encoding:
    """Random images and prompts that are encoded in every step, or once and then read as from a cache."""

    def __init__(self, case: str, side: str, quick: bool) -> None:
        build, _, pixels, count = CASES[case]
        self.pixels = 64 if quick and case == "sd15" else pixels
        self.count = min(count, 2) if quick else count
        self.vae, self.text_encoder = build(quick)
        for part in (self.vae, self.text_encoder):
            nn.Module.to(part, torch.float32).requires_grad_(False).eval()
        self.images = torch.rand(self.count, 3, self.pixels, self.pixels) * 2 - 1
        self.tokens = torch.randint(1, self.text_encoder.config.vocab_size - 1, (self.count, TOKENS))
        self.conditions = torch.randint(2, self.images.shape, dtype=torch.uint8) * 255
        self.steps = 0
        self.cached = self.encode_once() if side == "ours" else []
        if self.cached:
            self.vae = self.text_encoder = None

    @torch.no_grad()
    def encode_once(self) -> list[dict[str, Tensor]]:
        """Return the content of the cache for each sample."""
        latents = self.vae.encode(self.images).latent_dist
        text = self.text_encoder(self.tokens)[0]
        scale = self.vae.config.scaling_factor
        return [
            Entry(
                latents.mean[row] * scale,
                latents.std[row] * scale,
                self.conditions[row],
                {"prompt_embeds": text[row : row + 1]},
                torch.zeros(6),
            ).as_tensors()
            for row in range(self.count)
        ]

    def batch(self) -> Batch:
        """Return the input of a step."""
        self.steps += 1
        if self.cached:
            entries = [Entry.from_tensors(tensors) for tensors in self.cached]
            draws = [
                draw_for_sample(0, self.steps, row, entry.mean.shape) for row, entry in enumerate(entries)
            ]
            return as_batch(range(self.count), entries, draws, {}, 0.0, 0.0)
        with torch.no_grad():
            latents = self.vae.encode(self.images).latent_dist.sample() * self.vae.config.scaling_factor
            text = self.text_encoder(self.tokens)[0]
        return Batch(
            indices=torch.arange(self.count),
            latents=latents,
            noise=torch.randn_like(latents),
            u=torch.rand(self.count, dtype=torch.float64),
            condition=self.conditions.float() / 255,
            has_condition=torch.ones(self.count, dtype=torch.bool),
            prompt_embeds=text,
        )


def build_step(case: str, side: str, quick: bool) -> Callable[[], None]:
    """Return an optimizer step of one side."""
    encoding = Encoding(case, side, quick)
    unet = nn.Module.to(CASES[case][1](quick), torch.float32).requires_grad_(False).eval()
    adapter: Any = NexusAdapter.for_unet(unet, METHOD).train()
    if side == "ours":
        for module in (unet, adapter):
            nn.Module.to(module, memory_format=torch.channels_last)
    optimizer = build_optimizer(TrainingOptions(), adapter)
    precision = choose_precision("no", torch.device("cpu"))
    base = UNetBase(unet.config, scheduler=DDPMScheduler())
    places = FeaturePlaces(unet, base.places())
    objective = Objective(base, unet, places, find_method(METHOD), adapter, precision, LossOptions())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective.of(encoding.batch()).backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()

    return step


def times(case: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Return seconds per step of each side, and the ratio of samples per second in the same round."""
    steps = {side: build_step(case, side, quick) for side in SIDES}
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):
        for side, step in steps.items():
            started = time.perf_counter()
            step()
            spent[side].append(time.perf_counter() - started)
    timed = {side: values[1:] for side, values in spent.items()}  # the first round also allocates
    ratios = [plain / ours for plain, ours in zip(timed["plain"], timed["ours"], strict=True)]
    seconds = {f"{side}_s": median_and_spread(values) for side, values in timed.items()}
    return {**seconds, "samples_per_s_to_plain": median_and_spread(ratios)}


def peak_memory_mib(case: str, side: str, quick: bool) -> int:
    """Return the peak memory of a fresh process that takes two steps."""
    command = [sys.executable, __file__, "--memory-of", case, side, *(["--quick"] if quick else [])]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    peak: int = json.loads(found.stdout.splitlines()[-1])
    return peak


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "SIDE"), help="used for fresh processes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    if args.memory_of:
        step = build_step(*args.memory_of, args.quick)
        for _ in range(2):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    rounds = 2 if args.quick else args.rounds
    measured = {}
    for case in CASES:
        memory = {f"{side}_peak_mib": peak_memory_mib(case, side, args.quick) for side in SIDES}
        measured[case] = {**times(case, rounds, args.quick), **memory}
    settings = {
        "rounds": rounds,
        "precision": "float32",
        "adapter": "prime",
        "optimizer": "adamw",
        "sd15": {"pixels": 512, "batch_size": 1},
        "embedded": {"pixels": 128, "batch_size": 32},
        "seed": 0,
    }
    report("training_cost", args, settings, measured)


if __name__ == "__main__":
    main()
