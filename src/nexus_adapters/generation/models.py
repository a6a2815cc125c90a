"""The models of a request: the base with its LoRAs, the adapters of the controls, and the scheduler."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import files_sha256
from nexus_adapters.generation.requests import ACTING, SCHEDULERS, ControlRequest, LoraRequest
from nexus_adapters.packages import check_packages

if TYPE_CHECKING:
    import torch

    from nexus_adapters.adapter.saved import Saved
    from nexus_adapters.bases.loading import BaseSource


# Adapters.


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, its name in the settings, and the SHA-256 of its tensors."""

    adapter: Any
    name: str
    sha256: str


def find_adapters(controls: Sequence[ControlRequest], base: str) -> list["Saved"]:
    """Find the saved adapter of each control, without slow imports."""
    from nexus_adapters.adapter.saved import find_saved

    return [find_saved(control.adapter, control.condition_name, base) for control in controls]


def check_methods(controls: Sequence[ControlRequest], adapters: Sequence["Saved"]) -> None:
    """Raise `InvalidArgument` for options and maps that an adapter with its own pipeline does not support."""
    from nexus_adapters.methods import method_for

    for control, saved in zip(controls, adapters, strict=True):
        method = method_for(saved)
        if method.attaches:
            continue
        label = f"a {method.label}"
        maps = f"{len(controls)} maps with '{saved.source}'"
        expect(len(controls) == 1, "adapter", f"a single map with {label}", maps)
        for name in ACTING:
            value = getattr(control, name)
            is_read = name in method.settings or value == getattr(ControlRequest, name)
            expect(is_read, name, f"no value with {label}, where it has no effect", value)


class AdapterLoader:
    """Loads the adapters of one base, each set of files once.

    Args:
        source: the base, of which only the configs are read.
        dtype: the adapters' dtype.
        device: their device.
    """

    def __init__(self, source: "BaseSource", dtype: "torch.dtype", device: str = "cpu") -> None:
        from nexus_adapters.bases.loading import open_base

        self._base = open_base(source)
        self._path = source.path
        self._dtype = dtype
        self._device = device
        self._loaded: dict[tuple[Path, ...], LoadedAdapter] = {}

    def load(self, saved: Sequence["Saved"]) -> tuple[LoadedAdapter, ...]:
        """Return an adapter for each of `saved`: the same object for the same files.

        Raises:
            InvalidArgument: named "adapter", for an adapter that cannot be loaded or does not fit the base.
        """
        from nexus_adapters.methods import load_saved, method_for, method_of

        new = [each for each in saved if each.files not in self._loaded]
        for each in new:
            method_for(each).check_saved(each, self._base)
        for each in new:
            if each.files not in self._loaded:
                adapter = load_saved(each, self._dtype)
                method_of(adapter).check_fit(adapter, self._base)
                loaded = LoadedAdapter(adapter.to(self._device), self._name(each), each.sha256())
                self._loaded[each.files] = loaded
        return tuple(self._loaded[each.files] for each in saved)

    def native_size(self) -> int:
        """Return the side, in pixels, of the square images that the base was trained on."""
        return self._base.native_size()

    def _name(self, saved: "Saved") -> str:
        """Return the adapter's name in the settings; embedded adapters are prefixed by their base."""
        bundle = BUNDLED.get(self._path)
        is_embedded = bundle is not None and bundle.has_adapter(saved.source)
        return f"{self._path} {saved.source}" if is_embedded else saved.source


# The base.


@dataclass(frozen=True)
class Model:
    """A stock pipeline, an adapter for each control, and their origin, as recorded in the settings.

    Attributes:
        pipe: the pipeline, on its device, with its LoRAs.
        base: the base's source.
        base_unet_sha256: the SHA-256 of the files of its denoiser.
        adapters: an adapter for each control.
        native_size: the side, in pixels, of the square images that the base was trained on.
        scheduler: the base's own scheduler.
        loader: loads further adapters.
    """

    pipe: Any
    base: str
    base_unet_sha256: str
    adapters: tuple[LoadedAdapter, ...]
    native_size: int
    scheduler: Any = field(repr=False)
    loader: AdapterLoader = field(repr=False)

    def with_adapters(self, saved: Sequence["Saved"]) -> Self:
        """Return the same base with these adapters, one for each control. The base is shared."""
        return replace(self, adapters=self.loader.load(saved))


