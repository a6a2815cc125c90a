"""What adapters, injection and training need to know about a frozen text-to-image model.

There is one class per family. A `Base` is bound to the config of one denoiser (a UNet or a transformer) and,
where needed, to the other parts of a pipeline. Most properties follow from the configs alone, so a dry run
loads no weights.
"""

from __future__ import annotations

import gc
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus_adapters.errors import InvalidArgument

# One entry per guidance branch, in order: True if it reads the prompt, False for the negative prompt.
Branches = tuple[bool, ...]

POSITIVE, NEGATIVE = "positive", "negative"


def parse_branches(names: Any) -> Branches:
    """Convert a user's list of branches, such as ("negative", "positive"), to `Branches`.

    Raises:
        InvalidArgument: for other names, an empty list, or a list without "positive".
    """
    is_list = isinstance(names, (tuple, list))
    if not is_list or not names or any(name not in (POSITIVE, NEGATIVE) for name in names):
        raise InvalidArgument("branches", f'a list of "{NEGATIVE}" and "{POSITIVE}"', repr(names))
    if POSITIVE not in names:
        raise InvalidArgument("branches", f'at least one "{POSITIVE}"', repr(names))
    return tuple(name == POSITIVE for name in names)


@dataclass(frozen=True)
class CallingPipeline:
    """The pipeline whose `__call__` is running in this thread.

    Attributes:
        pipe: the pipeline; None if none is running.
        variables: the local variables of its `__call__`.
        loop: the dotted name of this `__call__`, which may be a parent class's.
    """

    pipe: Any
    variables: Mapping[str, Any]
    loop: str = ""


@dataclass(frozen=True)
class CallLayout:
    """The meaning of the rows of a denoiser call.

    Attributes:
        text: the prompt embeddings of all branches, one branch after the other, with equally many rows each.
        branches: the branches of `text`; None if they are unknown and each row stands alone.
        called: the index of the branch in this call; None if the call has all branches. A pipeline that makes
            two calls per step for guidance has one branch in each.
    """

    text: Tensor
    branches: Branches | None
    called: int | None = None


@dataclass(frozen=True)
class Place:
    """One place in a denoiser where a feature is added.

    Attributes:
        channels: channels of the feature.
        stride: how many latent pixels one pixel of the feature spans, per side.
        keyword: the argument of the denoiser's `forward` that takes a list of features, including this one;
            "" if there is none.
        module: without a keyword, the dotted name of the module to whose output the feature is added.
        output: if that module returns a tuple, the index of the tensor in it.
        layout: "map" for (B, channels, H, W), "tokens" for (B, H * W, channels).
    """

    channels: int
    stride: int
    keyword: str = ""
    module: str = ""
    output: int | None = None
    layout: Literal["map", "tokens"] = "map"


