"""From `--base` and `--adapter` to a pipeline and adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import files_sha256

if TYPE_CHECKING:
    import torch

    from nexus_adapters.adapter.saved import Saved
    from nexus_adapters.bases.source import BaseSource

DEFAULT_ADAPTER = "prime"


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, and its name in the settings. `sha256`: of its tensors."""

    adapter: Any
    name: str
    sha256: str


@dataclass(frozen=True)
class Model:
    """A stock pipeline, an adapter for each control, and what they were made of, as settings record it."""

    pipe: Any
    base: str
    base_unet_sha256: str
    adapters: Sequence[LoadedAdapter]
    native_size: int


def find_adapters(base: str, adapters: Sequence[tuple[str | None, str]]) -> list["Saved"]:
    """The saved adapters of all controls; nothing slow is imported for it.

    `adapters`: (what --adapter says, what --condition says) of each control.
    """
    if base not in BUNDLED and any(name is None for name, _ in adapters):
        raise InvalidArgument("--adapter", hint=f"Give an adapter that was trained for the base '{base}'")
    from nexus_adapters.adapter.saved import find_saved

    return [find_saved(name or DEFAULT_ADAPTER, condition, base) for name, condition in adapters]


def source_of(base: str, base_config: str | None, prediction_type: str | None) -> "BaseSource":
    """As `load_base` takes it."""
    from nexus_adapters.bases.source import BaseSource

    return BaseSource(base, config=base_config or "", prediction_type=prediction_type or "")


def load_model(source: "BaseSource", saved: Sequence["Saved"], torch_dtype: "torch.dtype") -> Model:
    """The pipeline and the adapters on the CPU; each adapter is loaded once, and checked before the base."""
    from nexus_adapters.bases.source import denoiser_files, load_base, open_base
    from nexus_adapters.methods import load_saved, method_of

    base = open_base(source)
    loaded: dict[tuple[Path, ...], LoadedAdapter] = {}
    for each in saved:
        if each.files not in loaded:
            adapter = load_saved(each, torch_dtype)
            method_of(adapter).check_fit(adapter, base)
            loaded[each.files] = LoadedAdapter(adapter, _name(each, source.path), each.sha256())
    pipe = load_base(source, dtype=torch_dtype)
    sha256 = files_sha256(denoiser_files(source))
    return Model(pipe, source.path, sha256, [loaded[each.files] for each in saved], base.native_size())


def _name(saved: "Saved", base: str) -> str:
    """What settings call an adapter: with its base, where it is one of the package's."""
    bundle = BUNDLED.get(base)
    return f"{base} {saved.source}" if bundle and bundle.has_adapter(saved.source) else saved.source
