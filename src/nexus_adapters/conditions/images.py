"""Read images from files or bytes as 8-bit RGB, and recognize inverted line maps."""

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nexus_adapters.choices import MAX_MEGAPIXELS
from nexus_adapters.conditions.tiff import load_tiff
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.packages import install_command

GREY_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow reads 16-bit PGM as "I", scaled to 65535
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image to 8-bit RGB of the same size.

    16-bit gray (modes "I;16..." and "I") is scaled by 255/65535 and rounded; transparent parts become white.
    Color profiles are not applied.

    Raises:
        InvalidArgument: for an object that is not a PIL image, an image without pixels or with a damaged
            file, a mode that is rare or of unknown range, such as "F", mode "I" with values outside 0 to
            65535, and 16-bit gray with values so small that all would become black.
    """
    check_image(image)
    if image.mode in GREY_16_BIT:
        return _from_16_bit(image)
    if image.mode not in _EIGHT_BIT:
        known = ", ".join((*_EIGHT_BIT, *GREY_16_BIT))
        raise InvalidArgument("image", f"a PIL mode among {known}", repr(image.mode))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def check_image(image: object, name: str = "image") -> None:
    """Raise `InvalidArgument` unless `image` is a PIL image with readable pixels."""
    if not isinstance(image, Image.Image):
        raise InvalidArgument(name, "a PIL image", type(image).__name__, "Use load_image to read a file")
    if 0 in image.size:
        raise InvalidArgument(name, "at least one pixel", f"{image.width}x{image.height}")
    try:
        image.load()  # `Image.open` reads only the header
    except Exception as error:  # any kind, as in _open
        raise _corrupt(f"'{getattr(image, 'filename', '') or 'an image'}'", name, error) from error


def is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel is not fully opaque."""
    if not image.has_transparency_data:
        return False
    if image.mode in GREY_16_BIT:
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
    if high > 0 and grey.max() <= 1:
        raise InvalidArgument(
            "image",
            f"16-bit values, in which 65535 is white, in mode {image.mode!r} (0 to 255 needs an 8-bit mode)",
            f"{low} to {high}",
        )
    return Image.fromarray(grey).convert("RGB")


# Lines are sparse: even on pure noise with both thresholds at 0, canny turns only 37% of the pixels white.
# If the mean of a map is above one half, the light part is therefore the background and not the lines.
INVERTED_ABOVE = 0.5


def looks_inverted(condition: Image.Image) -> bool:
    """Return whether a line map is probably dark on white: its mean brightness, in [0, 1], exceeds 0.5.

    Only for line maps (kind "lines"): a depth map may be bright everywhere.
    """
    brightness = np.asarray(to_rgb(condition).convert("L"))
    return float(brightness.mean()) / 255 > INVERTED_ABOVE


def invert(condition: Image.Image) -> Image.Image:
    """Swap light and dark: return RGB of the same size, in which each value v becomes 255 - v."""
    return ImageOps.invert(to_rgb(condition))


# Listed, because Pillow would otherwise try every format it knows, and it passes EPS to an external program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
HEIF_ENDINGS = (".heic", ".heif", ".hif")
"""File name extensions that are read if pillow-heif is installed."""
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
_MEGAPIXEL = 1_000_000

Content = bytes | Path | io.BufferedReader  # the source of an image; a reader is left open


def load_image(
    path: str | os.PathLike[str], max_megapixels: float = MAX_MEGAPIXELS, argument: str = "path"
) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    The camera's EXIF orientation is applied. Gray, 16-bit (scaled, not clipped), palette and CMYK images are
    converted; transparent parts become white, with a warning. The first frame of an animation is used. Color
    profiles are not applied.

    Args:
        path: a file in one of `FORMATS`.
        max_megapixels: larger images are rejected before any pixel is decoded. Pillow's own limit, about 179,
            still applies.
        argument: the name of the file in errors and warnings, such as "--map".

    Returns:
        PIL RGB, detached from the file.

    Raises:
        InvalidArgument: named `argument`, for a file that is missing, empty, not an image, corrupt, or too
            large.
    """
    file = Path(path)
    upright = _decode_upright(file, max_megapixels, argument, None)
    rgb = _to_rgb(upright, _shown(file, None), argument)
    if is_transparent(upright):
        warnings.warn(f"{argument}: transparent parts of '{file}' become white", stacklevel=2)
    return rgb


def decode_image(
    content: Content, max_megapixels: float = MAX_MEGAPIXELS, argument: str = "image", name: str | None = None
) -> Image.Image:
    """Read an image from a file or its content, as `load_image` but without a warning of transparent parts.

    `name` is the content's name in errors; by default, its path or its length.

    Raises:
        InvalidArgument: as `load_image`.
    """
    upright = _decode_upright(content, max_megapixels, argument, name)
    return _to_rgb(upright, _shown(content, name), argument)


def load_as_stored(
    path: str | os.PathLike[str], max_megapixels: float = MAX_MEGAPIXELS, argument: str = "path"
) -> Image.Image:
    """Read an image file as `load_image`, but in the file's own mode, for `read_map`."""
    return _decode_upright(Path(path), max_megapixels, argument, None)


