"""Shared by Nexus and T2I-Adapters, which run once per image and add features at a base's places."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.adapter.tensors import stem_for_colors
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.families import base_of
from nexus_adapters.data.batch import Batch
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.injection import Control, attach
from nexus_adapters.injection.compatibility import (
    check_fit,
    check_geometry,
    check_pixels,
    geometry_of_config,
)
from nexus_adapters.injection.features import scaled_rows
from nexus_adapters.methods.cost import Cost, counted_gmacs, example, parameter_count, skeleton
from nexus_adapters.methods.method import (
    FEATURES,
    Generate,
    GenerationSettings,
    Method,
    inner,
)


class FeatureMethod(Method):
    """A method whose adapter turns a condition, and possibly the prompt embeddings, into features."""

    attaches = True
    settings = frozenset({"scale", "policy", "level_scales", "noise_exponent"})

    def check_fit(self, module: nn.Module, base: Base) -> None:
        """Check number, widths and strides of the features, the text width, and the pixels per latent."""
        check_fit(module, base)
        check_pixels(module, base, base.pixels_per_latent)

    def check_saved(self, saved: Saved, base: Base) -> None:
        """Check the same as `check_fit`, except the pixels per latent."""
        if (found := geometry_of_config(saved.config)) is not None:
            check_geometry(found, base)

    def inputs(self, condition: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of the adapter's `forward`."""
        return (condition, prompt_embeds) if self.reads_prompt else (condition,)

    def denoiser_arguments(
        self,
        module: nn.Module | Any,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        base: Base,
    ) -> dict[str, Any]:
        """Return the features, computed as in generation."""
        features = module(*self.inputs(batch.condition, batch.prompt_embeds))
        scale = batch.has_condition.to(noisy.dtype)
        exponent = inner(module).config.get("noise_exponent") or 0.0
        if exponent:
            scale = scale * base.noise_factors(t, exponent).to(noisy.dtype)
        return {FEATURES: scaled_rows(features, scale=scale, like=noisy)}

    @contextmanager
    def generating(
        self, pipe: Any, module: nn.Module, conditions: Sequence[Image.Image], settings: GenerationSettings
    ) -> Iterator[Generate]:
        """Generate with the base's own pipeline, with the adapter attached."""
        if settings.adapter_prompts is not None and not self.reads_prompt:
            raise InvalidArgument(
                "adapter_prompts",
                f"None for a {self.label}, which does not read the prompt",
                len(settings.adapter_prompts),
            )
        control = Control(
            module,
            list(conditions),
            scale=settings.scale,
            policy=settings.policy,
            level_scales=settings.level_scales,
            noise_exponent=settings.noise_exponent,
            invert=False,  # samples are read by `fit_sample`
        )
        with reading(module, pipe, settings.adapter_prompts), attach(pipe, control):
            yield pipe

    def cost(self, module: nn.Module, base: Base, size: int, steps: int) -> Cost:
        """Count the cost, which is once per image."""
        shapes, copy = example(base, size), skeleton(module)
        run = self.inputs(shapes.condition, shapes.text)
        return Cost(parameter_count(module), gmacs_once=counted_gmacs(lambda: copy(*run)))


@contextmanager
def reading(module: nn.Module, pipe: Any, prompts: Sequence[str] | None) -> Iterator[None]:
    """Make an adapter read `prompts` instead of the prompts that it is given; None changes nothing."""
    if prompts is None:
        yield
        return
    base, _ = base_of(pipe)
    if any(prompts):
        text = base.encode_prompts(prompts)["prompt_embeds"]
    else:  # as in the unconditional branch
        text = base.encode_empty_prompt()["prompt_embeds"].expand(len(prompts), -1, -1)

    def swap(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], text.to(args[1])

    handle = module.register_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def stem_fitted(adapter: Any, module: Any, source: str) -> dict[str, Tensor]:
    """Return an adapter's tensors to initialize `module`, which may read three channels instead of one.

    A one-channel stem is then expanded, with a warning.
    """
    tensors = dict(adapter.state_dict())
    channels, stem = module.config["in_channels"], "adapter.conv_in.weight"
    if adapter.config["in_channels"] == 1 and channels > 1 and stem in tensors:
        tensors[stem] = stem_for_colors(tensors[stem], channels)
        warnings.warn(
            f"start_from: '{source}' reads 1 channel; its stem is expanded to {channels}, which gives the "
            "same output on gray maps",
            UserWarning,
            stacklevel=2,
        )
    return tensors
