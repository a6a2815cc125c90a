"""The small Stable Diffusion and the adapters that come with the package: loaded offline, for any CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from diffusers.models.adapter import T2IAdapter
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import nn

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.pipelines import StableDiffusionNexusPipeline

# base/ is a pipeline in diffusers' layout, clip/ a model of transformers, <condition>/<method>/ an adapter
# each; all of it fp16 safetensors.
WEIGHTS = Path(__file__).parent / "weights"

# The adapters of each condition. "t2i" is diffusers' T2IAdapter, the peer; "prime" and "slim" are the paper's
# form, "-residual" the one with a skip around the attention and eight heads, which every condition has.
METHODS: dict[str, tuple[str, ...]] = {
    "canny": ("t2i", "prime", "slim", "prime-residual", "slim-residual"),
    "depth": ("prime-residual", "slim-residual"),
    "segmentation": ("prime-residual", "slim-residual"),
    "sketch": ("prime-residual", "slim-residual"),
}

# Which form of each variant users get, and of which training each adapter is: benchmarks/chosen.py.
BETTER_FORM = {"prime": "prime-residual", "slim": "slim-residual"}

EMBEDDED_GUIDANCE = 2.0  # what suits the embedded base: benchmarks/guidance.py


def load_embedded(
    condition: str = "canny", variant: str = "prime", torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionNexusPipeline:
    """The embedded Stable Diffusion (128x128 pixels) with a trained Nexus adapter. Never uses the network.

    Args:
        condition: what the adapter was trained on, one of `METHODS`: "canny", edges as `extract` draws them;
            "depth", nearness in grey, from the background's black to the nearest object's white;
            "segmentation", each shape in its color of `scenes.maps.SHAPE_COLORS`, on black; "sketch", white
            strokes of one pixel on black.
        variant: "prime" or "slim", each in the form that measured better (`BETTER_FORM`).
        torch_dtype: of the whole pipeline; the weights are stored as float16.

    Returns:
        A pipeline on the CPU. `guidance_scale=EMBEDDED_GUIDANCE` suits it better than the stock default.

    Raises:
        ValueError: for an unknown condition or variant; it lists the known ones.
        FileNotFoundError: where the installation lacks the weights.
    """
    embedded_methods(condition)
    if variant not in BETTER_FORM:
        raise ValueError(f"variant: expected one of {', '.join(BETTER_FORM)}; received {variant!r}")
    adapter = embedded_adapter(BETTER_FORM[variant], condition, torch_dtype)
    assert isinstance(adapter, NexusAdapter)
    base = load_embedded_base(torch_dtype)
    return StableDiffusionNexusPipeline(**base.components, adapter=adapter, requires_safety_checker=False)


def load_embedded_base(torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The embedded Stable Diffusion alone, as the stock pipeline. FileNotFoundError where it is missing."""
    folder = _present(WEIGHTS / "base", "model_index.json")
    with no_loading_bars():
        base: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    convert(base, torch_dtype)
    return base


def embedded_adapter(
    method: str, condition: str = "canny", torch_dtype: torch.dtype = torch.float32
) -> NexusAdapter | T2IAdapter:
    """One of the embedded adapters, in eval mode.

    Raises:
        ValueError: for a condition or method that `METHODS` does not have.
        FileNotFoundError: where the installation lacks the weights.
    """
    methods = embedded_methods(condition)
    if method not in methods:
        raise ValueError(f"method: expected one of {', '.join(methods)}; received {method!r}")
    folder = _present(WEIGHTS / condition / method, "config.json")
    kind: Any = T2IAdapter if method == "t2i" else NexusAdapter
    loaded = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    adapter: NexusAdapter | T2IAdapter = nn.Module.to(loaded, torch_dtype)
    return adapter


def embedded_clip() -> Path:
    """The folder of the embedded world's CLIP, by which its pictures are judged, in transformers' layout.

    Its retrieval.json says how well it tells unseen scenes' captions. FileNotFoundError where it is missing.
    """
    return _present(WEIGHTS / "clip", "config.json")


def embedded_methods(condition: str = "canny") -> tuple[str, ...]:
    """The names that `embedded_adapter` takes for a condition; ValueError for an unknown condition."""
    if condition not in METHODS:
        raise ValueError(f"condition: expected one of {', '.join(METHODS)}; received {condition!r}")
    return METHODS[condition]


def convert(pipe: Any, torch_dtype: torch.dtype) -> None:
    """Give all parts of a pipeline one dtype, and its UNet the layout in which a CPU needs less time.

    Loaded without a dtype, some parts keep what is stored and some do not.

    In place of an argument of `from_pretrained`, whose name differs between versions of diffusers.
    """
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            # diffusers' own `to` warns of parts to keep in float32: here none.
            nn.Module.to(part, torch_dtype)
    pipe.unet.to(memory_format=torch.channels_last)  # benchmarks/memory_format.py


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers while they load; afterwards as before."""
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    try:
        for library in shown:
            library.disable_progress_bar()
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _present(folder: Path, file: str) -> Path:
    if not (folder / file).is_file():
        raise FileNotFoundError(
            f"embedded weights: expected {file} in '{folder}'; received none: this installation came without"
        )
    return folder
