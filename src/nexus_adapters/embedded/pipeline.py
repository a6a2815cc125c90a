"""The small Stable Diffusion and the adapters that ship with the package: loaded offline, for any CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from nexus_adapters.bases.loading import EMBEDDED, load_base
from nexus_adapters.bundled import BUNDLED, WEIGHTS, present
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.methods.registry import load_adapter
from nexus_adapters.pipelines import StableDiffusionNexusPipeline

# Worlds, by the base that draws them.
_WORLDS = {"scenes": EMBEDDED}

EMBEDDED_GUIDANCE = BUNDLED[EMBEDDED].guidance_scale


def load_embedded(
    condition: str = "canny",
    variant: str = "prime",
    world: str = "scenes",
    torch_dtype: torch.dtype = torch.float32,
) -> StableDiffusionNexusPipeline:
    """An embedded Stable Diffusion with a trained Nexus adapter. Never uses the network.

    Args:
        condition: what the adapter was trained on: "canny", edges as `extract` gives them; "depth", nearness
            in grey, from black for the background to white for the nearest object; "segmentation", each
            shape in its color of `scenes.maps.SHAPE_COLORS`, on black; "sketch", white strokes of one pixel
            on black.
        variant: the name of an adapter of this condition: "prime", "slim", and for canny also "prime-paper"
            and "slim-paper".
        world: what the base was trained to draw: "scenes", colored shapes of 128x128 pixels.
        torch_dtype: of the whole pipeline; the weights are stored as float16.

    Returns:
        A pipeline on the CPU. `guidance_scale=EMBEDDED_GUIDANCE` suits it better than the stock default.

    Raises:
        InvalidArgument: for an unknown world, condition or variant; it lists the known ones.
        FileNotFoundError: where the installation lacks the weights.
    """
    if world not in _WORLDS:
        raise InvalidArgument("world", f"one of {', '.join(_WORLDS)}", repr(world))
    bundle = BUNDLED[_WORLDS[world]]
    names = [name for name in bundle.adapters.get(condition, ()) if name != "t2i"]
    if names and variant not in names:
        raise InvalidArgument("variant", f"one of {', '.join(names)} for {condition}", repr(variant))
    adapter = load_adapter(bundle.adapter(variant, condition), dtype=torch_dtype)
    base = load_base(bundle.name, dtype=torch_dtype)
    return StableDiffusionNexusPipeline(**base.components, adapter=adapter, requires_safety_checker=False)


def embedded_clip() -> Path:
    """The folder of the embedded world's CLIP, by which its images are judged, in transformers' layout.

    Its retrieval.json says how well it tells unseen scenes' captions. FileNotFoundError where it is missing.
    """
    return present(WEIGHTS / "clip", "config.json")
