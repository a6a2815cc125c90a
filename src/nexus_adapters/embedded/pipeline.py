"""`load_embedded`: the small Stable Diffusion with one of its adapters, offline and on any CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from nexus_adapters.bases.loading import load_base
from nexus_adapters.bundled import BUNDLED, EMBEDDED, embedded_folder
from nexus_adapters.choices import CONDITION
from nexus_adapters.conditions import EXTRACTORS
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.methods.registry import load_adapter
from nexus_adapters.pipelines import StableDiffusionNexusPipeline

# World -> the name of its base.
_WORLDS = {"scenes": EMBEDDED}


def load_embedded(
    condition: str = CONDITION,
    variant: str = "prime",
    world: str = "scenes",
    torch_dtype: torch.dtype = torch.float32,
) -> StableDiffusionNexusPipeline:
    """Load the embedded Stable Diffusion with a trained Nexus adapter. Never uses the network.

    Args:
        condition: the structure map that the adapter reads. "canny": edges as returned by `extract`.
            "depth": nearness in gray, from black for the background to white for the nearest object.
            "segmentation": each shape in its color from `embedded.maps.SHAPE_COLORS`, on black. "sketch":
            white strokes, one pixel wide, on black.
        variant: the name of an adapter for this condition: "prime" or "slim", and for canny also
            "prime-paper" or "slim-paper".
        world: what the base was trained on: "scenes", which are colored shapes at 128x128 pixels.
        torch_dtype: dtype of the whole pipeline; the weights are stored as float16.

    Returns:
        A pipeline on the CPU. `bundled.guidance_for` returns a suitable guidance scale.

    Raises:
        InvalidArgument: for an unknown world, condition or variant (it lists the known ones), or if
            nexus-adapters-embedded is not installed (it says how to install it).
    """
    if world not in _WORLDS:
        raise InvalidArgument("world", f"one of {', '.join(_WORLDS)}", repr(world))
    bundle = BUNDLED[_WORLDS[world]]
    names = [name for name in bundle.adapters.get(condition, ()) if name != "t2i"]
    if names and variant not in names:
        raise InvalidArgument("variant", f"one of {', '.join(names)} for {condition}", repr(variant))
    adapter = load_adapter(bundle.adapter(variant, condition), dtype=torch_dtype)
    adapter.condition_kind = EXTRACTORS[condition].kind
    base = load_base(bundle.name, dtype=torch_dtype)
    return StableDiffusionNexusPipeline(**base.components, adapter=adapter, requires_safety_checker=False)


def embedded_clip() -> Path:
    """Return the folder of the CLIP that scores images of the embedded world, in transformers format.

    Its retrieval.json contains its accuracy in retrieving the captions of unseen scenes.

    Raises:
        InvalidArgument: if nexus-adapters-embedded is not installed.
    """
    return embedded_folder("clip")
