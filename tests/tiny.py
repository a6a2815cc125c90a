"""Tiny, randomly initialised Stable Diffusion parts in the shapes of SD 1.5 and SDXL. Offline and seeded."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.bases.families import config_of
from nexus_adapters.bases.unet import UNetBase

writes_fast_tokenizers = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="transformers 4 writes no tokenizer.json"
)
"""Of tests that need the tokenizers of transformers 5, as the embedded weights and training do."""

WORDS = ("a", "red", "blue", "green", "star", "ring", "cat", "dog", "on", "of", "photo", "blurry")
TEXT_WIDTH = 16
TOKENS = 12

SD15_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24, 24),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_WIDTH,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT_WIDTH,
}


def unet(config: dict[str, Any] = SD15_UNET, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes}).eval()


def vae() -> AutoencoderKL:
    """Downsamples by 8, as SD's does."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    ).eval()


def tokenizer() -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS)]
    letters = sorted(set("".join(WORDS)))
    vocab = words + letters + [f"{letter}</w>" for letter in letters]
    # Each word is built up letter by letter from its end; every intermediate piece needs a place too.
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        piece = f"{word[-1]}</w>"
        for letter in reversed(word[:-1]):
            merges.append((letter, piece))
            piece = letter + piece
            vocab.append(piece)
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    return clip_tokenizer(ids, list(dict.fromkeys(merges)))


def clip_tokenizer(ids: dict[str, int], merges: Sequence[tuple[str, str]] = ()) -> CLIPTokenizer:
    """Read from files, which transformers 4 and 5 do alike; their constructors differ."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(ids))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (Path(folder) / "merges.txt").write_text("\n".join(lines))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(2 + projected)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd15_components(**changes: Any) -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    } | changes


def sd15(cls: type = StableDiffusionPipeline, **changes: Any) -> Any:
    """A pipeline of SD 1.5's kind."""
    return quiet(cls(**sd15_components(**changes), requires_safety_checker=False))


def sdxl(cls: type = StableDiffusionXLPipeline, **changes: Any) -> Any:
    """A pipeline of SDXL's kind."""
    components = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projected=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(SDXL_UNET),
        "scheduler": scheduler(),
    }
    return quiet(cls(**components | changes, add_watermarker=False))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base(of: UNet2DConditionModel, noise: Any = None, vae_levels: int = 4) -> UNetBase:
    """What training knows of a UNet; `noise` is a scheduler, SD's by default."""
    vae_config = {"block_out_channels": vae_levels * (4,), "latent_channels": of.config.in_channels}
    return UNetBase(config_of(of), vae_config, noise or scheduler())


def controlnet(of: UNet2DConditionModel) -> ControlNetModel:
    torch.manual_seed(4)
    net = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(4, 4, 4, 4))
    for parameter in net.parameters():  # a fresh one adds exactly nothing
        torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


def adapter(of: UNet2DConditionModel, **overrides: Any) -> NexusAdapter:
    """Fits `of`; its features are large enough to be seen in the image."""
    torch.manual_seed(5)
    made = NexusAdapter.for_unet(of, **overrides).eval().requires_grad_(False)
    for stage in made.adapter.body:
        stage.cross_attention.to_out[0].weight.mul_(20)
        stage.cross_attention.to_k.weight.mul_(5)
    return made


def condition(count: int = 1, height: int = 64, width: int = 64, seed: int = 6) -> torch.Tensor:
    """(count, 3, height, width), black and white in blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(count, 3, -(-height // 4), -(-width // 4), generator=generator).round()
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :height, :width].contiguous()


def image(height: int = 64, width: int = 64, seed: int = 7) -> Image.Image:
    """The PIL image of `condition`."""
    pixels = condition(1, height, width, seed)[0].permute(1, 2, 0) * 255
    return Image.fromarray(pixels.byte().numpy())


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]
