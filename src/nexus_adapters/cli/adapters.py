"""From `--adapter` to an adapter: embedded, in a folder, or on the Hub; Nexus or T2I."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_adapters.cli.checks import expect, expect_source
from nexus_adapters.cli.saved_adapter import CONFIG, read_saved_adapter
from nexus_adapters.cli.sources import fetch, file_variant, files_sha256, refused, weight_files

EMBEDDED = "embedded"  # what settings call the base and the adapters that come with the package
_VARIANTS = ("prime", "slim")
_ADAPTER = "a saved NexusAdapter or T2IAdapter"
_ADAPTER_FILES = ["config.json", "diffusion_pytorch_model*"]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, and what settings call it."""

    adapter: Any
    name: str
    sha256: str


def check_adapter(base: str | None, adapter: str | None) -> None:
    """What can be said of an `--adapter` before anything is imported or fetched."""
    if adapter is None or (base is None and adapter in _VARIANTS):
        return  # embedded
    # Not a Hub id, all of which have an owner now.
    is_name = "/" not in adapter and not Path(adapter).exists()
    received = f"'{adapter}'" if base is None else f"'{adapter}' beside --base"
    expected = f"a folder, a Hub id, or without --base one of {', '.join(_VARIANTS)}"
    expect(not is_name, "--adapter", expected, received)
    expect_source("--adapter", adapter, "config.json", _ADAPTER)


def load_adapter(name: str | None, condition: str) -> LoadedAdapter:
    """The adapter of `load_model`'s name."""
    from diffusers import T2IAdapter

    from nexus_adapters import embedded
    from nexus_adapters.adapter.model import NexusAdapter

    if name is None or name in _VARIANTS:
        method = embedded.BETTER_FORM[name or "prime"]
        ours = embedded.embedded_adapter(method, condition)
        sha256 = read_saved_adapter(embedded.WEIGHTS / condition / method).sha256()
        return LoadedAdapter(ours, f"{EMBEDDED} {method}", sha256)
    folder = fetch("--adapter", name, _ADAPTER, _ADAPTER_FILES)
    if _class_name(folder) == "T2IAdapter":
        with refused("--adapter", name, _ADAPTER):
            kind: Any = T2IAdapter
            t2i = kind.from_pretrained(folder, local_files_only=True, variant=file_variant(folder))
        return LoadedAdapter(t2i.eval(), name, files_sha256(weight_files(folder, file_variant(folder))))
    saved = read_saved_adapter(folder, "--adapter")
    with refused("--adapter", name, _ADAPTER):
        nexus = NexusAdapter.from_pretrained(
            folder, local_files_only=True, variant=saved.file_variant, use_safetensors=True
        )
    return LoadedAdapter(nexus, name, saved.sha256())


def _class_name(folder: Path) -> object:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None  # `read_saved_adapter` says what is wrong
    return config.get("_class_name") if isinstance(config, dict) else None
