"""Damaged images are images or one error: never a traceback, never more pixels than the limit."""

import random

import pytest
from tests.data.image_files import DAMAGED, GOOD, encoded, exif, picture

from nexus_adapters.conditions.images import FORMATS, decode_image
from nexus_adapters.data.samples import BadSample, read_image, read_size
from nexus_adapters.errors import InvalidArgument

KINDS = [kind for kind in FORMATS if kind != "TIFF"]
WHOLE = [
    *(encoded(picture(), kind) for kind in KINDS),
    encoded(picture(), "JPEG", exif=exif(6)),
    encoded(picture(), "PNG", exif=exif(8)),
    encoded(picture(), "WEBP", lossless=True, exif=exif(3)),
    encoded(picture().convert("P"), "GIF", save_all=True, append_images=[picture(1).convert("P")]),
    *GOOD.values(),
    *(content for content in DAMAGED.values() if content),
]


try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    WHOLE.append(encoded(picture(), "HEIF"))


def damaged(seed):
    draw = random.Random(seed)
    content = bytearray(draw.choice(WHOLE))
    for _ in range(draw.choice([1, 1, 2, 4])):
        place = draw.randrange(min(len(content), draw.choice([40, 200, 10**6]))) if content else 0
        kind = draw.randrange(5)
        if kind == 0:
            del content[place:]
        elif kind == 1 and content:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 2:  # numbers at their limits
            content[place : place + 4] = draw.choice(
                [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"]
            )
        elif kind == 3:
            content[place : place + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        else:
            content[place:place] = draw.choice(WHOLE)[:place]
    return bytes(content)


def check(content, file):
    """The error, which names the file in one line; None for an image."""
    for given in (content, file):
        try:
            image = decode_image(given, max_megapixels=1.0, argument="image", name="a.png")
            assert image.mode == "RGB"
            assert image.width * image.height <= 10**6
        except InvalidArgument as error:
            assert (error.name, "\n" in str(error)) == ("image", False)  # noqa: PT017  # either is right
            assert "a.png" in str(error)  # noqa: PT017
    try:
        assert read_size(content, "image", "a.png") == read_image(content, "image", "a.png").size
    except BadSample as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "seeds", [range(250), pytest.param(range(250, 8000), marks=pytest.mark.full)], ids=str
)
def test_damaged_images_are_images_or_one_error(tmp_path, seeds):
    outcomes = []
    for seed in seeds:
        content = damaged(seed)
        (tmp_path / "a.png").write_bytes(content)
        try:
            outcomes.append(check(content, tmp_path / "a.png"))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert 0.1 < outcomes.count(None) / len(outcomes) < 0.9  # the damage is neither harmless nor total
