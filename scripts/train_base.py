"""Train the embedded Stable Diffusion: text encoder and UNet together, on cached latents of scenes.

    python scripts/train_base.py

Needs the autoencoder of train_autoencoder.py. Continues where it was stopped. Writes a folder in the standard
diffusers layout. Two stages: timesteps drawn evenly, then mostly noisy ones. In latents this small the words
decide next to nothing below timestep 800 (benchmarks/embedded_design.py), so that only a fifth of the first
stage teaches them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from embedded_data import (
    DEFAULT_CACHE,
    DEVICE,
    SceneCache,
    draw_batch,
    load_scenes,
    scenes_hash,
    token_ids,
    train_tokenizer,
)
from initialization import preserve_signal
from nexus_adapters.training.loop import LoopOptions, Loss, step_generator, train
from nexus_adapters.training.loss import TimestepSampling, denoising_loss, draw_timesteps

LATENT_CHANNELS = 12
TEXT_WIDTH = 160


def build_unet(device: str = "cpu") -> UNet2DConditionModel:
    """SD 1.5's block types and four levels at 7.5M parameters."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 96, 96, 128),
        layers_per_block=1,
        attention_head_dim=(3, 3, 3, 4),  # the number of heads, in SD 1.5's reading of this field
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    preserve_signal(unet)
    speed_up(unet, device)
    return unet.to(device)


def speed_up(unet: UNet2DConditionModel, device: str) -> None:
    """For training on a CPU, where the backward pass of fused attention takes long."""
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # benchmarks/embedded_design.py
        unet.to(memory_format=torch.channels_last)


def build_text_encoder(tokenizer: CLIPTokenizer, device: str = "cpu") -> CLIPTextModel:
    """A CLIP text model of three layers over the captions' vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=5,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager" if device == "cpu" else "sdpa",  # as speed_up
        )
    ).to(device)


def build_scheduler() -> DDIMScheduler:
    """v-prediction on a cosine schedule: suits small latents, ends in pure noise: no leaked brightness."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing steps; the stock pipeline warns of any other value
    )


def build_loss(
    modules: nn.ModuleDict,
    scenes: SceneCache,
    empty: Tensor,
    batch_size: int,
    timesteps: TimestepSampling,
    seed: int,
    device: str,
) -> Loss:
    """step -> loss, on scenes, captions, noise, timesteps and dropout drawn from (seed, step)."""
    scheduler = build_scheduler()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        batch = draw_batch(scenes, empty, batch_size, generator, device)
        steps = draw_timesteps(timesteps, batch_size, scheduler.config.num_train_timesteps, generator)
        with torch.autocast(device, torch.bfloat16):
            prompt_embeds = modules["text_encoder"](batch.tokens)[0]
            return denoising_loss(
                modules["unet"], scheduler, batch.latents, batch.noise, steps.to(device), prompt_embeds
            )

    return loss_of_step


def load_in_float32(pipeline: Path) -> None:
    """Let a plain `from_pretrained` load every part in float32, whatever precision the files have.

    diffusers does so by itself; transformers goes by what the text encoder's config says.
    """
    path = pipeline / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--vae", type=Path, default=DEFAULT_CACHE / "autoencoder" / "vae")
    parser.add_argument("--out", type=Path, default=DEFAULT_CACHE / "base")
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=7500, help="of the first stage")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="of the first stage")
    parser.add_argument("--noisy-steps", type=int, default=2500, help="of the second stage")
    parser.add_argument("--noisy-learning-rate", type=float, default=6e-4, help="of the second stage")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE, help=f"cpu, cuda, ... (default here: {DEVICE})")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    scenes = load_scenes(args.vae, tokenizer, args.scenes, args.cache, args.device)
    unet = build_unet(args.device)
    modules = nn.ModuleDict({"unet": unet, "text_encoder": build_text_encoder(tokenizer, args.device)})
    empty = token_ids(tokenizer, [""])
    stages: tuple[tuple[TimestepSampling, int, float, Path], ...] = (
        ("uniform", args.steps, args.learning_rate, args.out),
        ("cubic", args.noisy_steps, args.noisy_learning_rate, args.out / "noisy"),
    )
    identity = {
        "scenes": scenes_hash(args.vae, tokenizer),
        "count": args.scenes,
        "batch_size": args.batch_size,
    }
    for number, (timesteps, steps, learning_rate, out) in enumerate(stages):
        options = LoopOptions(
            max_train_steps=steps,
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_steps=200,
            weight_decay=1e-2,
        )
        seed = args.seed + number
        loss = build_loss(modules, scenes, empty, args.batch_size, timesteps, seed, args.device)
        identity |= {
            f"stage_{number + 1}": options.that_decide_the_weights() | {"timesteps": timesteps, "seed": seed}
        }
        train(modules, loss, options, out, f"base, {timesteps} timesteps", identity)
    modules.to("cpu")
    unet.to(memory_format=torch.contiguous_format)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.vae),
        text_encoder=modules["text_encoder"],
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(args.out / "pipeline")
    load_in_float32(args.out / "pipeline")
    print(f"saved {args.out / 'pipeline'}")


if __name__ == "__main__":
    main()
