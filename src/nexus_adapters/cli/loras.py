"""LoRA weights, in addition to the adapters."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import file_sha256


def check_loras(paths: Sequence[str]) -> None:
    """Before anything is loaded: check that peft is installed and the files exist."""
    if not paths:
        return
    has_peft = find_spec("peft") is not None
    hint = "Run pip install 'nexus-adapters[lora]'"
    expect(has_peft, "--lora", "an installation with peft", "none", hint)
    for path in paths:
        is_there = Path(path).exists() or "/" in path
        expect(is_there, "--lora", "a file, a folder or a Hub id", f"'{path}', which does not exist")


def load_loras(pipe: Any, paths: Sequence[str], scales: Sequence[float] | None) -> None:
    """Load each under a name of its own, with its scale. `InvalidArgument` names what cannot be loaded."""
    names = [f"lora{place}" for place in range(len(paths))]
    for name, path in zip(names, paths, strict=True):
        given = Path(path)
        source = (str(given.parent), {"weight_name": given.name}) if given.is_file() else (path, {})
        try:
            pipe.load_lora_weights(source[0], adapter_name=name, **source[1])
        except Exception as error:  # of any kind: diffusers, peft, safetensors and the Hub have their own
            reason = one_line(error)
            raise InvalidArgument(
                "--lora", "LoRA weights for the base", f"'{path}' ({type(error).__name__}: {reason})"
            ) from error
        listed = pipe.get_list_adapters()
        expect(
            any(name in found for found in listed.values()),
            "--lora",
            "LoRA weights for the base",
            f"'{path}'",
        )
    if names:
        pipe.set_adapters(names, _scales(names, scales))


def lora_settings(paths: Sequence[str], scales: Sequence[float] | None) -> list[dict[str, Any]]:
    """What was loaded, and how strong."""
    return [
        {"path": path, "scale": scale, "sha256": _sha256(Path(path))}
        for path, scale in zip(paths, _scales(paths, scales), strict=True)
    ]


def _scales(paths: Sequence[str], scales: Sequence[float] | None) -> list[float]:
    given = list(scales or [1.0])
    return given * len(paths) if len(given) == 1 else given


def _sha256(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
