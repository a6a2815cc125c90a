"""Features of images, and embeddings of texts, by any model that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexus_adapters.errors import InvalidArgument, one_line


@runtime_checkable
class FeatureModel(Protocol):
    """What turns images into rows of numbers."""

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """One row an image, in float32 on the CPU."""
        ...


class TransformersFeatures:
    """A vision model of `transformers`: CLIP's projected embeddings, or what others pool, such as DINOv2's.

    Args:
        source: a folder of `save_pretrained`, or an id on the Hub.
        device: where it computes.

    Raises:
        InvalidArgument: for a model that cannot be loaded, such as one on the Hub when offline.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        import transformers

        self.source = source
        try:
            image_processor: Any = transformers.AutoImageProcessor
            self._processor = image_processor.from_pretrained(source)
            self._network: Any = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        except Exception as error:  # the library raises almost anything
            reason = one_line(error)
            expected = "a folder or the Hub id of a vision model"
            raise InvalidArgument("model", expected, f"'{source}' ({reason})") from error
        self._network.eval().to(device)
        self._is_clip = hasattr(self._network, "get_image_features")
        self._tokenizer: Any = None

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """One row an image. InvalidArgument for a model that gives no single row."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._network.device)
        with torch.inference_mode():
            found = self._network.get_image_features(**inputs) if self._is_clip else self._network(**inputs)
        return _row(found, self.source)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """One row a text, comparable with those of images; texts are cut at the model's length.

        Raises:
            InvalidArgument: for a model that embeds no texts.
        """
        if not self._is_clip:
            raise InvalidArgument("model", "one that embeds texts, such as CLIP", f"'{self.source}'")
        if self._tokenizer is None:
            import transformers

            tokenizer: Any = transformers.AutoTokenizer
            self._tokenizer = tokenizer.from_pretrained(self.source)
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            found = self._network.get_text_features(**inputs.to(self._network.device))
        return _row(found, self.source)


class TorchScriptFeatures:
    """A TorchScript file that takes (N, 3, H, W) in 0 to 255 and gives (N, D), such as NVIDIA's Inception.

    Args:
        file: such as inception-2015-12-05.pt; called with `return_features=True` where it takes that.
        device: where it computes.

    Raises:
        InvalidArgument: for no such file, or one that is not TorchScript.
    """

    def __init__(self, file: str, device: str = "cpu") -> None:
        self.source, self._device = file, device
        if not Path(file).is_file():
            raise InvalidArgument("model", "a TorchScript file", f"'{file}', which does not exist")
        try:
            load: Any = torch.jit.load
            self._network: Any = load(file, map_location=device).eval()
        except RuntimeError as error:
            reason = one_line(error)
            raise InvalidArgument("model", "a TorchScript file", f"'{file}' ({reason})") from error
        names = [argument.name for argument in self._network.forward.schema.arguments]
        self._extra = {"return_features": True} if "return_features" in names else {}

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """One row an image; the images must be of one size."""
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
        with torch.inference_mode():
            return _row(self._network(inputs, **self._extra), self.source)


def load_features(model: str, device: str = "cpu") -> FeatureModel:
    """The model of a name: a `.pt` file is TorchScript, anything else a model of `transformers`."""
    return (
        TorchScriptFeatures(model, device) if model.endswith(".pt") else TransformersFeatures(model, device)
    )


def _row(found: Any, source: str) -> Float[Tensor, "n d"]:
    if not isinstance(found, Tensor):
        found = getattr(found, "pooler_output", None)
    if not isinstance(found, Tensor):
        raise InvalidArgument("model", "one that pools an image into one row", f"'{source}'")
    return found.flatten(1).float().cpu()
