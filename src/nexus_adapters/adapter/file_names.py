"""How diffusers names the files of a saved model."""

import re
from pathlib import Path

WEIGHTS = "diffusion_pytorch_model"  # then an optional variant, shard numbers, and the suffix


def variant_in_name(file: Path) -> str | None:
    """What diffusers calls `variant`, such as "fp16" of diffusion_pytorch_model.fp16.safetensors."""
    between = file.stem.removeprefix(WEIGHTS)
    return re.sub(r"-\d{5}-of-\d{5}$", "", between).lstrip(".") or None
