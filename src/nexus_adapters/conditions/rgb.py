"""From PIL images of any mode to 8-bit RGB."""

import numpy as np
from PIL import Image

from nexus_adapters.errors import InvalidArgument

_GREY_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow reads 16-bit PGM as "I", scaled to 65535
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a PIL image into 8-bit RGB of the same size.

    16-bit grey (modes "I;16..." and "I") is scaled by 255/65535 and rounded; transparent parts are laid on
    white. Color profiles are not applied.

    Raises:
        InvalidArgument: for an object that is not a PIL image, an image without pixels, a mode that is rare
            or of unknown range, such as "F", and for "I" with values outside 0 to 65535.
    """
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise InvalidArgument("image", "a PIL image", kind, "load_image reads files")
    if 0 in image.size:
        raise InvalidArgument("image", "at least one pixel", f"{image.width}x{image.height}")
    if image.mode in _GREY_16_BIT:
        return _from_16_bit(image)
    if image.mode not in _EIGHT_BIT:
        known = ", ".join((*_EIGHT_BIT, *_GREY_16_BIT))
        raise InvalidArgument("image", f"a PIL mode among {known}", repr(image.mode))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is less than opaque, so that `to_rgb` lets white show through."""
    if not image.has_transparency_data:
        return False
    if image.mode in _GREY_16_BIT:
        return bool((np.asarray(image) == image.info["transparency"]).any())
    return bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise InvalidArgument("image", f"values from 0 to 65535 in mode {image.mode!r}", f"{low} to {high}")
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 = 257 * 255, so this is the nearest 8-bit value
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
