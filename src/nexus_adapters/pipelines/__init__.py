"""Stock pipelines with a Nexus adapter as one of their parts."""

from nexus_adapters.pipelines.stable_diffusion import (
    StableDiffusionNexusPipeline,
    StableDiffusionXLNexusPipeline,
)

__all__ = ["StableDiffusionNexusPipeline", "StableDiffusionXLNexusPipeline"]
