"""Train the first adapters on the embedded base: T2I-Adapter, and Prime and Slim with and without the skip.

    python scripts/train_adapters.py [--methods t2i prime ...]

Same budget, data, seed and recipe for all. Trained for the base that comes with the package, unless `--base`
and `--vae` name another. Continues where it was stopped.

The adapters of the package come from here; recipes/embedded-canny.toml repeats them with the trainer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn

from embedded_data import (
    Loss,
    SceneCache,
    add_scene_options,
    draw_batch,
    folder_hash,
    load_scenes,
    run_training,
    scene_identity,
    token_ids,
    training_parser,
)
from nexus_adapters import NexusAdapter
from nexus_adapters.embedded import WEIGHTS
from nexus_adapters.injection.residuals import ARGUMENT, residuals
from nexus_adapters.training import methods
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.loop import step_generator
from nexus_adapters.training.loss import denoising_loss, draw_timesteps
from nexus_adapters.training.precision import autocast
from train_base import speed_up

VALIDATION_STEPS = range(10**9, 10**9 + 24)  # batches of noise and timesteps that no training draws
VALIDATION_SCENES = 2000  # that no training draws either
METHODS = ("t2i", "prime-residual", "slim-residual", "prime", "slim")


def build_adapter(method: str, unet: UNet2DConditionModel) -> NexusAdapter | T2IAdapter:
    """The untrained adapter of one method, with the UNet's channels."""
    name, _, skip = method.partition("-")
    return methods.build_adapter(name, unet, residual=skip == "residual")


def build_loss(
    adapter: nn.Module,
    base: StableDiffusionPipeline,
    scenes: SceneCache,
    batch_size: int,
    seed: int,
    device: str,
) -> Loss:
    """step -> loss; scenes, captions, noise, timesteps and dropout follow from (seed, step) alone."""
    empty = token_ids(base.tokenizer, [""])
    reads_text = isinstance(adapter, NexusAdapter)

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        batch = draw_batch(scenes, empty, batch_size, generator, device)
        steps = draw_timesteps("cubic", batch_size, base.scheduler.config.num_train_timesteps, generator)
        condition = scenes.condition(batch.indices).to(device)
        with autocast(device):
            with torch.no_grad():
                prompt_embeds = base.text_encoder(batch.tokens)[0]
            features = adapter(condition, prompt_embeds) if reads_text else adapter(condition)
            added = residuals(features)[ARGUMENT]
            return denoising_loss(
                base.unet, base.scheduler, batch.latents, batch.noise, steps.to(device), prompt_embeds, added
            )

    return loss_of_step


@torch.no_grad()
def validation_loss(adapter: nn.Module, loss_of_step: Loss) -> float:
    """The mean over batches that are the same for all methods and learning rates."""
    adapter.eval()
    return sum(loss_of_step(step).item() for step in VALIDATION_STEPS) / len(VALIDATION_STEPS)


def load_base(folder: Path, device: str) -> StableDiffusionPipeline:
    """The base, frozen."""
    base = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    speed_up(base.unet, device)
    for module in (base.unet, base.text_encoder, base.vae):
        module.requires_grad_(False).eval().to(device)
    return base


def main() -> None:
    parser = training_parser(__doc__, "adapters", steps=1000, batch_size=32, learning_rate=1e-2)
    add_scene_options(parser, vae=WEIGHTS / "base" / "vae")
    parser.add_argument("--base", type=Path, default=WEIGHTS / "base")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    base = load_base(args.base, args.device)
    where = (args.cache, args.device)
    scenes = load_scenes(args.vae, base.tokenizer, args.scenes, *where)
    unseen = load_scenes(args.vae, base.tokenizer, VALIDATION_SCENES, *where, after=args.scenes)
    options = TrainingOptions(
        batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        optimizer=args.optimizer,
        schedule="cosine",
        warmup_steps=50,
    )
    identity = scene_identity(args, base.tokenizer) | {"base": folder_hash(args.base)}
    for method in args.methods:
        torch.manual_seed(args.seed)
        adapter = build_adapter(method, base.unet).train().to(args.device)
        loss, loss_on_unseen = (
            build_loss(adapter, base, data, args.batch_size, args.seed, args.device)
            for data in (scenes, unseen)
        )
        run_training(adapter, loss, options, args.out / method, method, identity)
        print(f"{method}: loss {validation_loss(adapter, loss_on_unseen):.5f} on scenes it has not seen")
        adapter.half().save_pretrained(args.out / method / "adapter")


if __name__ == "__main__":
    main()
