"""T2I-Adapter (arXiv 2302.08453), in diffusers' class: a small network that does not read the prompt."""

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

# diffusers' adapter types, and the number of poolings before each stage.
_POOLS: dict[str, tuple[int, ...]] = {"full_adapter": (0, 1, 1, 1), "full_adapter_xl": (0, 0, 1, 0)}


@dataclass(frozen=True)
class T2IOptions(AdapterOptions):
    """The `[adapter]` section for a T2I-Adapter."""

    noise_exponent: float | None = None
    """In each step, features are multiplied by the noise's share of the latents' variance to this power.
    Default: the value of the adapter in `start_from`, else 0."""

    def __post_init__(self) -> None:
        """Check the exponent."""
        if self.noise_exponent is not None:
            check_noise_exponent(self.noise_exponent)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the network and its training, in a canonical form."""
        found = super().identity()
        if self.noise_exponent is None and not self.start_from:  # else that adapter decides
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
        """Build a `T2IAdapter` for the base's shapes, if diffusers supports them."""
        geometry = base_geometry(base)
        pools = tuple(int(pool) for pool in geometry["pools"])
        kinds = {pools: name for name, pools in _POOLS.items()}
        known = " or ".join(map(str, kinds))
        expected = f"a base whose T2I-Adapter has the poolings {known}, for method {self.name}"
        expect(pools in kinds, "base", expected, f"a base with the poolings {pools}")
        t2i: Any = T2IAdapter(
            in_channels=3,
            channels=list(geometry["channels"]),
            num_res_blocks=2,
            downscale_factor=geometry["unshuffle"],
            adapter_type=kinds[pools],
        )
        if options.noise_exponent:  # diffusers keeps unknown config keys, and `Control` reads this one
            t2i.register_to_config(noise_exponent=options.noise_exponent)
        built: nn.Module = t2i
        return built

    def recognizes(self, saved: Saved) -> bool:
        """Recognize diffusers' folders, files as first published, and a run's checkpoints."""
        if saved.run or saved.class_name:
            return super().recognizes(saved)
        names = tensor_names(saved)
        if not names:  # `load` reports what is wrong with it
            return True
        is_adapter = any(name.startswith("adapter.body.") for name in names)
        return is_adapter and not any(".cross_attention." in name for name in names)

    def load(self, saved: Saved) -> nn.Module:
        """Load a `T2IAdapter`, also from a file as first published."""
        t2i: Any = load_t2i(saved)
        exponent = _trained_exponent(saved)
        if exponent:
            t2i.register_to_config(noise_exponent=exponent)
        built: nn.Module = t2i
        return built

    def starting_tensors(self, module: Any, saved: Saved) -> dict[str, Tensor]:
        """Return all tensors of another T2I-Adapter; a one-channel stem is expanded if needed."""
        if not self.recognizes(saved):
            return super().starting_tensors(module, saved)  # raises
        theirs = stem_fitted(load_with(self, saved), module, saved.source)
        return matching_tensors(module, theirs, saved.source)

    def adopt(self, options: T2IOptions, saved: Saved) -> T2IOptions:
        """Take over the noise exponent of a saved T2I-Adapter, unless the options set it."""
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
        """Generate with diffusers' own pipeline, or with `attach` for what it does not support.

        These are a noise exponent, the policy "cond_only", and an adapter whose dtype differs from the
        base's.
        """
        own = settings.noise_exponent
        exponent = module.config.get("noise_exponent", 0.0) if own is None else own
        # It reads no text, so "per_branch" is the same as "positive".
        policy = "positive" if settings.policy == "per_branch" else settings.policy
        reads = settings.adapter_prompts is not None  # rejected there
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
    """Return the noise exponent in the config, or in the run's recipe for a checkpoint without a config."""
    in_recipe = saved.run.get("adapter", {}).get("noise_exponent")
    return saved.config.get("noise_exponent") or in_recipe or 0.0


def _has_pipeline(pipe: Any) -> bool:
    """Return whether diffusers has a T2I-Adapter pipeline for the base: Stable Diffusion 1.x, 2.x and XL."""
    return hasattr(pipe, "unet") and hasattr(pipe, "vae")


register_method(T2IMethod("t2i"))
