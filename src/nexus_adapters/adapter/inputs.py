"""The checks of what is passed to an adapter's forward."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nexus_adapters.errors import expect


def check_inputs(condition: Tensor, prompt_embeds: Tensor, config: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument` where `NexusAdapter.forward` cannot take these tensors."""
    fits = condition.ndim == 4 and condition.shape[1] == config["in_channels"]
    expect(fits, "condition", f"shape (B, {config['in_channels']}, H, W)", f"{tuple(condition.shape)}")
    is_float = condition.is_floating_point()
    expect(is_float, "condition", "floating-point numbers in [0, 1]", condition.dtype)
    height, width = condition.shape[2:]
    unshuffle = config["unshuffle"]
    expect(
        height > 0 and width > 0 and height % unshuffle == 0 and width % unshuffle == 0,
        "condition",
        f"a height and a width that are multiples of {unshuffle}",
        f"{height}x{width}",
        "Pad it on the right and at the bottom, as attach() does",
    )
    text_width = config["text_width"]
    fits = prompt_embeds.ndim == 3 and prompt_embeds.shape[1] > 0 and prompt_embeds.shape[2] == text_width
    expect(fits, "prompt_embeds", f"shape (B, N, {text_width})", f"{tuple(prompt_embeds.shape)}")
    batch, texts = len(condition), len(prompt_embeds)
    expect(batch == texts, "prompt_embeds", f"a batch of {batch}, as condition has", f"a batch of {texts}")
