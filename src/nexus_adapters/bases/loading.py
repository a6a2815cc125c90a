"""Find and load a base: an embedded one, a folder, a Hub id, or a single file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from safetensors import SafetensorError, safe_open
from torch import nn

from nexus_adapters.bases.base import Base
from nexus_adapters.bases.families import base_of, known_families
from nexus_adapters.bases.parts import (
    check_folder,
    check_libraries,
    check_required,
    check_text,
    check_vocabulary,
    file_variant,
    seems_to_be,
    weight_files,
)
from nexus_adapters.bases.vocabulary import warn_of_unknown_words
from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.errors import InvalidArgument, code_hint, one_line
from nexus_adapters.files import read_regular
from nexus_adapters.library_logs import logs_hidden

SINGLE_FILE = ".safetensors"
INDEX = "model_index.json"
_EXPECTED = "a Stable Diffusion pipeline: a folder, a Hub id or a .safetensors file"
_DENOISER = "model.diffusion_model."  # prefix of the denoiser's tensors in a single file
_CONFIG_FILES = ["*.json", "*.txt", "*.model"]  # files that a single-file base needs in addition


@dataclass(frozen=True)
class BaseSource:
    """Where to find a base.

    Attributes:
        path: "embedded" or the name of another bundled base, a folder in diffusers format, a Hub id, or a
            single .safetensors file.
        revision: branch, tag or commit on the Hub; "" for the newest.
        variant: which weights to load if there are several, such as "fp16"; "" for the plain ones, or for the
            only ones in a folder that has no plain ones.
        config: for a single file, a folder or Hub id in diffusers format with its configs and tokenizer (no
            weights are read); "" for diffusers' own default on the Hub.
        prediction_type: for a single file, "epsilon" or "v_prediction", which overrides the config. Required
            for Stable Diffusion 2.x, unless the scheduler in `config` states a prediction_type.
    """

    path: str = EMBEDDED
    revision: str = ""
    variant: str = ""
    config: str = ""
    prediction_type: str = ""

    @property
    def is_bundled(self) -> bool:
        """Whether it is one of the embedded bases."""
        return self.path in BUNDLED

    @property
    def is_file(self) -> bool:
        """Whether it is a single file."""
        return not self.is_bundled and self.path.endswith(SINGLE_FILE)

    @property
    def location(self) -> str:
        """The folder or Hub id, in diffusers format, that has the configs."""
        if self.is_bundled:
            return str(BUNDLED[self.path].folder)
        return _config_of_file(self) if self.is_file else self.path

    def arguments(self, weights: bool = True) -> dict[str, Any]:
        """Return further arguments of diffusers' `from_pretrained`, for example no Hub for folders."""
        if self.is_file:
            return {"local_files_only": True} if Path(self.location).is_dir() else {}
        found: dict[str, Any] = {"revision": self.revision} if self.revision else {}
        if Path(self.location).is_dir():
            found["local_files_only"] = True
        if weights and (variant := self._variant()):
            found["variant"] = variant
        return found

    def _variant(self) -> str | None:
        folder = Path(self.location)
        if self.variant or not folder.is_dir():
            return self.variant or None
        return next(
            (v for f in known_families() if (v := file_variant(folder / f.denoiser_name)) is not None), None
        )


def as_source(source: str | Path | BaseSource) -> BaseSource:
    """Return `source` as a `BaseSource`."""
    return source if isinstance(source, BaseSource) else BaseSource(str(source))


def load_base(
    source: str | Path | BaseSource = EMBEDDED, *, dtype: torch.dtype = torch.float32, **parts: Any
) -> Any:
    """Load a base as its stock text-to-image pipeline, on the CPU, in eval mode.

    Args:
        source: "embedded" (the small Stable Diffusion of nexus-adapters[embedded]), a folder in diffusers
            format, a Hub id, a single .safetensors file, or a `BaseSource` with further settings.
        dtype: of all parts.
        parts: parts that replace the pipeline's own, such as `safety_checker=None`.

    Returns:
        A diffusers pipeline.

    Raises:
        InvalidArgument: named "base", if it does not exist, a part is missing or damaged, or adapters cannot
            be used with it; for "embedded" also if its weights are not installed.
    """
    where = as_source(source)
    open_base(where)
    pipe = load_pipeline(where, dtype, **parts)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            # diffusers' own `to` would warn about parts to keep in float32; there are none here.
            nn.Module.to(part, dtype)
    base, denoiser = base_of(pipe)
    to: Any = denoiser.to  # torch's types do not know a call with only a memory format
    to(memory_format=torch.channels_last)  # benchmarks/memory_format.py
    check_text(base, where.path)
    if where.is_bundled:
        warn_of_unknown_words(pipe, where.path, BUNDLED[where.path].words)
    return pipe


