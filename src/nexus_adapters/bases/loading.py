"""Where a base lies, and loading it: an embedded one, a folder, a Hub id, or a single file."""

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
_DENOISER = "model.diffusion_model."  # the beginning of its tensors' names in a single file
_CONFIG_FILES = ["*.json", "*.txt", "*.model"]  # what a single file lacks


@dataclass(frozen=True)
class BaseSource:
    """Where a base lies.

    Attributes:
        path: "embedded" or another bundled base's name, a folder in diffusers' layout, a Hub id, or a single
            .safetensors file.
        revision: branch, tag or commit on the Hub; "" for the newest.
        variant: which of several saves to read, such as "fp16"; "" for the plain one, and where a folder has
            none for the one that is there.
        config: for a single file, a folder or Hub id in diffusers' layout with its configs and tokenizer, of
            which no weights are read; "" lets diffusers fetch its own default.
        prediction_type: for a single file, "epsilon" or "v_prediction" in place of what the config says. One
            of Stable Diffusion 2.x needs it, unless the scheduler of `config` states a prediction_type.
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
        """The folder or Hub id, in diffusers' layout, that has its configs."""
        if self.is_bundled:
            return str(BUNDLED[self.path].folder)
        return _config_of_file(self) if self.is_file else self.path

    def arguments(self, weights: bool = True) -> dict[str, Any]:
        """Further arguments of diffusers' `from_pretrained`. A folder is never looked for on the Hub."""
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
    """A `BaseSource` of what users write."""
    return source if isinstance(source, BaseSource) else BaseSource(str(source))


def load_base(
    source: str | Path | BaseSource = EMBEDDED, *, dtype: torch.dtype = torch.float32, **parts: Any
) -> Any:
    """The stock text-to-image pipeline of a base, on the CPU, in eval mode.

    Args:
        source: "embedded" (the small Stable Diffusion of nexus-adapters[embedded]), a folder in diffusers'
            layout, a Hub id, a single .safetensors file, or a `BaseSource` with more to say.
        dtype: of all parts.
        parts: in place of the pipeline's own, such as `safety_checker=None`.

    Raises:
        InvalidArgument: named "base", where there is none, a part of it is missing or damaged, or it is no
            base that adapters can be used with; and for "embedded" where its weights are not installed.
    """
    where = as_source(source)
    open_base(where)
    pipe = load_pipeline(where, dtype, **parts)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            # diffusers' own `to` warns of parts to keep in float32: here none.
            nn.Module.to(part, dtype)
    base, denoiser = base_of(pipe)
    to: Any = denoiser.to  # torch's types lack a memory format alone
    to(memory_format=torch.channels_last)  # benchmarks/memory_format.py
    check_text(base, where.path)
    if where.is_bundled:
        warn_of_unknown_words(pipe, where.path, BUNDLED[where.path].words)
    return pipe


def open_base(source: str | Path | BaseSource) -> Base:
    """The base's configs; no weights are read.

    Raises:
        InvalidArgument: named "base", where there is none, a part of its folder is missing, or it is no base
            that adapters can be used with.
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
                found = f"'{where.path}', which has none of variant {where.variant!r}"
                raise InvalidArgument("base", f"weights of the {name}", found)
            if scheduler.config:
                base.scheduler = base.schedule
            return base
    kinds = ", ".join(dict.fromkeys(family.denoiser_class.__name__ for family in known_families()))
    raise InvalidArgument(
        "base", f"a pipeline with one of {kinds}", f"'{where.path}', a {index.get('_class_name')}"
    )


@dataclass(frozen=True)
class _Scheduler:
    """A scheduler that is not built, since its config is all that is read."""

    config: Mapping[str, Any]


def load_pipeline(source: BaseSource, dtype: torch.dtype, **parts: Any) -> Any:
    """The stock pipeline with all parts, or with these in place of its own (None leaves one out)."""
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
    """The base's denoiser alone, frozen, in eval mode."""
    kind = base.denoiser_class
    with quiet_loading(), _refusing(source):
        if source.is_file:
            denoiser = kind.from_single_file(
                source.path,
                config=source.location,
                subfolder=base.denoiser_name,
                torch_dtype=dtype,
                **source.arguments(),
            )
        else:
            denoiser = kind.from_pretrained(
                source.location, subfolder=base.denoiser_name, torch_dtype=dtype, **source.arguments()
            )
    return nn.Module.to(denoiser, device, dtype).requires_grad_(False).eval()


