"""Nexus adapters: structure-preserving generation for frozen text-to-image diffusion models.

The public names are imported on first use, so importing the package is fast.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_adapters.adapter.blocks import register_block
    from nexus_adapters.adapter.model import NexusAdapter
    from nexus_adapters.bases import load_base, register_base
    from nexus_adapters.conditions import extract, register_condition
    from nexus_adapters.embedded.pipeline import load_embedded
    from nexus_adapters.errors import InvalidArgument
    from nexus_adapters.injection import Control, attach
    from nexus_adapters.methods import load_adapter, register_method
    from nexus_adapters.metrics import register_metric
    from nexus_adapters.pipelines import StableDiffusionNexusPipeline, StableDiffusionXLNexusPipeline

__version__ = "0.1.0.dev0"

__all__ = [
    "Control",
    "InvalidArgument",
    "NexusAdapter",
    "StableDiffusionNexusPipeline",
    "StableDiffusionXLNexusPipeline",
    "__version__",
    "attach",
    "extract",
    "load_adapter",
    "load_base",
    "load_embedded",
    "register_base",
    "register_block",
    "register_condition",
    "register_method",
    "register_metric",
]

_HOME = {
    "NexusAdapter": "nexus_adapters.adapter.model",
    "Control": "nexus_adapters.injection",
    "attach": "nexus_adapters.injection",
    "StableDiffusionNexusPipeline": "nexus_adapters.pipelines",
    "StableDiffusionXLNexusPipeline": "nexus_adapters.pipelines",
    "extract": "nexus_adapters.conditions",
    "InvalidArgument": "nexus_adapters.errors",
    "load_adapter": "nexus_adapters.methods",
    "load_base": "nexus_adapters.bases",
    "load_embedded": "nexus_adapters.embedded.pipeline",
    "register_base": "nexus_adapters.bases",
    "register_block": "nexus_adapters.adapter.blocks",
    "register_condition": "nexus_adapters.conditions",
    "register_method": "nexus_adapters.methods",
    "register_metric": "nexus_adapters.metrics",
    # diffusers looks this up in a third-party model's module when it loads a saved pipeline.
    "ModelMixin": "diffusers",
    # Redirected here from diffusers, so that its table includes our pipelines: see `_register_in_diffusers`.
    "AutoPipelineForText2Image": "nexus_adapters.pipelines",
}

if not TYPE_CHECKING:  # type checkers use the imports above, and so report names that do not exist

    def __getattr__(name: str) -> object:
        """Import a public name from its module on first use (PEP 562) and cache it."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_in_diffusers() -> None:
    """If diffusers is already imported, let it find our pipelines, which it looks up in its own namespace.

    diffusers imports its classes lazily from its submodules. This package is registered as one of them, so
    nothing is imported yet. The AutoPipelines have a table of classes instead: if they are already imported,
    or diffusers is imported later, `nexus_adapters.pipelines` registers the classes.
    """
    diffusers = sys.modules.get("diffusers")
    homes = getattr(diffusers, "_class_to_module", None)
    if homes is not None:
        sys.modules.setdefault("diffusers.nexus_adapters", sys.modules[__name__])
        homes |= {
            name: "nexus_adapters" for name, home in _HOME.items() if home == "nexus_adapters.pipelines"
        }
    if "diffusers.pipelines.auto_pipeline" in sys.modules:
        import_module("nexus_adapters.pipelines")


_register_in_diffusers()
