"""Which way round a map of lines is: adapters are trained on white lines on black."""

import numpy as np
from PIL import Image, ImageOps

from nexus_adapters.conditions.rgb import to_rgb

# Lines are sparse: even on pure noise, with both thresholds at 0, canny turns only 37 % of the pixels white.
# In a map whose mean passes one half, the light part is therefore the ground and not the lines.
INVERTED_ABOVE = 0.5


def looks_inverted(condition: Image.Image) -> bool:
    """Whether a map of lines is probably dark on white: its mean brightness, in [0, 1], exceeds 0.5.

    Only for maps of lines (`Extractor.lines`): a depth map may well be bright throughout.
    """
    brightness = np.asarray(to_rgb(condition).convert("L"))
    return float(brightness.mean()) / 255 > INVERTED_ABOVE


def invert(condition: Image.Image) -> Image.Image:
    """Exchange light and dark: RGB of the same size, each value v turned into 255 - v."""
    return ImageOps.invert(to_rgb(condition))
