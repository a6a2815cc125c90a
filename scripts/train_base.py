"""Train the embedded Stable Diffusion's UNet on cached latents of scenes, with its text encoder frozen.

    python scripts/train_base.py

It needs the autoencoder of train_autoencoder.py and the text encoder of train_text_encoder.py. The same
command resumes an interrupted run. It writes a folder in the standard diffusers layout. Half of the timesteps
are sampled with more weight on noisy ones, at which the prompt matters most for such small latents
(benchmarks/embedded_design.py).

The UNet in the repository was trained a second time, from the weights of the first and with other noise:

    python scripts/train_base.py --steps 3000 --seed 1 --out ~/.cache/nexus-adapters/base-2 \
        --start ~/.cache/nexus-adapters/base/pipeline/unet
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPTextModel

from embedded_data import (
    DEFAULT_CACHE,
    Loss,
    SceneCache,
    add_scene_options,
    draw_batch,
    folder_hash,
    load_scenes,
    run_training,
    scene_identity,
    token_ids,
    train_tokenizer,
    training_parser,
)
from initialization import preserve_signal
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.loop import step_generator
from nexus_adapters.training.loss import denoising_losses
from nexus_adapters.training.precision import autocast
from train_text_encoder import TEXT_WIDTH

LATENT_CHANNELS = 12


def build_unet(device: str = "cpu") -> UNet2DConditionModel:
    """Return a UNet with SD 1.5's block types, four levels and 7.5M parameters."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 96, 96, 128),
        layers_per_block=1,
        attention_head_dim=(3, 3, 3, 4),  # the number of heads, as this field is interpreted for SD 1.5
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    preserve_signal(unet)
    speed_up(unet, device)
    return unet.to(device)


def speed_up(unet: UNet2DConditionModel, device: str) -> None:
    """Use a memory layout in which convolutions are faster on a CPU."""
    if device == "cpu":
        unet.to(memory_format=torch.channels_last)


def build_scheduler() -> DDIMScheduler:
    """Return v-prediction on a cosine schedule, which suits small latents and ends in pure noise."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # no effect on trailing steps; the stock pipeline warns about any other value
    )


def draw_mixed_timesteps(
    count: int, num_train_timesteps: int, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """Return timesteps of which half are cubic (T2I-Adapter, arXiv 2302.08453, section 3.4), half uniform.

    They are spread evenly over the batch from one random offset, which makes the loss less noisy (Variational
    Diffusion Models, arXiv 2107.00630, appendix I.1).
    """
    rows = torch.arange(count, dtype=torch.float64)
    u = (torch.rand((), generator=generator, dtype=torch.float64) + rows / count) % 1
    position = torch.where(rows % 2 == 0, 1 - u**3, u)
    return (position * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def build_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scenes: SceneCache,
    empty: Tensor,
    batch_size: int,
    seed: int,
    device: str,
) -> Loss:
    """Return step -> loss, with scenes, captions, noise, timesteps and dropout sampled from (seed, step)."""
    base = UNetBase(unet.config, scheduler=build_scheduler())

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        batch = draw_batch(scenes, empty, batch_size, generator, device)
        steps = draw_mixed_timesteps(batch_size, base.num_train_timesteps, generator)
        with autocast(device):
            with torch.no_grad():
                prompt_embeds = text_encoder(batch.tokens)[0]
            losses = denoising_losses(base, unet, batch.latents, batch.noise, steps.to(device), prompt_embeds)
            return losses.mean()

    return loss_of_step


def complete_configs(pipeline: Path) -> None:
    """Make a plain `from_pretrained` load every part in float32, and remove local paths.

    diffusers uses float32 regardless of the precision of the files; transformers uses the precision in the
    text encoder's config.
    """
    _edit_config(pipeline / "text_encoder", lambda config: config | {"dtype": "float32"})
    _edit_config(pipeline / "vae", lambda config: {k: v for k, v in config.items() if k != "_name_or_path"})


def _edit_config(folder: Path, edit: Callable[[dict[str, object]], dict[str, object]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2) + "\n")


def main() -> None:
    parser = training_parser(__doc__, "base", steps=4000, batch_size=32, learning_rate=2e-3)
    add_scene_options(parser)
    parser.add_argument("--text-encoder", type=Path, default=DEFAULT_CACHE / "text_encoder" / "model")
    parser.add_argument("--start", type=Path, help="folder of a UNet whose weights to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    scenes = load_scenes(args.vae, tokenizer, args.scenes, args.cache, args.device)
    text_encoder = CLIPTextModel.from_pretrained(args.text_encoder).eval().to(args.device)
    unet = build_unet(args.device)
    if args.start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start).state_dict())
    options = TrainingOptions(
        batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        optimizer="muon",
        schedule="cosine",
        warmup_steps=200,
        weight_decay=1e-2,
    )
    empty = token_ids(tokenizer, [""])
    loss = build_loss(unet, text_encoder, scenes, empty, args.batch_size, args.seed, args.device)
    identity = scene_identity(args, tokenizer) | {"text_encoder": folder_hash(args.text_encoder)}
    if args.start:
        identity |= {"start": folder_hash(args.start)}
    run_training(unet, loss, options, args.out, "base", identity)
    unet.to("cpu", memory_format=torch.contiguous_format)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.vae),
        text_encoder=text_encoder.to("cpu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(args.out / "pipeline")
    complete_configs(args.out / "pipeline")
    print(f"saved {args.out / 'pipeline'}")


if __name__ == "__main__":
    main()
