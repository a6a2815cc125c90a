"""Train the embedded Stable Diffusion: text encoder and UNet together, on cached latents of scenes.

    python scripts/train_base.py

Needs the autoencoder of train_autoencoder.py. Continues where it was stopped. Writes a folder in the standard
diffusers layout.
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

from embedded_data import DEFAULT_CACHE, PHRASINGS, SceneCache, load_scenes, token_ids, train_tokenizer
from initialization import preserve_signal
from nexus_adapters.training.loop import LoopOptions, Loss, step_generator, train
from nexus_adapters.training.loss import denoising_loss, draw_timesteps

LATENT_CHANNELS = 12
TEXT_WIDTH = 160
PROMPT_DROPOUT = 0.1


def build_unet() -> UNet2DConditionModel:
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
    return use_plain_attention(unet)


def use_plain_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """On a CPU the backward pass of fused attention takes a third of a step, of the plain one a tenth."""
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
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
            attn_implementation="eager",  # as use_plain_attention
        )
    )


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


def build_loss(modules: nn.ModuleDict, scenes: SceneCache, empty: Tensor, batch_size: int, seed: int) -> Loss:
    """step -> loss, on scenes, captions, noise, timesteps and dropout drawn from (seed, step)."""
    scheduler = build_scheduler()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        indices = torch.randint(len(scenes), (batch_size,), generator=generator)
        phrasing = torch.randint(PHRASINGS, (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < PROMPT_DROPOUT
        tokens = torch.where(dropped, empty, scenes.tokens[indices, phrasing].long())
        latents = scenes.latents[indices].float()
        noise = torch.randn(latents.shape, generator=generator)
        steps = draw_timesteps("uniform", batch_size, scheduler.config.num_train_timesteps, generator)
        with torch.autocast("cpu", torch.bfloat16):
            prompt_embeds = modules["text_encoder"](tokens)[0]
            return denoising_loss(modules["unet"], scheduler, latents, noise, steps, prompt_embeds)

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
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    scenes = load_scenes(args.vae, tokenizer, args.scenes, args.cache)
    unet = build_unet().to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    modules = nn.ModuleDict({"unet": unet, "text_encoder": build_text_encoder(tokenizer)})
    options = LoopOptions(
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup_steps=200,
        weight_decay=1e-2,
    )
    loss = build_loss(modules, scenes, token_ids(tokenizer, [""]), args.batch_size, args.seed)
    train(modules, loss, options, args.out, "base")
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