def decode_as_stored(
    content: Content, max_megapixels: float = MAX_MEGAPIXELS, argument: str = "image", name: str | None = None
) -> Image.Image:
    """Read an image as `decode_image`, but in the content's own mode, for `read_map`."""
    return _decode_upright(content, max_megapixels, argument, name)


@contextmanager
def open_image(
    content: Content, max_megapixels: float = MAX_MEGAPIXELS, argument: str = "image", name: str | None = None
) -> Iterator[Image.Image]:
    """Open an image and close it at the end. Only the header is read until its pixels are used.

    Raises:
        InvalidArgument: as `load_image`, except for damage that shows only in decoding.
    """
    if not (math.isfinite(max_megapixels) and max_megapixels > 0):
        raise InvalidArgument("max_megapixels", "a finite number above 0", max_megapixels)
    shown = _shown(content, name)
    if isinstance(content, Path):
        _check_file(content, shown, argument)
    if content == b"":
        raise InvalidArgument(argument, "an image file", f"{shown}, which is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # replaced by our own limit
        with _open(content, shown, argument) as image:
            _check_size(image.size, max_megapixels, shown, argument)
            yield image


def _shown(content: Content, name: str | None) -> str:
    """Return the name of the content in errors."""
    if name is None and isinstance(content, bytes):
        return f"a file of {len(content)} bytes"
    path = content if isinstance(content, Path) else getattr(content, "name", "a stream")
    return f"'{path if name is None else name}'"


def _decode_upright(content: Content, max_megapixels: float, argument: str, name: str | None) -> Image.Image:
    with open_image(content, max_megapixels, argument, name) as image:
        try:
            if image.format == "TIFF":
                return ImageOps.exif_transpose(load_tiff(image))
            image.load()
            return ImageOps.exif_transpose(image)
        except Exception as error:  # any kind, as in _open
            raise _corrupt(_shown(content, name), argument, error) from error


def _to_rgb(upright: Image.Image, shown: str, argument: str) -> Image.Image:
    try:
        return to_rgb(upright)
    except InvalidArgument as error:
        raise InvalidArgument(argument, error.expected, f"{error.received} in {shown}") from error


def _check_file(file: Path, shown: str, argument: str) -> None:
    expected = "an image file"
    try:
        if not file.exists():
            raise InvalidArgument(argument, expected, f"{shown}, which does not exist")
        if not file.is_file():
            raise InvalidArgument(argument, expected, f"{shown}, which is not a regular file")
        if file.stat().st_size == 0:
            raise InvalidArgument(argument, expected, f"{shown}, which is empty")
        with file.open("rb"):
            pass
    except OSError as error:
        received = f"{shown}, which cannot be read ({error.strerror})"
        raise InvalidArgument(argument, expected, received) from error


def image_endings() -> frozenset[str]:
    """Return the file name extensions, in lower case, of images that can be read."""
    known = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    return frozenset((*known, *HEIF_ENDINGS) if find_spec("pillow_heif") else known)


def _is_heif(source: io.BytesIO | io.BufferedReader | Path) -> bool:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            head = stream.read(12)
    else:
        source.seek(0)
        head = source.read(12)
        source.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _open_heif(source: io.BytesIO | io.BufferedReader | Path, shown: str, argument: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise InvalidArgument(
            argument,
            "an image in a supported format",
            f"{shown}, a HEIC image",
            f"Run {install_command('heic', 'pillow_heif')}",
        ) from error
    pillow_heif.register_heif_opener()
    try:
        return Image.open(source, formats=("HEIF",))
    except Exception as error:  # as in _open
        raise _corrupt(shown, argument, error) from error


def _readable() -> list[str]:
    """The formats that the installed Pillow reads; versions before 11.3 have no AVIF."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(content: Content, shown: str, argument: str) -> Image.Image:
    try:
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        return Image.open(source, formats=_readable())
    except UnidentifiedImageError as error:
        if _is_heif(source):
            return _open_heif(source, shown, argument)
        expected = f"an image ({', '.join(_readable())})"
        raise InvalidArgument(argument, expected, f"{shown}, which has none of these formats") from error
    except Image.DecompressionBombError as error:
        raise InvalidArgument(argument, "a smaller image", f"{shown} ({error})") from error
    # Decoders raise almost anything on damaged bytes: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        raise _corrupt(shown, argument, error) from error


def _check_size(size: tuple[int, int], max_megapixels: float, shown: str, argument: str) -> None:
    width, height = size
    megapixels = width * height / _MEGAPIXEL
    if megapixels > max_megapixels:
        expected = f"an image of at most {max_megapixels:g} megapixels"
        raise InvalidArgument(argument, expected, f"{shown}, {width}x{height} ({megapixels:.1f} megapixels)")


def _corrupt(shown: str, argument: str, error: Exception) -> InvalidArgument:
    return InvalidArgument(argument, "a readable image", f"{shown}, which is corrupt ({one_line(error)})")
