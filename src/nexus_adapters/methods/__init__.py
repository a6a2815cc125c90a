"""The methods, one file each. Everything that depends on an adapter's kind is here."""

from importlib import import_module

from nexus_adapters.methods.cost import Cost
from nexus_adapters.methods.method import AdapterOptions, GenerationSettings, Method
from nexus_adapters.methods.registry import (
    METHODS,
    find_method,
    known_methods,
    load_adapter,
    load_saved,
    method_for,
    method_of,
    register_method,
)

__all__ = [
    "METHODS",
    "AdapterOptions",
    "Cost",
    "GenerationSettings",
    "Method",
    "find_method",
    "known_methods",
    "load_adapter",
    "load_saved",
    "method_for",
    "method_of",
    "register_method",
]

for _name in ("nexus", "t2i", "controlnet", "controlnet_xs"):  # each registers itself, in the order of tables
    import_module(f"{__name__}.{_name}")