def open_base(source: str | Path | BaseSource) -> Base:
    """Read a base's configs, without its weights.

    Raises:
        InvalidArgument: named "base", if it does not exist, a part of its folder is missing, or adapters
            cannot be used with it.
    """
    where = as_source(source)
    location = where.location
    _check_exists(where)
    index = _read_config(where, "", INDEX)
    folder = Path(location) if Path(location).is_dir() else None
    if folder is not None:
        check_folder(folder, index, where.path, with_weights=not where.is_file)
    check_libraries(index, where.path, _family_of_index(where, index))
    if folder is not None:
        check_vocabulary(folder, where.path)
    for family in known_families():
        name = family.denoiser_name
        if name in index and family.recognizes(config := _read_config(where, name)):
            scheduler = _Scheduler(_scheduler_config(where, index))
            base = family(config, None, scheduler if scheduler.config else None)
            check_required(base, index, where.path)
            base.vae_config = _read_config(where, "vae")
            base.check(where.path)
            part = Path(location) / name
            if where.variant and part.is_dir() and not weight_files(part, where.variant):
                found = f"'{where.path}', which has none for variant {where.variant!r}"
                raise InvalidArgument("base", f"weights of the {name}", found)
            if scheduler.config:
                base.scheduler = base.schedule
            return base
    kinds = ", ".join(dict.fromkeys(family.denoiser_class.__name__ for family in known_families()))
    raise InvalidArgument(
        "base", f"a pipeline with a {kinds}", f"'{where.path}', a {index.get('_class_name')}"
    )


@dataclass(frozen=True)
class _Scheduler:
    """Stands in for a scheduler, of which only the config is needed."""

    config: Mapping[str, Any]


def load_pipeline(source: BaseSource, dtype: torch.dtype, **parts: Any) -> Any:
    """Load the stock pipeline; `parts` replace its own parts (None leaves a part out)."""
    location = source.location
    index = _read_config(source, "", INDEX)
    family = _family_of_index(source, index)
    check_libraries(index, source.path, family)
    kind = family.pipeline_class(index)
    if parts.get("safety_checker", "") is None and "safety_checker" not in index:
        del parts["safety_checker"]
    with quiet_loading(), _refusing(source):
        if source.is_file:
            pipe = kind.from_single_file(
                source.path, config=location, torch_dtype=dtype, **source.arguments(), **parts
            )
        else:
            pipe = kind.from_pretrained(location, torch_dtype=dtype, **source.arguments(), **parts)
    if source.prediction_type:
        pipe.scheduler.register_to_config(prediction_type=source.prediction_type)
    return pipe


def load_denoiser(base: Base, source: BaseSource, device: torch.device, dtype: torch.dtype) -> Any:
    """Load only the base's denoiser, frozen, in eval mode."""
    kind = base.denoiser_class
    given = {"subfolder": base.denoiser_name, "torch_dtype": dtype, **source.arguments()}
    with quiet_loading(), _refusing(source):
        if source.is_file:
            denoiser = kind.from_single_file(source.path, config=source.location, **given)
        else:
            denoiser = kind.from_pretrained(source.location, **given)
    return nn.Module.to(denoiser, device, dtype).requires_grad_(False).eval()


