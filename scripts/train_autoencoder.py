"""Train the embedded autoencoder, an AutoencoderKL that downsamples by 8, on rendered scenes.

    python scripts/train_autoencoder.py

The same command resumes an interrupted run. The loss is the squared and absolute error of pixels, the
absolute error of their differences (which keeps edges sharp and flat areas flat, since noise and blocking
cause false edges), and a small KL term, which bounds the latents and makes the decoder robust to the
sampler's small errors. Most steps use random crops, at a quarter of the cost; the last ones use whole scenes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from embedded_data import Loss, run_training, training_parser
from initialization import preserve_signal
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import Split, draw_scene
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.loop import step_generator
from nexus_adapters.training.precision import autocast

CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 12,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
    "sample_size": 128,
}
KL_WEIGHT = 1e-4
SQUARED_WEIGHT = 2.0
DIFFERENCE_WEIGHT = 0.5
SCALE_BATCHES = 16  # batches of 32 scenes to measure the scale of the latents
CROP = 64  # side in pixels
CROPPED_SHARE = 0.85  # fraction of all steps
INITIAL_LOG_VARIANCE = -6.0  # of the latents; small, or their noise drowns the signal at first


def build_autoencoder(initialize: Callable[[nn.Module], None] = preserve_signal) -> AutoencoderKL:
    """Return the model with 1.7M parameters; the latents of a scene are 12 x 16 x 16."""
    vae = AutoencoderKL(**CONFIG)
    initialize(vae)
    log_variance = slice(CONFIG["latent_channels"], None)
    nn.init.constant_(vae.quant_conv.bias[log_variance], INITIAL_LOG_VARIANCE)
    vae.quant_conv.weight.data[log_variance] *= 0.01
    return vae


def pixels(first: int, count: int, split: Split = "train") -> Float[Tensor, "b 3 h w"]:
    """Return the images of scenes `first`, `first + 1`, ..., in [-1, 1]."""
    images = np.stack([render(draw_scene(seed, split)).image for seed in range(first, first + count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_crop(images: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c k k"]:
    """Return the same random square of all images."""
    top, left = torch.randint(images.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
    return images[:, :, top : top + CROP, left : left + CROP].contiguous()


def reconstruction_loss(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Tensor:
    """Return the squared and absolute error of pixels plus the absolute error of neighbors' differences."""
    error = output - target
    differences = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return SQUARED_WEIGHT * error.square().mean() + error.abs().mean() + DIFFERENCE_WEIGHT * differences


def build_loss(vae: AutoencoderKL, steps: int, batch_size: int, seed: int, device: str = "cpu") -> Loss:
    """Return step -> loss, on scenes that no other step uses."""

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(seed, step)
        target = pixels(step * batch_size, batch_size)
        if step < CROPPED_SHARE * steps:
            target = random_crop(target, generator)
        target = target.to(device)
        with autocast(device):
            moments = vae.encode(target).latent_dist
            latents = moments.sample(generator)  # sampled on the CPU, whatever the device
            output = vae.decode(latents).sample
        kl = moments.kl().mean() / latents[0].numel()
        return reconstruction_loss(output.float(), target) + KL_WEIGHT * kl.float()

    return loss_of_step


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL) -> None:
    """Store the factor that scales the latents to unit variance, as in Stable Diffusion."""
    batches = (pixels(first, 32).to(vae.device) for first in range(0, 32 * SCALE_BATCHES, 32))
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def main() -> None:
    parser = training_parser(__doc__, "autoencoder", steps=2500, batch_size=16, learning_rate=2e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build_autoencoder().to(args.device)
    options = TrainingOptions(
        batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup_steps=50,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
    )
    loss = build_loss(vae, args.steps, args.batch_size, args.seed, args.device)
    identity = {"seed": args.seed, "batch_size": args.batch_size}
    run_training(vae, loss, options, args.out, "autoencoder", identity)
    vae.eval()
    set_latent_scale(vae)
    vae.save_pretrained(args.out / "vae")
    print(f"saved {args.out / 'vae'}, scaling factor {vae.config.scaling_factor}")


if __name__ == "__main__":
    main()
