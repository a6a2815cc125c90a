"""What an adapter must look like follows from the UNet's config: channels, poolings, stem and text width.

Where diffusers (0.42, `UNet2DConditionModel.forward`) adds `down_intrablock_additional_residuals`, in order:

- `CrossAttnDownBlock2D` takes one and adds it after its last attention, before its downsampler: at the
  stride with which the block was entered, and also to the skip connection.
- `DownBlock2D` is run first and the feature added to what it returns, after its downsampler: at twice the
  stride with which it was entered. The last down block has no downsampler.
- What is then left is added behind the middle block if its shape is the sample's, and otherwise dropped
  without a word. A ControlNet's residuals are a separate argument.

`SimpleCrossAttnDownBlock2D` and `KCrossAttnDownBlock2D` are handed the feature but do not accept it; for any
other type the stride is not known here. All of these are errors.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

# Down-block types that take a feature, and whether they add it behind their downsampler.
ADDS_AFTER_DOWNSAMPLER = {"CrossAttnDownBlock2D": False, "DownBlock2D": True}

# Only UNets of this depth (SDXL's) have a feature for the middle block.
DOWN_BLOCKS_WITH_MIDDLE_FEATURE = 3


def unet_config(unet: object) -> Mapping[str, Any]:
    """The config of a `UNet2DConditionModel`, compiled or not; ValueError for anything else."""
    bare: Any = getattr(unet, "_orig_mod", unet)  # torch.compile wraps what it compiles
    fits = isinstance(bare, UNet2DConditionModel)
    if not fits:
        hint = " (pass its .unet)" if isinstance(getattr(bare, "unet", None), nn.Module) else ""
        raise ValueError(f"unet: expected a UNet2DConditionModel; received a {type(bare).__name__}{hint}")
    config: Mapping[str, Any] = bare.config
    return config


def adapter_geometry(config: Mapping[str, Any], vae_scale_factor: int = 8) -> dict[str, Any]:
    """`channels, pools, unshuffle, text_width` of the adapter that fits a UNet of this config.

    `config` is a `UNet2DConditionModel`'s; `vae_scale_factor` is image pixels per latent pixel. One stage per
    down block, and one for the middle block where there are exactly three down blocks. Raises ValueError, by
    name, for block types that take no features and for text inputs of no single width.
    """
    strides = latent_strides(config)
    channels = list(config["block_out_channels"])
    if len(strides) > len(channels):
        channels.append(channels[-1])
    # From one stage to the next the stride doubles once for each pooling. Twice only from a
    # CrossAttnDownBlock2D to a DownBlock2D with a downsampler, so that stage pools twice.
    ratios = [after // before for before, after in pairwise(strides)]
    pools = [{1: False, 2: True, 4: 2}[ratio] for ratio in ratios]
    return {
        "channels": tuple(channels),
        "pools": (False, *pools),
        "unshuffle": vae_scale_factor * strides[0],
        "text_width": text_width(config),
    }


def latent_strides(config: Mapping[str, Any]) -> list[int]:
    """For every feature, in order: how many latent pixels one of its pixels spans, per side."""
    types: Sequence[str] = config["down_block_types"]
    last = len(types) - 1
    strides = []
    for level, name in enumerate(types):
        after_downsampler = ADDS_AFTER_DOWNSAMPLER.get(name.removeprefix("UNetRes"))
        if after_downsampler is None:
            raise ValueError(
                f"unet: expected down blocks of the types {', '.join(ADDS_AFTER_DOWNSAMPLER)}, which take "
                f"features; received {name} as down block {level + 1} of {len(types)}"
            )
        strides.append(2 ** (level + (after_downsampler and level < last)))
    if len(types) == DOWN_BLOCKS_WITH_MIDDLE_FEATURE:
        if config["mid_block_type"] is None:
            raise ValueError(
                "unet: expected a middle block behind exactly three down blocks, since it takes the fourth "
                "feature; received mid_block_type=None"
            )
        strides.append(2**last)
    return strides


def text_width(config: Mapping[str, Any]) -> int:
    """Width of the prompt embeddings that a UNet of this config receives.

    `encoder_hid_dim` where the UNet projects the text itself, else `cross_attention_dim`. A loaded IP-Adapter
    changes `encoder_hid_dim_type` but not what the text is. ValueError where the UNet reads no text, or reads
    it at several widths.
    """
    if config["encoder_hid_dim_type"] == "image_proj":
        raise ValueError(
            "unet: expected one that reads prompt embeddings; received encoder_hid_dim_type='image_proj', "
            "which reads image embeddings in their place"
        )
    if config["encoder_hid_dim"] is not None:
        return int(config["encoder_hid_dim"])
    width = config["cross_attention_dim"]
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if len(widths) != 1:
        raise ValueError(
            f"unet: expected one text width for all blocks; received cross_attention_dim={tuple(width)}"
        )
    return int(widths.pop())
