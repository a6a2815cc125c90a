"""The record of everything needed to generate an image again, kept in a text chunk of its PNG file."""

import json
import os
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from nexus_adapters import __version__
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import file_sha256, without_folder
from nexus_adapters.generation.requests import ControlRequest, GenerateRequest, LoraRequest, MapSource

if TYPE_CHECKING:
    from PIL import Image

    from nexus_adapters.generation.models import LoadedAdapter, Model

SETTINGS_KEY = "nexus-adapters"
"""Keyword of the PNG text chunk that holds the settings as JSON."""


def settings_of(request: GenerateRequest, model: "Model", size: tuple[int, int]) -> dict[str, Any]:
    """Return everything needed to generate an image of (width, height) again, except its seed.

    Paths are reduced to their last part: a shared image should not reveal the names of its author's folders.
    The first control's settings are top-level keys; those of further controls are in "more_controls".
    """
    from nexus_adapters.evaluation.provenance import versions

    first, *others = _settings_of_controls(request.controls, model.adapters)
    return {
        "version": __version__,
        "command": "generate",
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": request.steps,
        "scheduler": request.scheduler,
        "guidance": request.guidance,
        **first,
        **({"more_controls": others} if others else {}),
        "width": size[0],
        "height": size[1],
        "base": without_folder(model.base),
        "base_config": request.base.config and without_folder(request.base.config),
        "prediction_type": request.base.prediction_type,
        "base_unet_sha256": model.base_unet_sha256,
        "loras": _settings_of_loras(request.loras),
        "device": model.pipe.device.type,
        "dtype": str(model.pipe.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _settings_of_controls(
    controls: Sequence[ControlRequest], adapters: Sequence["LoadedAdapter"]
) -> list[dict[str, Any]]:
    return [
        {
            **control.settings(),
            "balance": control.balance,
            "condition": control.condition_name,
            "source": control.given.argument,
            "source_file": Path(control.given.file).name,
            "source_sha256": file_sha256(Path(control.given.file)),
            "options": without_folders(extractor_options(control)),
            "inverted": control.invert,
            "mask": None if control.mask is None else Path(control.mask).name,
            "mask_sha256": None if control.mask is None else file_sha256(Path(control.mask)),
            "adapter": without_folder(loaded.name),
            "adapter_sha256": loaded.sha256,
        }
        for control, loaded in zip(controls, adapters, strict=True)
    ]


def _settings_of_loras(loras: Sequence[LoraRequest]) -> list[dict[str, Any]]:
    return [
        {
            "path": without_folder(lora.path),
            "scale": lora.scale,
            "sha256": file_sha256(Path(lora.path)) if Path(lora.path).is_file() else None,
        }
        for lora in loras
    ]


def extractor_options(control: ControlRequest) -> dict[str, object]:
    """Return all options for extracting the map, or for reading a given map."""
    from nexus_adapters.conditions import EXTRACTORS

    name = control.condition_name
    if isinstance(control.given, MapSource):
        return control.given.reading.values(name)
    return EXTRACTORS[name].defaults() | control.given.extractor.values(name)


def without_folders(options: Mapping[str, object]) -> dict[str, object]:
    """Return an extractor's options with paths, such as a model's, reduced to their last part."""
    return {
        name: without_folder(value) if isinstance(value, str) else value for name, value in options.items()
    }


def save_png(
    target: str | os.PathLike[str] | BinaryIO | BufferedIOBase,
    image: "Image.Image",
    settings: Mapping[str, object],
) -> None:
    """Write `image` as PNG with `settings`, which must be valid as JSON, in a text chunk."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    image.save(cast(Any, target), format="PNG", pnginfo=chunks)


def read_settings(
    source: str | os.PathLike[str] | BinaryIO | BufferedIOBase, argument: str = "image"
) -> dict[str, Any]:
    """Return the settings in a PNG file that `save_png` wrote.

    Raises:
        InvalidArgument: named `argument`, for a file that is not such a PNG.
    """
    from PIL import Image

    expected = "a PNG file with settings"
    try:
        with Image.open(cast(Any, source), formats=("PNG",)) as image:
            image.load()  # text chunks may follow the pixels
            text = image.info.get(SETTINGS_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidArgument(argument, expected, f"one that cannot be read ({error})") from error
    try:
        settings = json.loads(text or "")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise InvalidArgument(argument, expected, "one without them")
    return settings
