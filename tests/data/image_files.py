"""Image files of many kinds as bytes: such as have to work, and such as cannot be read."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 24, 16
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def picture(number=0, width=WIDTH, height=HEIGHT):
    """A smooth picture of its own; every number gives another one."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * 5 + number * 37) % 256, (y * 7 + number * 11) % 256, (x + y + number) % 256]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def exif(orientation):
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks):
    """A PNG of any size by its header, with these chunks behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)


def png_with_a_chunk_at_the_end(kind, body):
    end = chunk(b"IEND", b"")
    return encoded(picture()).removesuffix(end) + chunk(kind, body) + end


def png_that_is_a_syntax_error():
    """Pixels in two chunks, the second of which has no name."""
    rows = zlib.compress(bytes(HEIGHT * (1 + 3 * WIDTH)))
    second = chunk(b"IDAT", rows[9:]).replace(b"IDAT", b"\0\1\2\3")
    return png(WIDTH, HEIGHT, chunk(b"IDAT", rows[:9]), second, chunk(b"IEND", b""))


def _good():
    colors = Image.fromarray(PIXELS)
    grey16 = Image.fromarray((np.arange(HEIGHT * WIDTH, dtype=np.uint16) * 160).reshape(HEIGHT, WIDTH))
    alpha = colors.convert("RGBA")
    alpha.putalpha(Image.new("L", alpha.size, 100))
    return {
        "cmyk.jpg": encoded(colors.convert("CMYK"), "JPEG"),
        "16-bit.png": encoded(grey16),
        "alpha.png": encoded(alpha),
        "palette.png": encoded(colors.convert("P")),
        "rotated.jpg": encoded(colors, "JPEG", exif=exif(6)),
        "grey.png": encoded(colors.convert("L")),
    }


def _damaged():
    whole = encoded(Image.fromarray(PIXELS))
    end = chunk(b"IEND", b"")
    return {
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": encoded(Image.fromarray(PIXELS), "JPEG")[:300],
        "empty.png": b"",
        "text.jpg": b"<html><body>404 Not Found</body></html>\n" * 20,
        "bomb.png": png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(9))), end),
        "too-large.png": png(9_000, 9_000, chunk(b"IDAT", zlib.compress(bytes(9))), end),
        "wrong-extension.png": b"%PDF-1.7\n" + bytes(range(256)) * 4,
        "zero-size.png": png(0, 16, chunk(b"IDAT", zlib.compress(b"")), end),
        "random.jpg": np.random.default_rng(1).bytes(2000),
        "syntax-error.png": png_that_is_a_syntax_error(),
        "missing.png": None,
    }


GOOD, DAMAGED = _good(), _damaged()
