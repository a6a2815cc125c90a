"""From `--base` and `--adapter` to a pipeline and adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import file_sha256, files_sha256

if TYPE_CHECKING:
    import torch

    from nexus_adapters.adapter.saved import Saved
    from nexus_adapters.bases.loading import BaseSource

# Name -> class of diffusers, and what differs from the base's own configuration.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Replace a pipeline's scheduler by the one of this name, with the same noise schedule; None keeps it."""
    if name is None:
        return
    import diffusers

    kind, changes = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **changes)


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
    from nexus_adapters.bases.loading import BaseSource

    return BaseSource(base, config=base_config or "", prediction_type=prediction_type or "")


def load_model(source: "BaseSource", saved: Sequence["Saved"], torch_dtype: "torch.dtype") -> Model:
    """The pipeline and the adapters on the CPU; each adapter is loaded once, and checked before the base."""
    from nexus_adapters.bases.loading import denoiser_files, load_base, open_base
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
