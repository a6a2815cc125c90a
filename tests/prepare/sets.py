"""Small sources and what lies in a prepared set."""

import hashlib
import io
import json
import tarfile
from functools import partial

from PIL import Image
from tests.data.image_files import encoded, picture

from nexus_adapters.prepare.engines import run_local
from nexus_adapters.prepare.run import prepare


def write_folder(path, count=20, width=40, height=32):
    """Pictures with a caption each."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (path / f"{number:03d}.png").write_bytes(encoded(picture(number, width, height)))
        (path / f"{number:03d}.txt").write_text(f"picture {number}")
    return path


def make(plan, out, workers=1):
    return prepare(plan, out, partial(run_local, workers=workers))


def digests(folder):
    """SHA-256 of every file, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def samples(folder):
    """Key -> extension -> content of all samples, in order."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def image(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def index(folder):
    return json.loads((folder / "index.json").read_text())


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