def load_model(
    source: "BaseSource",
    saved: Sequence["Saved"],
    dtype: "torch.dtype",
    device: str = "cpu",
    loras: Sequence[LoraRequest] = (),
) -> Model:
    """Load the pipeline with its LoRAs, and the adapters. Adapters are checked before the base is loaded."""
    from nexus_adapters.bases.loading import denoiser_files, load_base

    loader = AdapterLoader(source, dtype, device)
    adapters = loader.load(saved)
    pipe = load_base(source, dtype=dtype)
    sha256 = files_sha256(denoiser_files(source))
    load_loras(pipe, loras)
    if device != "cpu":  # already there; diffusers would also warn that float16 fails there: it works
        pipe.to(device)
    return Model(pipe, source.path, sha256, adapters, loader.native_size(), pipe.scheduler, loader)


def choose_device(device: str) -> str:
    """Return `device`, or for "auto" the first available of cuda, mps and cpu.

    Raises:
        InvalidArgument: named "device", if the device is not available.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, is_there in available.items() if is_there]
    if device == "auto":
        return present[0]
    expect(device in present, "device", f"an available device ({', '.join(present)})", device)
    return device


# Schedulers.


def build_scheduler(base: Any, name: str | None, steps: int) -> Any:
    """Return the scheduler of this name in `SCHEDULERS` with the noise schedule of `base`, a scheduler.

    Args:
        base: the base's own scheduler.
        name: None for a copy of `base`.
        steps: the number of steps that will be set.

    Raises:
        InvalidArgument: named "steps", for a number of steps that the scheduler does not support.
    """
    if name is None:
        scheduler = copy(base)
    else:
        import diffusers

        kind, changes = SCHEDULERS[name]
        scheduler = getattr(diffusers, kind).from_config(base.config, **changes)
    check_schedule(scheduler, steps)
    return scheduler


def check_schedule(scheduler: Any, steps: int) -> None:
    """Raise `InvalidArgument` for a number of steps that the scheduler does not support.

    The error names the nearest supported number.
    """
    if _takes_steps(scheduler, steps):
        return
    by_distance = sorted(range(1, scheduler.config.num_train_timesteps + 1), key=lambda n: abs(n - steps))
    nearest = next((n for n in by_distance if _takes_steps(scheduler, n)), None)
    bound = "" if nearest is None else f", {'at least' if nearest > steps else 'at most'} {nearest}"
    expected = f"a number of steps that {type(scheduler).__name__} supports with the base's schedule{bound}"
    raise InvalidArgument("steps", expected, steps)


def _takes_steps(scheduler: Any, steps: int) -> bool:
    """Return whether the steps begin within the training timesteps, and no step has length zero."""
    try:
        scheduler.set_timesteps(steps)
    except Exception:  # PNDM and LCM raise whatever their arithmetic raises
        return False
    timesteps, trained = scheduler.timesteps, scheduler.config.num_train_timesteps
    is_tabled = hasattr(scheduler, "alphas_cumprod")  # flow matching may begin at num_train_timesteps
    begins_within = not is_tabled or float(timesteps[0]) <= trained - 1
    if not begins_within or "solver_order" not in scheduler.config:
        return begins_within
    return len(scheduler.sigmas.unique()) == len(scheduler.sigmas)  # solvers divide by the step length


# LoRA.


def check_loras(loras: Sequence[LoraRequest]) -> None:
    """Check, before anything is loaded, that peft is installed and the files exist."""
    if not loras:
        return
    check_packages("lora", "peft")
    for lora in loras:
        expect(lora.path != "", "lora", "a file, a folder or a Hub id", "an empty string")
        is_there = Path(lora.path).exists() or "/" in lora.path
        missing = f"'{lora.path}', which does not exist"
        expect(is_there, "lora", "a file, a folder or a Hub id", missing)


def load_loras(pipe: Any, loras: Sequence[LoraRequest]) -> None:
    """Load each LoRA under its own name, with its scale. `InvalidArgument` names one that fails to load."""
    names = [f"lora{place}" for place in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        given = Path(lora.path)
        source = (str(given.parent), {"weight_name": given.name}) if given.is_file() else (lora.path, {})
        expected = "LoRA weights for the base"
        try:
            pipe.load_lora_weights(source[0], adapter_name=name, **source[1])
        except Exception as error:  # diffusers, peft, safetensors and the Hub raise errors of many kinds
            received = f"'{lora.path}' ({type(error).__name__}: {one_line(error)})"
            raise InvalidArgument("lora", expected, received) from error
        is_used = any(name in found for found in pipe.get_list_adapters().values())
        expect(is_used, "lora", expected, f"'{lora.path}'")
    if names:
        pipe.set_adapters(names, [lora.scale for lora in loras])
