"""The frozen encoders of a Stable Diffusion: its VAE, and its text encoder or encoders."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.embedded import no_loading_bars


@dataclass
class Encoders:
    """The parts of a stock pipeline without its UNet. `release` lets go of them, to free the memory."""

    pipe: Any

    @property
    def device(self) -> torch.device:
        """Where the encoders lie."""
        device: torch.device = self.pipe.vae.device
        return device

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "b 3 y x"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents, float32, scaled to unit variance, of images in [-1, 1]."""
        vae = self.pipe.vae
        encoded = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean = (encoded.mean.float() - shift) * vae.config.scaling_factor
        return mean, encoded.std.float() * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds`, (b, n, d) float32, and of SDXL also `text_embeds`, (b, p)."""
        encoded = self.pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        pooled = {"text_embeds": encoded[2].float()} if len(encoded) == 4 else {}
        return {"prompt_embeds": encoded[0].float(), **pooled}

    def encode_empty_prompt(self) -> dict[str, Tensor]:
        """As `encode_prompts`, of one sample without a prompt: what guidance reads in generation.

        That is the empty prompt's embeddings, or zeros where the pipeline's config says so, as SDXL's does.
        """
        encoded = self.encode_prompts([""])
        if self.pipe.config.get("force_zeros_for_empty_prompt", False):
            return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()}
        return encoded

    def content_hash(self) -> str:
        """SHA-256 over the encoders' weights and the tokenizers' words."""
        return parts_sha256(self.pipe.components)

    def release(self) -> None:
        """Let go of the models."""
        self.pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def parts_sha256(parts: Mapping[str, Any]) -> str:
    """SHA-256 over modules' weights, as they lie in memory, and tokenizers' words; of nothing else."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif hasattr(part, "get_vocab"):
            digest.update(repr(sorted(part.get_vocab().items())).encode())
    return digest.hexdigest()


def without_checker(folder: str, source: Mapping[str, Any]) -> dict[str, None]:
    """The argument that leaves out a pipeline's safety checker, where it has one: it judges no latents."""
    where = {key: value for key, value in source.items() if key != "variant"}
    kind: Any = DiffusionPipeline
    return {"safety_checker": None} if "safety_checker" in kind.load_config(folder, **where) else {}


def load_encoders(
    folder: str, source: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Encoders:
    """All of a pipeline but its UNet, frozen.

    `source` goes to `from_pretrained`. The VAE is in float32 where its config says that it overflows in less.
    """
    with no_loading_bars():
        kind: Any = DiffusionPipeline
        pipe = kind.from_pretrained(
            folder, unet=None, torch_dtype=dtype, **without_checker(folder, source), **source
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            is_delicate = name == "vae" and pipe.vae.config.get("force_upcast", True)
            nn.Module.to(part, device, torch.float32 if is_delicate else dtype).requires_grad_(False).eval()
    return Encoders(pipe)
