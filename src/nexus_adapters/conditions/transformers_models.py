"""Models of the `transformers` library that extract maps: loaded once per process, with uniform errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from PIL import Image

from nexus_adapters.errors import InvalidArgument, code_hint, one_line
from nexus_adapters.library_logs import logs_hidden

Task = Literal["depth estimation", "segmentation"]
_UNUSED = ("auxiliary_head",)  # parts that only training uses
_KEPT = 4  # models in memory; a set of maps needs at most one per task


@dataclass(frozen=True)
class LearnedModel:
    """A model and its image processor.

    Attributes:
        source: the folder or Hub id.
        processor: prepares images, and resizes the output to their size.
        network: the model in eval mode, float32, on its device.
    """

    source: str
    processor: Any
    network: Any

    @property
    def kind(self) -> str:
        """The architecture, as the library names it: "dpt", "segformer", ..."""
        return str(self.network.config.model_type)

    def run(self, images: Sequence[Image.Image], **extra: object) -> Any:
        """Run the network on RGB images, which the processor must resize to one size."""
        import torch

        with torch.inference_mode():
            inputs = self.processor(images=list(images), return_tensors="pt", **extra)
            device = self.network.device
            return self.network(**{name: _moved(value, device) for name, value in inputs.items()})


def _moved(value: Any, device: Any) -> Any:
    """Move a tensor, or a list of tensors (from a processor that splits images), to the device."""
    if isinstance(value, list | tuple):
        return [_moved(part, device) for part in value]
    return value.to(device) if hasattr(value, "to") else value


def load_model(task: Task, source: str, device: str = "auto") -> LearnedModel:
    """Load a model, or return it from memory if it is already loaded.

    Args:
        task: the model's task.
        source: a folder of `save_pretrained`, or a Hub id (HF_HUB_OFFLINE=1 prevents downloads). Code that
            ships with a model is never run.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA if available, else the CPU.

    Raises:
        InvalidArgument: for a model that does not exist or has another task, or a device that is not
            available.
    """
    with logs_hidden():
        return _load(task, source, existing_device(device))


def existing_device(device: str) -> str:
    """Return the device for a name or "auto". `InvalidArgument` named "device" if it is not available."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument("device", "auto, cpu or a device of this machine", repr(device)) from error
    return device


_HINT = (
    "Choose another model with --option model=FOLDER_OR_ID (in Python, model=FOLDER_OR_ID). To generate, you "
    "can also pass a map that you have, with --map"
)


@lru_cache(maxsize=_KEPT)
def _load(task: Task, source: str, device: str) -> LearnedModel:
    import torch
    import transformers

    try:
        # Without `trust_remote_code=False`, the library would ask on the terminal and accept a "y" from a
        # pipe.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = _network_class(task, config)
        prepares: Any = transformers.AutoProcessor if _reads_task(config) else transformers.AutoImageProcessor
        processor = prepares.from_pretrained(source, trust_remote_code=False)
        network, info = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        _check_whole(info)
    except Exception as error:  # the library raises almost anything, with messages of many lines
        reason = one_line(error)
        expected = f"the folder or Hub id of a model for {task}"
        hint = code_hint(error) or _HINT
        raise InvalidArgument("model", expected, f"'{source}' ({reason})", hint) from error
    return LearnedModel(source, processor, network.eval().to(device))


def _check_whole(info: Mapping[str, Any]) -> None:
    """Reject incomplete weights: the library would initialize the missing ones at random."""
    missing = sorted(str(key) for key in info["missing_keys"] if not str(key).startswith(_UNUSED))
    if missing:
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")


def _network_class(task: Task, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    if task == "depth estimation":
        return transformers.AutoModelForDepthEstimation
    names = modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    is_universal = config.model_type in names
    return (
        transformers.AutoModelForUniversalSegmentation
        if is_universal
        else transformers.AutoModelForSemanticSegmentation
    )


def _reads_task(config: Any) -> bool:
    return str(config.model_type) == "oneformer"


def in_batches_of_a_size(
    images: Sequence[Image.Image], extract: Callable[[list[Image.Image]], list[Image.Image]]
) -> list[Image.Image]:
    """Extract the maps of images, those of equal size together; return them in the images' order."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.size, []).append(place)
    maps: dict[int, Image.Image] = {}
    for members in places.values():
        maps.update(zip(members, extract([images[place] for place in members]), strict=True))
    return [maps[place] for place in range(len(images))]


@contextmanager
def names_the_model(task: Task, source: str) -> Iterator[None]:
    """Turn any error inside the block into an `InvalidArgument` that names the model."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        expected = f"a model for {task} that can process this image"
        raise InvalidArgument("model", expected, f"'{source}' ({reason})") from error
