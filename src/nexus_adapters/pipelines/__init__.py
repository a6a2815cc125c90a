"""Stock pipelines with a Nexus adapter as one of their parts."""

import diffusers

from nexus_adapters.library_logs import logs_hidden

with logs_hidden():  # transformers logs while diffusers imports its pipelines
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image as AutoPipelineForText2Image

    from nexus_adapters.pipelines.stable_diffusion import (
        StableDiffusionNexusPipeline,
        StableDiffusionXLNexusPipeline,
    )

__all__ = ["StableDiffusionNexusPipeline", "StableDiffusionXLNexusPipeline"]

# `DiffusionPipeline.from_pretrained` looks up a saved pipeline's class in diffusers itself, and
# `AutoPipelineForText2Image` in a table.
for _kind in (StableDiffusionNexusPipeline, StableDiffusionXLNexusPipeline):
    setattr(diffusers, _kind.__name__, _kind)
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING.setdefault(f"nexus-{_kind.stock.__name__}", _kind)
