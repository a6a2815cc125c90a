"""From a photo to a structure map: the extractors by name, and reading images.

A structure map is a PIL RGB image. Maps of lines are white on black.
"""

from nexus_adapters.conditions.canny import canny
from nexus_adapters.conditions.extractor import Extractor
from nexus_adapters.conditions.images import load_image
from nexus_adapters.conditions.polarity import invert, looks_inverted
from nexus_adapters.conditions.rgb import to_rgb
from nexus_adapters.conditions.sketch import sketch
from nexus_adapters.conditions.table import EXTRACTORS, extract, find_extractor, register_condition

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "canny",
    "extract",
    "find_extractor",
    "invert",
    "load_image",
    "looks_inverted",
    "register_condition",
    "sketch",
    "to_rgb",
]
