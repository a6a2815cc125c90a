"""What a file of weights seems to be, for the messages to those who took it for something else."""

from collections.abc import Collection

# What a file seems to be by the beginning of any of its names, the surest signs first.
_SIGNS = {
    "adapter.conv_in.": "a Nexus or T2I-Adapter",
    "model.diffusion_model.": "a whole Stable Diffusion checkpoint",
    "controlnet_cond_embedding.": "a ControlNet",
    "control_model.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "lora_unet_": "a LoRA",
    "lora_te": "a LoRA",
    "unet.down_blocks.": "a LoRA",
    "ip_adapter.": "an IP-Adapter",
    "image_proj": "an IP-Adapter",
    "down_blocks.": "a UNet",
    "text_model.": "a text encoder",
    "encoder.down": "a VAE",
    "first_stage_model.": "a VAE",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
}


def seems_to_be(names: Collection[str]) -> str:
    """In words, by the names of its tensors."""
    for sign, what in _SIGNS.items():
        if any(name.startswith(sign) for name in names):
            return what
    if any(".lora" in name or "lora_" in name for name in names):
        return "a LoRA"
    if any(".out_conv." in name for name in names):
        return "a light T2I-Adapter, whose trunk is another"
    if {"conv_in", "body"} <= {name.split(".")[0] for name in names}:
        return "a T2I-Adapter"
    shown = ", ".join(sorted(names)[:3]) or "empty"
    return f"something else ({shown})"
