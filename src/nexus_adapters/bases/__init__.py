"""The frozen text-to-image models: one class per family, and functions to load them."""

from nexus_adapters.bases import unet as _unet  # noqa: F401  # registers itself
from nexus_adapters.bases.base import Base, Place
from nexus_adapters.bases.families import BASES, base_of, register_base
from nexus_adapters.bases.loading import BaseSource, load_base, open_base

__all__ = ["BASES", "Base", "BaseSource", "Place", "base_of", "load_base", "open_base", "register_base"]
