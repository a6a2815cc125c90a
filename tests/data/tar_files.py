"""Tars in WebDataset's layout."""

import io
import tarfile

from tests.data.image_files import encoded, picture


def tar(members):
    """The bytes of a tar of these (name, content)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def members(numbers, width=24, height=16):
    """A picture, a map and a caption for each number."""
    return [
        member
        for number in numbers
        for member in [
            (f"{number:05d}.jpg", encoded(picture(number, width, height))),
            (f"{number:05d}.canny.png", encoded(picture(100 + number, width, height))),
            (f"{number:05d}.txt", f"picture {number}\n".encode()),
        ]
    ]
