"""Extract structure maps from images: the extractors by name, and functions to read images.

A structure map is a PIL RGB image. Line maps are white on black.
"""

from nexus_adapters.conditions.canny import canny
from nexus_adapters.conditions.extractor import Extractor
from nexus_adapters.conditions.extractors import EXTRACTORS, extract, find_extractor, register_condition
from nexus_adapters.conditions.images import invert, load_as_stored, load_image, looks_inverted, to_rgb
from nexus_adapters.conditions.maps import read_map
from nexus_adapters.conditions.sketch import sketch

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "canny",
    "extract",
    "find_extractor",
    "invert",
    "load_as_stored",
    "load_image",
    "looks_inverted",
    "read_map",
    "register_condition",
    "sketch",
    "to_rgb",
]
