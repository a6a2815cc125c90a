"""Reading image files: upright 8-bit RGB, or one clear error."""

import math
import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from nexus_adapters.conditions.rgb import is_transparent, to_rgb

# Named, because Pillow would otherwise try everything it knows, and it hands EPS to an external program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_MEGAPIXEL = 1_000_000


def load_image(
    path: str | os.PathLike[str], max_megapixels: float = 64, argument: str = "path"
) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    The camera's EXIF orientation is applied. Grey, 16-bit (scaled, not clipped), palette and CMYK images are
    converted; transparent parts are laid on white, with a warning. Of an animation the first frame is taken.
    Color profiles are not applied.

    Args:
        path: a file in one of `FORMATS`.
        max_megapixels: larger images are refused before any pixel is decoded. Pillow's own limit, about 179,
            stays in force.
        argument: what errors and warnings call the file, e.g. "--map".

    Returns:
        PIL RGB, detached from the file.

    Raises:
        ValueError: for a missing, empty, non-image or corrupt file, or one over the cap. One line, that names
            `argument`, what was expected and what came.
    """
    if not (math.isfinite(max_megapixels) and max_megapixels > 0):
        raise ValueError(f"max_megapixels: expected a finite number above 0; received {max_megapixels}")
    file = Path(path)
    _check_file(file, argument)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap takes its place
        with _open(file, argument) as image:
            _check_size(image.size, max_megapixels, file, argument)
            upright = _decode(image, file, argument)
    try:
        rgb = to_rgb(upright)
    except ValueError as error:
        raise ValueError(f"{argument}: expected colors or grey; received '{file}' ({error})") from error
    if is_transparent(upright):
        warnings.warn(f"{argument}: transparent parts of '{file}' are laid on white", stacklevel=2)
    return rgb


def _check_file(file: Path, argument: str) -> None:
    expected = f"{argument}: expected an image file; received '{file}'"
    try:
        if not file.exists():
            raise ValueError(f"{expected}, which does not exist")
        if not file.is_file():
            raise ValueError(f"{expected}, which is not a regular file")
        if file.stat().st_size == 0:
            raise ValueError(f"{expected}, which is empty")
        with file.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{expected}, which cannot be read ({error.strerror})") from error


def _open(file: Path, argument: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        expected = f"an image ({', '.join(FORMATS)})"
        raise ValueError(f"{argument}: expected {expected}; received '{file}', which is none") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{argument}: expected a smaller image; received '{file}' ({error})") from error
    # Decoders raise almost anything on damaged bytes: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        raise _corrupt(file, argument, error) from error


def _check_size(size: tuple[int, int], max_megapixels: float, file: Path, argument: str) -> None:
    width, height = size
    megapixels = width * height / _MEGAPIXEL
    if megapixels > max_megapixels:
        raise ValueError(
            f"{argument}: expected an image of at most {max_megapixels:g} megapixels; received '{file}' of "
            f"{width}x{height}, {megapixels:.1f}"
        )


def _decode(image: Image.Image, file: Path, argument: str) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # any kind, as in _open
        raise _corrupt(file, argument, error) from error


def _corrupt(file: Path, argument: str, error: Exception) -> ValueError:
    return ValueError(f"{argument}: expected a readable image; received '{file}', which is corrupt ({error})")