def load_encoders(base: Base, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
    """Give the base all parts of its pipeline but the denoiser, frozen; `base.release()` lets go of them.

    The VAE is in float32 where its config says that it overflows in less.
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
    """Without progress bars and misleading logs of diffusers and transformers; afterwards as before."""
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
    """The local files that hold the denoiser's weights; of a Hub id those in the cache."""
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
            raise InvalidArgument(name, "no value, unless the base is a .safetensors file", repr(value))
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
        raise InvalidArgument("base", _EXPECTED, f"'{source.path}', which is another kind of file")
    if not path.exists() and "/" not in source.path:
        names = ", ".join(BUNDLED)
        raise InvalidArgument(
            "base", _EXPECTED, f"'{source.path}', which does not exist", f"Bases of the package: {names}"
        )


def _family_of_index(source: BaseSource, index: Mapping[str, Any]) -> type[Base]:
    for family in known_families():
        if family.denoiser_name in index and family.recognizes(_read_config(source, family.denoiser_name)):
            return family
    return next(iter(known_families()))


def _read_config(source: BaseSource, part: str, file: str = "config.json") -> dict[str, Any]:
    """A JSON file of the base, from its folder or the Hub."""
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
    """Empty where the index has no scheduler."""
    if index.get("scheduler", [None])[0] is None:
        return {}
    config = _read_config(source, "scheduler", "scheduler_config.json")
    if source.prediction_type:
        config["prediction_type"] = source.prediction_type
    return config


@contextmanager
def _refusing(source: BaseSource) -> Iterator[None]:
    """Turn whatever loading raises into an `InvalidArgument`.

    Of any kind: the Hub's client, safetensors, JSON and torch each have their own, and damaged files cause
    others. The cause has the details.
    """
    try:
        with warnings.catch_warnings():  # newer diffusers call it `dtype`, which older ones refuse
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
    """The folder with the configs of a single file: the given one, or diffusers' own default from the Hub.

    Raises `InvalidArgument` where the file is no base, where it is of Stable Diffusion 2.x and neither the
    caller nor the given configs' scheduler say what it predicts, and where the default cannot be fetched.
    """
    default, is_v2 = _default_config(Path(source.path))
    if is_v2 and not source.prediction_type and not (source.config and _states_prediction(source.config)):
        raise InvalidArgument(
            "prediction_type",
            hint="A Stable Diffusion 2.x file does not say what it predicts: "
            '"v_prediction" for 2.0 and 2.1 at 768 pixels, "epsilon" for the base models at 512',
        )
    if source.config:
        return source.config
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(default, allow_patterns=_CONFIG_FILES)
    except Exception as error:  # the client has many of its own
        raise InvalidArgument(
            "base_config",
            hint=f"The configs and tokenizer of '{default}' cannot be fetched ({type(error).__name__}). "
            "Give a folder in diffusers' layout, of which only the small config and tokenizer files are "
            f"read, such as a copy of https://huggingface.co/{default} without its weights",
        ) from error


def _states_prediction(config: str) -> bool:
    """Whether the scheduler among the configs that are given for a single file says what is predicted."""
    where = BaseSource(config)
    return "prediction_type" in _scheduler_config(where, _read_config(where, "", INDEX))


def _default_config(file: Path) -> tuple[str, bool]:
    """The Hub id that diffusers reads the configs of such a file from, and whether it is an SD 2.x."""
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
    # Which is "v1" for whatever it does not know.
    is_other = kind.startswith(("v1", "controlnet", "animatediff", "autoencoder"))
    if is_other and not any(name.startswith(_DENOISER) for name in shapes):
        found = f"'{file}', which seems to be {seems_to_be(shapes)}"
        raise InvalidArgument("base", "a Stable Diffusion file, with its denoiser's weights", found)
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"], kind == "v2"
