"""What pages name and no test can download: tiny models in folders of the same name, photos, and maps.

A folder whose path is a Hub id is found before the Hub is asked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, T2IAdapter
from tests import tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SD15_WIDTHS, SDXL_WIDTHS = (768,), (768, 1280)  # those of the models themselves, which commands expect


def text_encoder(width: int, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=tiny.TOKENS,
        projection_dim=tiny.TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def sd15(folder: Path) -> None:
    parts = tiny.sd15_components(
        unet=tiny.unet(cross_attention_dim=sum(SD15_WIDTHS)), text_encoder=text_encoder(*SD15_WIDTHS)
    )
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    first, second = SDXL_WIDTHS
    StableDiffusionXLPipeline(
        vae=tiny.vae(),
        text_encoder=text_encoder(first),
        text_encoder_2=text_encoder(second, projected=True),
        tokenizer=tiny.tokenizer(),
        tokenizer_2=tiny.tokenizer(),
        unet=tiny.unet(tiny.SDXL_UNET, cross_attention_dim=sum(SDXL_WIDTHS)),
        scheduler=tiny.scheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)


def t2i(folder: Path) -> None:
    channels = [*tiny.SD15_UNET["block_out_channels"]]
    T2IAdapter(in_channels=3, channels=channels, num_res_blocks=2, downscale_factor=8).save_pretrained(folder)


def t2i_xl(folder: Path) -> None:
    channels = [*tiny.SDXL_UNET["block_out_channels"]]
    T2IAdapter(
        in_channels=3,
        channels=[*channels, channels[-1]],
        num_res_blocks=2,
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    ).save_pretrained(folder)


def t2i_file(file: Path) -> None:
    t2i(file.parent / "t2i-of-file")
    torch.save(T2IAdapter.from_pretrained(file.parent / "t2i-of-file").adapter.state_dict(), file)


def nexus(folder: Path) -> None:
    tiny.adapter(tiny.unet(cross_attention_dim=sum(SD15_WIDTHS))).save_pretrained(folder)


def picture(file: Path) -> None:
    tiny.image(128, 128).save(file)


# The name on a page -> what makes it.
STAND_INS: dict[str, Callable[[Path], Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd15,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    "TencentARC/t2iadapter_canny_sd15v2": t2i,
    "TencentARC/t2i-adapter-canny-sdxl-1.0": t2i_xl,
    "t2iadapter_canny_sd15v2.pth": t2i_file,
    "photo.jpg": picture,
    "photo.png": picture,
    "you/nexus-prime-canny-sd15": nexus,
}


def write_stand_ins(text: str, folder: Path) -> None:
    """Make what the text of a page names."""
    for name, make in STAND_INS.items():
        if name in text:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            make(folder / name)