def load_encoders(base: Base, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
    """Load all parts of the base's pipeline except the denoiser, frozen; `base.release()` drops them.

    The VAE is in float32 if its config says that it overflows in float16 (`force_upcast`).
    """
    pipe = load_pipeline(source, dtype, **{base.denoiser_name: None, "safety_checker": None})
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            is_delicate = name == "vae" and pipe.vae.config.get("force_upcast", True)
            nn.Module.to(part, device, torch.float32 if is_delicate else dtype).requires_grad_(False).eval()
    base.pipe, base.scheduler = pipe, pipe.scheduler
    check_text(base, source.path)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bars and misleading logs of diffusers and transformers while they load."""
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    try:
        for library in shown:
            library.disable_progress_bar()
        with logs_hidden():
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def denoiser_files(source: BaseSource) -> list[Path]:
    """Return the local files with the denoiser's weights; for a Hub id, those in the cache."""
    if source.is_file:
        return [Path(source.path)]
    folder = Path(source.location)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        revision = source.revision or None
        folder = Path(snapshot_download(source.path, revision=revision, local_files_only=True))
    for family in known_families():
        part = folder / family.denoiser_name
        if files := weight_files(part, source.variant or file_variant(part)):
            return files
    return []


def _check_exists(source: BaseSource) -> None:
    path = Path(source.path)
    for name, value in (("base_config", source.config), ("prediction_type", source.prediction_type)):
        if value and not source.is_file:
            raise InvalidArgument(name, "no value unless the base is a .safetensors file", repr(value))
    if source.revision and source.is_bundled:
        expected = f"no value for the embedded base {source.path!r}"
        raise InvalidArgument("base_revision", expected, repr(source.revision))
    if source.is_file and not path.is_file():
        raise InvalidArgument("base", "an existing file", f"'{source.path}'")
    if source.is_bundled or source.is_file:
        return
    if path.is_dir() and not (path / INDEX).is_file():
        raise InvalidArgument("base", _EXPECTED, f"'{source.path}', which has no {INDEX}")
    if path.is_file():
        raise InvalidArgument("base", _EXPECTED, f"'{source.path}', a file of another kind")
    if not path.exists() and "/" not in source.path:
        names = ", ".join(BUNDLED)
        raise InvalidArgument(
            "base", _EXPECTED, f"'{source.path}', which does not exist", f"Names of embedded bases: {names}"
        )


def _family_of_index(source: BaseSource, index: Mapping[str, Any]) -> type[Base]:
    for family in known_families():
        if family.denoiser_name in index and family.recognizes(_read_config(source, family.denoiser_name)):
            return family
    return next(iter(known_families()))


def _read_config(source: BaseSource, part: str, file: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of the base from its folder or the Hub."""
    location, name = Path(source.location), f"{part}/{file}" if part else file
    with _refusing(source):
        if location.is_dir():
            path = location / name
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source.location), name, revision=source.revision or None))
        content = json.loads(read_regular(path))
    if not isinstance(content, dict):
        raise InvalidArgument("base", _EXPECTED, f"'{source.path}', whose {name} is not a JSON object")
    return content


def _scheduler_config(source: BaseSource, index: Mapping[str, Any]) -> dict[str, Any]:
    """Read the scheduler's config; empty if the index has no scheduler."""
    if index.get("scheduler", [None])[0] is None:
        return {}
    config = _read_config(source, "scheduler", "scheduler_config.json")
    if source.prediction_type:
        config["prediction_type"] = source.prediction_type
    return config


@contextmanager
def _refusing(source: BaseSource) -> Iterator[None]:
    """Turn any error of loading into an `InvalidArgument`, with the original error as its cause.

    The Hub's client, safetensors, JSON and torch raise errors of many kinds, and damaged files cause others.
    """
    try:
        with warnings.catch_warnings():  # newer diffusers call it `dtype`, which older ones do not accept
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            yield
    except (InvalidArgument, MemoryError):
        raise
    except Exception as error:
        reason = one_line(error)
        received = f"'{source.path}' ({type(error).__name__}: {reason})"
        raise InvalidArgument("base", _EXPECTED, received, code_hint(error)) from error


@lru_cache(maxsize=8)
def _config_of_file(source: BaseSource) -> str:
    """Return the folder with a single file's configs: the given one, or diffusers' default from the Hub.

    Raises:
        InvalidArgument: if the file is not a base; if it is Stable Diffusion 2.x and neither the caller nor
            the given scheduler config states the prediction type; and if the default cannot be downloaded.
    """
    default, is_v2 = _default_config(Path(source.path))
    if is_v2 and not source.prediction_type and not (source.config and _states_prediction(source.config)):
        raise InvalidArgument(
            "prediction_type",
            hint="A Stable Diffusion 2.x file does not state it. Use "
            '"v_prediction" for 2.0 and 2.1 at 768 pixels, "epsilon" for the base models at 512',
        )
    if source.config:
        return source.config
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(default, allow_patterns=_CONFIG_FILES)
    except Exception as error:  # the client raises errors of many kinds
        raise InvalidArgument(
            "base_config",
            hint=f"The configs and tokenizer of '{default}' cannot be downloaded ({type(error).__name__}). "
            "Use a folder in diffusers format, of which only the small config and tokenizer files are "
            f"read, such as a copy of https://huggingface.co/{default} without its weights",
        ) from error


def _states_prediction(config: str) -> bool:
    """Return whether the scheduler in a single file's `config` states a prediction type."""
    where = BaseSource(config)
    return "prediction_type" in _scheduler_config(where, _read_config(where, "", INDEX))


def _default_config(file: Path) -> tuple[str, bool]:
    """Return the Hub id of diffusers' default configs for a single file, and whether it is SD 2.x."""
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
    )

    if not file.is_file():
        raise InvalidArgument("base", "an existing file", f"'{file}'")
    try:
        with safe_open(file, framework="pt") as opened, torch.device("meta"):
            shapes = {name: torch.empty(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise InvalidArgument("base", "a safetensors file", f"'{file}' ({error})") from error
    kind = infer_diffusers_model_type(shapes)  # type: ignore[no-untyped-call]  # diffusers' own
    # diffusers infers "v1" for any unknown file.
    is_other = kind.startswith(("v1", "controlnet", "animatediff", "autoencoder"))
    if is_other and not any(name.startswith(_DENOISER) for name in shapes):
        found = f"'{file}', which seems to be {seems_to_be(shapes)}"
        raise InvalidArgument("base", "a Stable Diffusion file, with its denoiser's weights", found)
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"], kind == "v2"
