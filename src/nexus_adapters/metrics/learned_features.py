"""Metrics with learned models: image features, distances between sets of features, and CLIP scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64
from PIL import Image
from torch import Tensor

from nexus_adapters.errors import InvalidArgument, code_hint, one_line


def check_sets(
    features: Tensor, reference: Tensor, least: int
) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    """Return both sets in float64.

    Raises:
        InvalidArgument: unless both are finite, (N, D) and (M, D), with at least `least` rows.
    """
    for name, rows in (("features", features), ("reference", reference)):
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise InvalidArgument(name, "floats of shape (N, D)", f"{rows.dtype} {tuple(rows.shape)}")
        if len(rows) < least:
            raise InvalidArgument(name, f"at least {least} samples to compute a distance", len(rows))
        if not rows.isfinite().all():
            raise InvalidArgument(name, "finite values", rows[~rows.isfinite()][0].item())
    if features.shape[1] != reference.shape[1]:
        raise InvalidArgument("reference", f"{features.shape[1]} columns as in features", reference.shape[1])
    return features.double(), reference.double()


def frechet_distance(
    # `| Tensor` lets input with a wrong shape reach the errors below, also under pytest.
    features: Float[Tensor, "n d"] | Tensor,
    reference: Float[Tensor, "m d"] | Tensor,
) -> float:
    """Return the squared Fréchet distance of Gaussians fitted to the two sets (Dowson and Landau 1982).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with unbiased covariances, in float64. With the pool
    features of Inception this is FID (Heusel et al. 2017); features of CLIP or DINOv2 are modern
    alternatives.

    The estimate is biased: it is larger for fewer samples, especially with many features (Chong and Forsyth
    2020). So compare only distances with the same number of samples and the same reference. With fewer than
    D + 1 samples the covariance does not have full rank, but the distance is still defined.

    Args:
        features: one row per image, (N, D), finite.
        reference: one row per reference image, (M, D), finite.

    Returns:
        The distance, at least 0; 0 for equal sets.

    Raises:
        InvalidArgument: for other shapes, fewer than two rows, or values that are not finite.
    """
    a, b = check_sets(features, reference, least=2)
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    first, second = a.T.cov(), b.T.cov()
    # tr (S1 S2)^(1/2) is computed from the symmetric S1^(1/2) S2 S1^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * mixed))


_BANDWIDTH, _SCALE = 10.0, 1000.0  # as in CMMD


def mmd(
    # `| Tensor` lets input with a wrong shape reach the errors below, also under pytest.
    features: Float[Tensor, "n d"] | Tensor,
    reference: Float[Tensor, "m d"] | Tensor,
    rows_at_once: int = 1024,
) -> float:
    """Return CMMD, the squared maximum mean discrepancy of two sets (Gretton et al. 2012), in float64.

    It is defined as in Jayasumana et al. (2024, arXiv 2401.09603), who use CLIP embeddings: features scaled
    to length 1, the kernel exp(-|x - y|^2 / (2 * 10^2)), and a factor of 1000.

    It does not assume Gaussians and needs far fewer samples than a Fréchet distance. The estimate is biased
    upward by about 1/N; it is 0 for equal sets.

    Args:
        features: one row per image, (N, D), finite.
        reference: one row per reference image, (M, D), finite.
        rows_at_once: number of rows of the kernel matrix in memory at a time.

    Raises:
        InvalidArgument: for other shapes, fewer than two rows, values that are not finite, or rows of zeros.
    """
    a, b = check_sets(features, reference, least=2)
    a, b = _of_length_1(a, "features"), _of_length_1(b, "reference")
    own = _mean_kernel(a, a, rows_at_once) + _mean_kernel(b, b, rows_at_once)
    return float(own - 2 * _mean_kernel(a, b, rows_at_once)) * _SCALE


def _of_length_1(rows: Tensor, name: str) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise InvalidArgument(name, "rows that are not all zeros", "a row of zeros")
    scaled: Tensor = rows / lengths
    return scaled


def _mean_kernel(a: Tensor, b: Tensor, rows_at_once: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for first in range(0, len(a), rows_at_once):
        rows = a[first : first + rows_at_once]
        squared = rows.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * (rows @ b.T)
        total += torch.exp(-squared.clamp(min=0) / (2 * _BANDWIDTH**2)).sum()
    return total / (len(a) * len(b))


def clip_scores(
    # `| Tensor` lets input with a wrong shape reach the errors below, also under pytest.
    image_embeds: Float[Tensor, "n d"] | Tensor,
    text_embeds: Float[Tensor, "n d"] | Tensor,
) -> Float[Tensor, " n"]:
    """Return the cosine similarity of each image's embedding and its text's, in float64, -1 to 1.

    The mean over a test set is the CLIP score reported for T2I-Adapter (arXiv 2302.08453, table 1), in which
    both embeddings are scaled to length 1 and the result is neither clipped nor multiplied.

    Args:
        image_embeds: embeddings of the images, (N, D), finite, without rows of zeros.
        text_embeds: embeddings of the texts in the same order, likewise.

    Raises:
        InvalidArgument: for other shapes, empty input, rows of zeros, or values that are not finite.
    """
    for name, rows in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
            raise InvalidArgument(name, "floats of shape (N, D)", f"{rows.dtype} {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise InvalidArgument(name, "finite rows", rows[~rows.isfinite()][0].item())
        if (rows.norm(dim=1) == 0).any():
            raise InvalidArgument(name, "rows that are not all zeros", "a row of zeros")
    if image_embeds.shape != text_embeds.shape:
        expected = f"shape {tuple(image_embeds.shape)} as image_embeds"
        raise InvalidArgument("text_embeds", expected, tuple(text_embeds.shape))
    images, texts = image_embeds.double(), text_embeds.double()
    cosines: Tensor = (images * texts).sum(dim=1) / (images.norm(dim=1) * texts.norm(dim=1))
    return cosines


@runtime_checkable
class FeatureModel(Protocol):
    """A model that turns images into rows of features."""

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """Return one row per image, in float32 on the CPU."""
        ...


class TransformersFeatures:
    """A vision model from `transformers`: projected embeddings of CLIP, pooled output of others (DINOv2).

    Args:
        source: a folder written by `save_pretrained`, or an id on the Hub.
        device: the device to compute on.

    Raises:
        InvalidArgument: for a model that cannot be loaded, such as one on the Hub without network access.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        import transformers

        self.source = source
        try:
            image_processor: Any = transformers.AutoImageProcessor
            self._processor = image_processor.from_pretrained(source, trust_remote_code=False)
            self._network: Any = transformers.AutoModel.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # the library can raise almost anything
            reason = one_line(error)
            expected = "a folder or the Hub id of a vision model"
            raise InvalidArgument("model", expected, f"'{source}' ({reason})", code_hint(error)) from error
        self._network.eval().to(device)
        self._is_clip = hasattr(self._network, "get_image_features")
        self._tokenizer: Any = None

    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """Return one row per image. Raises `InvalidArgument` for a model without a single row per image."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._network.device)
        with torch.inference_mode():
            found = self._network.get_image_features(**inputs) if self._is_clip else self._network(**inputs)
        return _row(found, self.source)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return one row per text, comparable to those of images. Texts are truncated to the model's length.

        Raises:
            InvalidArgument: for a model that does not embed text.
        """
        if not self._is_clip:
            raise InvalidArgument("model", "one that embeds text, such as CLIP", f"'{self.source}'")
        if self._tokenizer is None:
            import transformers

            tokenizer: Any = transformers.AutoTokenizer
            try:
                self._tokenizer = tokenizer.from_pretrained(self.source, trust_remote_code=False)
            except Exception as error:  # of any kind, as above
                expected, received = "one with a tokenizer", f"'{self.source}' ({one_line(error)})"
                raise InvalidArgument("model", expected, received, code_hint(error)) from error
        inputs = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            found = self._network.get_text_features(**inputs.to(self._network.device))
        return _row(found, self.source)


class TorchScriptFeatures:
    """A TorchScript model that maps (N, 3, H, W), values 0 to 255, to (N, D), such as NVIDIA's Inception.

    Args:
        file: such as inception-2015-12-05.pt; called with `return_features=True` if it accepts that.
        device: the device to compute on.

    Raises:
        InvalidArgument: for a missing file, or one that is not TorchScript.
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
        """Return one row per image. All images must have the same size."""
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
        with torch.inference_mode():
            return _row(self._network(inputs, **self._extra), self.source)


def load_features(model: str, device: str = "cpu") -> FeatureModel:
    """Load a feature model: a `.pt` file is TorchScript, anything else a model for `transformers`."""
    return (
        TorchScriptFeatures(model, device) if model.endswith(".pt") else TransformersFeatures(model, device)
    )


def _row(found: Any, source: str) -> Float[Tensor, "n d"]:
    if not isinstance(found, Tensor):
        found = getattr(found, "pooler_output", None)
    if not isinstance(found, Tensor):
        raise InvalidArgument("model", "one that pools an image into a single row", f"'{source}'")
    return found.flatten(1).float().cpu()
