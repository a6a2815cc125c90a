"""What blocks take for granted, page by page: names, and files in the working directory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from tests import tiny
from tests.conditions import tiny_models
from tests.training.runs import write_images
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from nexus_adapters import StableDiffusionNexusPipeline


def control() -> dict[str, Any]:
    pipe, unet = tiny.sd15(), tiny.unet()
    adapter, other = tiny.adapter(unet), tiny.adapter(unet, variant="slim")
    embeds = torch.zeros(1, tiny.TOKENS, tiny.TEXT_WIDTH)
    return {
        "pipe": StableDiffusionNexusPipeline.from_pipe(pipe, adapter=adapter),
        "inpaint": StableDiffusionInpaintPipeline.from_pipe(pipe),
        "StableDiffusionNexusPipeline": StableDiffusionNexusPipeline,
        "StableDiffusionPipeline": StableDiffusionPipeline,
        "DDIMScheduler": DDIMScheduler,
        "adapter": adapter,
        "other": other,
        "sketch": tiny.image(),
        "depth": tiny.image(seed=8),
        "condition": tiny.image(),
        "area": tiny.image().convert("L"),
        "mask_image": tiny.image().convert("L"),
        "prompt": "a red star",
        "photo": tiny.image(),
        "width": 64,
        "height": 64,
        "embeds": embeds,
        "negative": embeds,
    }


def data() -> dict[str, Any]:
    tiny_models.dpt(Path("path/to/model"))
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save("depth-mm.png")
    return {
        "photo": tiny.image(),
        "other": tiny.image(seed=8),
        "extract_lines": lambda image: image,
        "flow": lambda image: image,
        "compare_flows": lambda found, wanted: {"flow_error": 0.0},
    }


def evaluation() -> dict[str, Any]:
    cells = {"canny-prime-0": {"metrics": {"own": {"scores": ["edge_f1"]}}}}
    scores = {"cells": np.frombuffer(json.dumps(cells).encode(), np.uint8)}
    np.savez("scores.npz", **scores, **{"canny-prime-0/own/scores": np.ones((1, 3))})
    return {}


def photos() -> dict[str, Any]:
    if not Path("photos").exists():
        write_images(Path("photos"))
    return {}


def pixart() -> dict[str, Any]:
    """A tiny PixArt by its Hub id, and photos."""
    torch.manual_seed(0)
    words = [(f"▁{word}", -2.0) for word in ("a", "red", "star")]
    letters = [(letter, -4.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    encoder = T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        sample_size=32,
        caption_channels=16,
        cross_attention_dim=16,
        norm_num_groups=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    PixArtSigmaPipeline(
        tokenizer, T5EncoderModel(encoder), vae, transformer, DPMSolverMultistepScheduler()
    ).save_pretrained("PixArt-alpha/PixArt-Sigma-XL-2-512-MS")
    return photos()
