"""The checks of what is passed to an adapter's forward."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_inputs(condition: Tensor, prompt_embeds: Tensor, config: Mapping[str, Any]) -> None:
    """Raise a ValueError where `NexusAdapter.forward` cannot take these tensors."""
    if condition.ndim != 4 or condition.shape[1] != config["in_channels"]:
        expected = f"(B, {config['in_channels']}, H, W)"
        raise ValueError(f"condition: expected {expected}; received {tuple(condition.shape)}")
    if not condition.is_floating_point():
        raise ValueError(f"condition: expected floating point in [0, 1]; received {condition.dtype}")
    height, width = condition.shape[2:]
    unshuffle = config["unshuffle"]
    if height % unshuffle or width % unshuffle or not height or not width:
        raise ValueError(
            f"condition: expected height and width that are multiples of {unshuffle} (pad right and bottom; "
            f"attach() does so); received {height}x{width}"
        )
    text_width = config["text_width"]
    if prompt_embeds.ndim != 3 or prompt_embeds.shape[1] == 0 or prompt_embeds.shape[2] != text_width:
        expected = f"(B, N, {text_width})"
        raise ValueError(f"prompt_embeds: expected {expected}; received {tuple(prompt_embeds.shape)}")
    batch = len(condition)
    if len(prompt_embeds) != batch:
        raise ValueError(
            f"prompt_embeds: expected a batch of {batch}, as condition has; received {len(prompt_embeds)}"
        )
