"""Measure what five choices in the embedded model's training rest on.

    python benchmarks/embedded_design.py

- the autoencoder's start: PSNR on test scenes after a short training from orthogonal skip paths and from
  PyTorch's default;
- attention on a CPU: time of a training step of the base's UNet with PyTorch's fused attention, as a ratio to
  products and a softmax in the same round;
- the latents' redundancy: edge F1 of decoded test scenes whose latents carry noise;
- at which timesteps the words count: the base's loss on test scenes with their own prompts and with others';
- what the text encoder says: the share of objects whose color a linear probe reads at their shape's token.

Writes results/embedded_design.json.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from machine import benchmark_parser, median_and_spread, report
from torch import nn

from nexus_adapters.embedded import load_embedded_base
from nexus_adapters.evaluation.methods import decode, encode, reconstruct
from nexus_adapters.evaluation.scenes import TestScene, load_test_scenes, score_images
from nexus_adapters.metrics.psnr import psnr_db
from nexus_adapters.scenes.caption import caption
from nexus_adapters.scenes.scene import draw_scene
from nexus_adapters.scenes.vocabulary import COLORS
from nexus_adapters.training.loss import denoising_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import train_autoencoder
import train_base

NOISE_SHARES = (0.0, 0.1, 0.2, 0.3)  # of the latents' standard deviation
TIMESTEPS = (200, 400, 600, 800, 900, 980, 999)
STARTS = {"orthogonal": train_autoencoder.preserve_signal, "default": lambda _: None}
ATTENTION = {"plain": AttnProcessor, "fused": AttnProcessor2_0}


def psnr_after_training(start: str, steps: int, batch_size: int, scenes: list[TestScene]) -> float:
    """Mean PSNR in dB on `scenes` after so many steps on crops at the script's highest learning rate."""
    torch.manual_seed(0)
    vae = train_autoencoder.build_autoencoder(STARTS[start])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    loss_of_step = train_autoencoder.build_loss(vae, 10 * steps, batch_size, seed=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50)
        optimizer.zero_grad()
        loss_of_step(step).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    images = reconstruct(vae.eval(), scenes)
    pairs = zip(images, scenes, strict=True)
    return round(float(np.mean([psnr_db(image, scene.rendering.image) for image, scene in pairs])), 2)


def step_time_ratios(rounds: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and backward of the base's UNet, and the ratio to plain attention's."""
    torch.manual_seed(0)
    unet = train_base.build_unet().to(memory_format=torch.channels_last)
    latents = torch.randn(batch_size, train_base.LATENT_CHANNELS, 16, 16)
    text = torch.randn(batch_size, 77, train_base.TEXT_WIDTH)
    spent: dict[str, list[float]] = {name: [] for name in ATTENTION}
    for _ in range(rounds + 1):
        for name, processor in ATTENTION.items():
            unet.set_attn_processor(processor())
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = unet(latents, 500, text).sample.float().square().mean()
            loss.backward()
            spent[name].append(1000 * (time.perf_counter() - started))
    timed = {name: values[1:] for name, values in spent.items()}  # the first round also allocates
    ratios = [a / b for a, b in zip(timed["fused"], timed["plain"], strict=True)]
    return {f"{name}_ms": median_and_spread(values, digits=1) for name, values in timed.items()} | {
        "fused_to_plain": median_and_spread(ratios)
    }


def edge_f1_under_noise(scenes: list[TestScene]) -> dict[str, float]:
    """Noise as a share of the latents' standard deviation -> mean edge F1 of the decoded scenes."""
    vae = load_embedded_base().vae
    latents = encode(vae, scenes)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * latents.std()
    found = {}
    for share in NOISE_SHARES:
        edges = score_images(decode(vae, latents + share * noise), scenes)["edge_f1"]
        found[str(share)] = round(float(edges.mean()), 4)
    return found


@torch.no_grad()
def loss_by_timestep(scenes: list[TestScene]) -> dict[str, dict[str, float]]:
    """Timestep -> mean loss with each scene's own prompt, and with the next scene's."""
    base = load_embedded_base()
    latents = encode(base.vae, scenes) * base.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    own, _ = base.encode_prompt([scene.prompt for scene in scenes], "cpu", 1, False)
    found = {}
    for timestep in TIMESTEPS:
        steps = torch.full((len(scenes),), timestep)
        found[str(timestep)] = {
            name: round(denoising_loss(base.unet, base.scheduler, latents, noise, steps, text).item(), 4)
            for name, text in {"own": own, "other": own.roll(1, 0)}.items()
        }
    return found


def color_at_shape_token(scenes: int) -> float:
    """Accuracy on unseen captions of a linear probe from a shape's token to its object's color."""
    pipe = load_embedded_base()
    tokens, colors = [], []
    for seed in range(scenes):
        scene = draw_scene(seed)
        prompt = caption(scene)
        ids = pipe.tokenizer(prompt).input_ids
        with torch.no_grad():
            text, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        for item in scene.objects:
            word = pipe.tokenizer.convert_tokens_to_ids(f"{item.shape}</w>")
            tokens.append(text[0, ids.index(word)])
            colors.append(list(COLORS).index(item.color))
    inputs, labels = torch.stack(tokens), torch.tensor(colors)
    seen = len(labels) * 4 // 5
    inputs = (inputs - inputs[:seen].mean(0)) / inputs[:seen].std(0)
    probe = nn.Linear(inputs.shape[1], len(COLORS))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(probe(inputs[:seen]), labels[:seen]).backward()
        optimizer.step()
    return round((probe(inputs[seen:]).argmax(1) == labels[seen:]).float().mean().item(), 4)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of the autoencoder's two trainings")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--scenes", type=int, default=48)
    args = parser.parse_args(arguments)
    steps, rounds, count = (2, 1, 2) if args.quick else (args.steps, args.rounds, args.scenes)
    probed = 20 if args.quick else 3000
    batch_size = 2 if args.quick else 16
    scenes = load_test_scenes(count)
    measured = {
        "psnr_db_by_start": {
            start: psnr_after_training(start, steps, batch_size, scenes) for start in STARTS
        },
        "unet_training_step": step_time_ratios(rounds, 2 * batch_size),
        "edge_f1_by_latent_noise": edge_f1_under_noise(scenes),
        "base_loss_by_timestep_and_prompt": loss_by_timestep(scenes),
        "probe_accuracy_color_at_shape_token": color_at_shape_token(probed),
    }
    settings = {
        "autoencoder_steps": steps,
        "autoencoder_batch_size": batch_size,
        "autoencoder_learning_rate": 2e-3,
        "timing_rounds": rounds,
        "unet_batch_size": 2 * batch_size,
        "test_scenes": count,
        "probed_scenes": probed,
        "seed": 0,
    }
    report("embedded_design", args, settings, measured)


if __name__ == "__main__":
    main()