class Base(ABC):
    """A family of frozen text-to-image models. Subclasses register with `register_base`.

    Args:
        config: the denoiser's config, as in diffusers.
        vae_config: the autoencoder's config; None if only the denoiser is known.
        scheduler: a diffusers scheduler, or an object with its `config`; None if only the denoiser is known.
        pipe: a pipeline with the encoders; None until something must be encoded.
    """

    denoiser_name: ClassVar[str]
    """The pipeline's attribute, "unet" or "transformer"."""
    denoiser_class: ClassVar[Any]
    """The denoiser's class, a diffusers model."""
    latents_argument: ClassVar[str]
    """The argument of the denoiser's `forward` for the noisy latents."""
    text_argument: ClassVar[str] = "encoder_hidden_states"
    """The argument of the denoiser's `forward` for the prompt embeddings."""
    prompt_tokens: ClassVar[int] = 77
    """Length of an encoded prompt in tokens, used in estimates of cost and memory."""
    required_parts: ClassVar[tuple[str, ...]] = ("vae", "scheduler")
    """Parts of a pipeline that a base of this family needs."""

    def __init__(
        self,
        config: Mapping[str, Any],
        vae_config: Mapping[str, Any] | None = None,
        scheduler: Any = None,
        pipe: Any = None,
    ) -> None:
        self.config = config
        self.vae_config = vae_config
        self.scheduler = scheduler
        self.pipe = pipe

    def bound_to(self, pipe: Any) -> Self:
        """Return this base with the scheduler and encoders of `pipe`, which shares the denoiser."""
        return type(self)(self.config, self.vae_config, getattr(pipe, "scheduler", None), pipe)

    # Shapes, from the configs alone.

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a denoiser's config belongs to this family, by its class name."""
        return bool(config.get("_class_name") == cls.denoiser_class.__name__)

    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """Return where features are added, finest first. `InvalidArgument` if the denoiser accepts none."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the prompt embeddings that the denoiser reads."""

    @property
    def known_as(self) -> str:
        """The common name of bases with these shapes, such as "SDXL"; "" if there is none."""
        return ""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int((self.vae_config or {}).get("latent_channels", 4))

    @property
    def pixels_per_latent(self) -> int:
        """Image pixels per latent pixel, per side."""
        return int(2 ** (len((self.vae_config or {})["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """Both sides of a training image, in pixels, must be a multiple of this, so that no place rounds."""
        return self.pixels_per_latent * max(place.stride for place in self.places())

    def native_size(self) -> int:
        """Return the side, in pixels, of the square images that the base was trained on."""
        return int(self.config.get("sample_size", 64)) * self.pixels_per_latent

    def feature_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (height, width) of the feature at every place, for latents of `height` x `width`."""
        return [(-(-height // place.stride), -(-width // place.stride)) for place in self.places()]

    def latent_size(self, latents: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return (height, width) of a call's latents, from the tensor and the call's other arguments."""
        if latents.ndim != 4:
            raise InvalidArgument(
                self.latents_argument, "latents (B, C, H, W)", f"shape {tuple(latents.shape)}"
            )
        return int(latents.shape[2]), int(latents.shape[3])

    def empty_denoiser(self) -> Any:
        """Build the denoiser on the meta device, which has shapes but uses no memory."""
        with torch.device("meta"):
            return self.denoiser_class.from_config(dict(self.config))

    @classmethod
    def pipeline_class(cls, index: Mapping[str, Any]) -> Any:
        """Return the stock text-to-image pipeline class for a folder with this model_index.json."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline

    def check(self, source: str) -> None:  # noqa: B027  # a family may have nothing to reject
        """Raise `InvalidArgument` named "base" if it cannot be trained or used for text-to-image.

        Reads the configs only. `source` is the user's name for the base.
        """

    # A pipeline's calls.

    def check_pipeline(self, pipe: Any) -> None:  # noqa: B027  # nor a pipeline to reject
        """Raise `InvalidArgument` for a pipeline in whose calls the condition cannot match the latents."""

    def check_call(self, argument: Callable[[str], Any]) -> None:  # noqa: B027  # nor a call
        """Raise `InvalidArgument` if the denoiser would drop features.

        `argument(name)` returns the call's argument of this name.
        """

    def layout_of(self, calling: CallingPipeline, text: Tensor) -> CallLayout | None:
        """Return which rows of a call belong to which guidance branch; None for an unknown pipeline."""
        return None

    def knows(self, pipe: Any) -> bool:
        """Return whether `layout_of` knows the branches of this pipeline's calls."""
        return False

    # Encoding: needs `pipe`.

    @property
    def device(self) -> torch.device:
        """The device of the encoders."""
        device: torch.device = self.pipe.vae.device
        return device

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "b 3 y x"]) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of the latents of images in [-1, 1].

        Both are float32, (b, c, h, w), scaled to unit variance.
        """
        vae = self.pipe.vae
        encoded = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean = (encoded.mean.float() - shift) * vae.config.scaling_factor
        return mean, encoded.std.float() * vae.config.scaling_factor

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return `prompt_embeds`, (b, n, d) float32, and whatever else the denoiser reads, by name."""

    def encode_empty_prompt(self) -> dict[str, Tensor]:
        """Encode one empty prompt as in `encode_prompts`: what the unconditional branch reads."""
        return self.encode_prompts([""])

    def content_hash(self) -> str:
        """Return a SHA-256 of everything that decides encodings: encoder weights, configs and tokenizers."""
        parts = {name: part for name, part in self.pipe.components.items() if _encodes(part)}
        configs = {name: [type(part).__name__, public_config(part)] for name, part in sorted(parts.items())}
        text = json.dumps([parts_sha256(parts), configs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def release(self) -> None:
        """Drop the encoders, to free their memory."""
        self.pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Training: needs `scheduler`.

    @cached_property
    @abstractmethod
    def schedule(self) -> Any:
        """The noise schedule used in training."""

    @property
    def num_train_timesteps(self) -> int:
        """The number of timesteps: integers from 0 (the image) to one less than this (noise)."""
        return int(self.schedule.config.num_train_timesteps)

    @abstractmethod
    def noised(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> tuple[Tensor, Tensor]:
        """Return (noisy latents, the denoiser's target) at timesteps `t`."""

    def loss_weights(self, t: Int[Tensor, " b"], min_snr_gamma: float) -> Float[Tensor, " b"]:
        """Return the Min-SNR weights of the samples' losses (arXiv 2303.09556, section 3.4)."""
        raise InvalidArgument(
            "min_snr_gamma",
            f"0 for {type(self).__name__}, which has no signal-to-noise ratio",
            min_snr_gamma,
        )

    def noise_factors(self, timesteps: Tensor | float, noise_exponent: float) -> Float[Tensor, "..."]:
        """Return the noise's share of the latents' variance at these timesteps, to a power, in [0, 1]."""
        raise InvalidArgument("noise_exponent", f"0 for {type(self).__name__}", noise_exponent)

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """Return the prediction of a denoiser, wrapped or not; `arguments` are passed to its `forward`."""
        given = {self.latents_argument: noisy, self.text_argument: prompt_embeds, "timestep": t}
        prediction: Tensor = denoiser(**given, return_dict=False, **arguments)[0]
        return prediction

    def added_arguments(self, added: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the denoiser's arguments for `Batch.added`: all but the prompt embeddings."""
        return {}

    def example_added(self, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return example values of `Batch.added` with the right shapes, on the default device."""
        return {}


def parts_sha256(parts: Mapping[str, Any]) -> str:
    """Return a SHA-256 of the modules' weights, as they are in memory, and of the tokenizers."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif _is_tokenizer(part):
            digest.update(json.dumps(_tokenization(part), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def public_config(part: Any) -> dict[str, Any]:
    """Return a part's config, reduced by `without_origin`; empty for a part without one."""
    config = getattr(part, "config", {})
    return without_origin(config.to_dict() if hasattr(config, "to_dict") else config)


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the path it was loaded from, the version that saved it, and the dtype."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype", "torch_dtype")
    }


def _encodes(part: Any) -> bool:
    return isinstance(part, nn.Module) or _is_tokenizer(part)


def _is_tokenizer(part: Any) -> bool:
    return hasattr(part, "get_vocab")


def _tokenization(tokenizer: Any) -> list[Any]:
    """Return everything that decides a tokenizer's output, as JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    state = ("truncation", "padding")  # left over from the last call
    return [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        {name: rule for name, rule in rules.items() if name not in state},
        tokenizer.special_tokens_map,
        [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side],
    ]
