"""Folders of models, here or from the Hub, and the weights in them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nexus_adapters.adapter.file_names import WEIGHTS, variant_in_name


def fetch(argument: str, source: str, what: str, files: list[str]) -> Path:
    """The folder `source`, or the one into which these of the Hub's files of that id were put."""
    if Path(source).is_dir():
        return Path(source)
    with refused(argument, source, what):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=files))


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Those that diffusers loads from a model's folder, where others may lie beside them, such as fp16's."""
    stem = WEIGHTS if variant is None else f"{WEIGHTS}.{variant}"
    for pattern in ("safetensors", "bin"):
        for name in (f"{stem}.{pattern}", f"{stem}-*-of-*.{pattern}"):
            if found := sorted(folder.glob(name)):
                return found
    return []


def file_variant(folder: Path) -> str | None:
    """What diffusers calls `variant`, of a model's folder without plain weights; the first of several."""
    if weight_files(folder):
        return None
    return next(map(variant_in_name, sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))), None)


def files_sha256(files: Sequence[Path]) -> str:
    """Hash of the files' contents, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def refused(argument: str, source: str, what: str) -> Iterator[None]:
    """Turn whatever loading raises into a ValueError of one line.

    Of any kind: the Hub's client, safetensors, JSON and torch each have their own, and damaged files bring
    out more. `--debug` shows the original.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{argument}: expected a folder or the Hub id of {what}; received '{source}' "
            f"({type(error).__name__}: {reason})"
        ) from error
