"""A tiny Stable Diffusion as one file with the names of its first publication (the reverse of diffusers')."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipe: Any, file: Path) -> None:
    """Write UNet, VAE and text encoder of `pipe`."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_names(pipe.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_names(pipe.vae).items()}
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def unet_names(unet: Any) -> dict[str, Tensor]:
    """The UNet's tensors, by place in the row of input and output blocks."""
    layers = unet.config.layers_per_block
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    found = {}
    for name, tensor in unet.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("down_blocks", "up_blocks"):
            block, kind, place = int(parts[1]), parts[2], int(parts[3])
            rest = ".".join(parts[4:])
            is_down = parts[0] == "down_blocks"
            row, count = ("input_blocks", layers + 1) if is_down else ("output_blocks", layers + 1)
            first = block * count + (1 if is_down else 0)
            if kind == "resnets":
                new = f"{row}.{first + place}.0.{_renamed(rest, _RESNET)}"
            elif kind == "attentions":
                new = f"{row}.{first + place}.1.{rest}"
            elif kind == "downsamplers":
                new = f"{row}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
            else:
                has_attention = hasattr(unet.up_blocks[block], "attentions")
                new = f"{row}.{first + layers}.{2 if has_attention else 1}.{rest}"
        elif parts[0] == "mid_block":
            rest = ".".join(parts[3:])
            new = (
                f"middle_block.{2 * int(parts[2])}.{_renamed(rest, _RESNET)}"
                if parts[1] == "resnets"
                else f"middle_block.1.{rest}"
            )
        else:
            new = _renamed(name, fixed)
        found[new] = tensor
    return found


def vae_names(vae: Any) -> dict[str, Tensor]:
    """The VAE's tensors; its attention's linear layers are 1x1 convolutions there."""
    last = len(vae.config.block_out_channels) - 1
    found = {}
    for name, tensor in vae.state_dict().items():
        half, _, rest = name.partition(".")
        parts = rest.split(".")
        new = rest
        if parts[0] == "down_blocks":
            kind = "block" if parts[2] == "resnets" else "downsample"
            tail = ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
            new = f"down.{parts[1]}.{kind}.{f'{parts[3]}.{tail}' if kind == 'block' else tail}"
        elif parts[0] == "up_blocks":
            kind = "block" if parts[2] == "resnets" else "upsample"
            tail = ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
            new = f"up.{last - int(parts[1])}.{kind}.{f'{parts[3]}.{tail}' if kind == 'block' else tail}"
        elif parts[0] == "mid_block" and parts[1] == "resnets":
            new = f"mid.block_{int(parts[2]) + 1}.{'.'.join(parts[3:])}"
        elif parts[0] == "mid_block":
            new = f"mid.attn_1.{_renamed('.'.join(parts[3:]), _ATTENTION)}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        else:
            new = rest.replace("conv_norm_out", "norm_out")
        found[f"{half}.{new}" if half in ("encoder", "decoder") else name] = tensor
    return found
