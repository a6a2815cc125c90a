"""T2I-Adapter (arXiv 2302.08453), diffusers' class: a small network that never sees the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from diffusers.models.adapter import T2IAdapter
from PIL import Image
from torch import Tensor, nn

from nexus_adapters.adapter.arguments import base_geometry, check_noise_exponent
from nexus_adapters.adapter.saved import Saved, within
from nexus_adapters.adapter.t2i_files import load_t2i
from nexus_adapters.adapter.tensors import tensor_names
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.families import base_of
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.methods.feature_method import FeatureMethod, stem_fitted
from nexus_adapters.methods.method import (
    AdapterOptions,
    Generate,
    GenerationSettings,
    load_with,
    matching_tensors,
    other_pipeline,
)
from nexus_adapters.methods.registry import register_method

# diffusers' adapter types, and before which of their stages they pool.
_POOLS: dict[str, tuple[int, ...]] = {"full_adapter": (0, 1, 1, 1), "full_adapter_xl": (0, 0, 1, 0)}


@dataclass(frozen=True)
class T2IOptions(AdapterOptions):
    """`[adapter]` of a T2I-Adapter."""

    noise_exponent: float | None = None
    """Features times the noise's share of the latents' variance, to this power, in each step. By default 0,
    or what the adapter in `start_from` was trained with."""

    def __post_init__(self) -> None:
        """What one option alone does not show."""
        if self.noise_exponent is not None:
            check_noise_exponent(self.noise_exponent)

    def identity(self) -> dict[str, Any]:
        """What decides the network and its training, the same for two ways to write it."""
        found = super().identity()
        if self.noise_exponent is None and not self.start_from:  # else what that was trained with
            found["noise_exponent"] = 0.0
        return found


class T2IMethod(FeatureMethod):
    """diffusers' `T2IAdapter`."""

    label = "T2I-Adapter"
    Options = T2IOptions
    settings = frozenset({"scale", "policy", "noise_exponent"})  # diffusers' pipeline has no level scales
    reads_prompt = False
    classes = (T2IAdapter,)

    def build(self, base: Base, denoiser: nn.Module, options: T2IOptions) -> nn.Module:
        """Of the base's shapes, where diffusers has a T2I-Adapter of these."""
        geometry = base_geometry(base)
        pools = tuple(int(pool) for pool in geometry["pools"])
        kinds = {pools: name for name, pools in _POOLS.items()}
        expected = f"a base whose T2I-Adapter pools as {' or '.join(map(str, kinds))}, for method {self.name}"
        expect(pools in kinds, "base", expected, f"one that pools as {pools}")
        t2i: Any = T2IAdapter(
            in_channels=3,
            channels=list(geometry["channels"]),
            num_res_blocks=2,
            downscale_factor=geometry["unshuffle"],
            adapter_type=kinds[pools],
        )
        if options.noise_exponent:  # diffusers keeps what it does not know, and `Control` reads it
            t2i.register_to_config(noise_exponent=options.noise_exponent)
        built: nn.Module = t2i
        return built

    def recognizes(self, saved: Saved) -> bool:
        """Diffusers' folders, the files first published, and a run's checkpoint."""
        if saved.run or saved.class_name:
            return super().recognizes(saved)
        names = tensor_names(saved)
        if not names:  # `load` says what is wrong with it
            return True
        is_adapter = any(name.startswith("adapter.body.") for name in names)
        return is_adapter and not any(".cross_attention." in name for name in names)

    def load(self, saved: Saved) -> nn.Module:
        """A `T2IAdapter`, also of a file as first published."""
        t2i: Any = load_t2i(saved)
        exponent = _trained_exponent(saved)
        if exponent:
            t2i.register_to_config(noise_exponent=exponent)
        built: nn.Module = t2i
        return built

    def starting_tensors(self, module: Any, saved: Saved) -> dict[str, Tensor]:
        """All, of another T2I-Adapter; a stem for one channel becomes one for as many as the module reads."""
        if not self.recognizes(saved):
            return super().starting_tensors(module, saved)  # which says so
        theirs = stem_fitted(load_with(self, saved), module, saved.source)
        return matching_tensors(module, theirs, saved.source)

    def adopt(self, options: T2IOptions, saved: Saved) -> T2IOptions:
        """How the features of a saved T2I-Adapter fade, unless the options say."""
        if options.noise_exponent is not None or not self.recognizes(saved):
            return options
        try:
            exponent = check_noise_exponent(_trained_exponent(saved))
        except InvalidArgument as error:
            raise within("start_from", f"a saved {self.label}", saved.source, error) from error
        return replace(options, noise_exponent=exponent)

    @contextmanager
    def generating(
        self, pipe: Any, module: Any, conditions: Sequence[Image.Image], settings: GenerationSettings
    ) -> Iterator[Generate]:
        """Diffusers' own pipeline, or ours for what that does not know.

        These are fading features, `cond_only`, and an adapter of another precision than the base.
        """
        own = settings.noise_exponent
        exponent = module.config.get("noise_exponent", 0.0) if own is None else own
        # It reads no branch's text, so "per_branch" is "positive".
        policy = "positive" if settings.policy == "per_branch" else settings.policy
        reads = settings.adapter_prompts is not None  # which is refused there
        is_converted = next(module.parameters()).dtype != base_of(pipe)[1].dtype
        if reads or exponent or policy == "cond_only" or is_converted or not _has_pipeline(pipe):
            own_settings = replace(settings, policy=policy, level_scales=None)
            with super().generating(pipe, module, conditions, own_settings) as call:
                yield call
            return
        from diffusers import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline

        images = (
            [image.convert("L") for image in conditions] if module.config["in_channels"] == 1 else conditions
        )
        is_xl = hasattr(pipe, "text_encoder_2")
        kind = StableDiffusionXLAdapterPipeline if is_xl else StableDiffusionAdapterPipeline
        controlled = other_pipeline(kind, pipe, adapter=module)

        def generate(*args: Any, **arguments: Any) -> Any:
            given = {"image": list(images), "adapter_conditioning_scale": settings.scale}
            return controlled(*args, **arguments, **given)

        yield generate


def _trained_exponent(saved: Saved) -> Any:
    """Of the config, or where a checkpoint has none of the run's recipe."""
    in_recipe = saved.run.get("adapter", {}).get("noise_exponent")
    return saved.config.get("noise_exponent") or in_recipe or 0.0


def _has_pipeline(pipe: Any) -> bool:
    """Whether diffusers has a T2I-Adapter pipeline for a base: Stable Diffusion 1.x, 2.x and XL."""
    return hasattr(pipe, "unet") and hasattr(pipe, "vae")


register_method(T2IMethod("t2i"))
