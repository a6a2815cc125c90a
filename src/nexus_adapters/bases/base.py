"""What adapters, injection and training need to know of a frozen text-to-image model: one class per family.

A `Base` is bound to the config of one denoiser (a UNet or a transformer) and, as far as they are needed, to
the other parts of a pipeline. Most of it follows from the configs alone, so that a dry run loads no weights.
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

# One entry per branch, in order: whether it reads the prompt (else the negative prompt).
Branches = tuple[bool, ...]

POSITIVE, NEGATIVE = "positive", "negative"


def parse_branches(names: Any) -> Branches:
    """What a user says of a pipeline's branches, such as ("negative", "positive"), as `Branches`.

    `InvalidArgument` for other names, for none, and where no branch reads the prompt.
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
        pipe: None where no pipeline is running.
        variables: the local variables of its `__call__`.
        loop: the dotted name of that function, which may be a base class's.
    """

    pipe: Any
    variables: Mapping[str, Any]
    loop: str = ""


@dataclass(frozen=True)
class CallLayout:
    """What the rows of a denoiser's call are.

    Attributes:
        text: the prompt embeddings of all branches, branch after branch, each of the same number of rows.
        branches: of the text; None where they are not known, and each row is on its own.
        called: the index of the only branch that the call has; None where it has all. A pipeline that guides
            by two calls a step has one branch in each.
    """

    text: Tensor
    branches: Branches | None
    called: int | None = None


@dataclass(frozen=True)
class Place:
    """One place in a denoiser that takes a feature.

    Attributes:
        channels: of the feature.
        stride: how many latent pixels one of its pixels spans, per side.
        keyword: the argument of the denoiser's `forward` that takes a list of features, this one among them;
            "" where there is none.
        module: without a keyword, the dotted name of the module to whose output the feature is added.
        output: where that module returns a tuple, the index of the tensor in it.
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
        config: of the denoiser, as diffusers keeps it.
        vae_config: of the autoencoder; None where only the denoiser is known.
        scheduler: of diffusers, or of its config what `noise_schedule` reads; None as `vae_config`.
        pipe: a pipeline with the parts that encode; None until something is to be encoded.
    """

    denoiser_name: ClassVar[str]
    """The pipeline's attribute, "unet" or "transformer"."""
    denoiser_class: ClassVar[Any]
    """A diffusers model: with `from_config`, `from_pretrained` and `config`."""
    latents_argument: ClassVar[str]
    """Of the denoiser's `forward`: the noisy latents."""
    text_argument: ClassVar[str] = "encoder_hidden_states"
    """Of the denoiser's `forward`: the prompt embeddings."""
    prompt_tokens: ClassVar[int] = 77
    """Length of an encoded prompt, which estimates of cost and memory assume."""
    required_parts: ClassVar[tuple[str, ...]] = ("vae", "scheduler")
    """Parts of a pipeline that a base of this family cannot do without."""

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
        """The same base with another pipeline's scheduler and encoders, as pipelines share a denoiser."""
        return type(self)(self.config, self.vae_config, getattr(pipe, "scheduler", None), pipe)

    # Shapes: from configs alone.

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a denoiser's config is of this family: by the name of its class."""
        return bool(config.get("_class_name") == cls.denoiser_class.__name__)

    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """Where features are added, finest first. `InvalidArgument` where the denoiser takes none."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the prompt embeddings that the denoiser receives."""

    @property
    def known_as(self) -> str:
        """What users call bases of this shape, such as "SDXL"; "" where there is no such name."""
        return ""

    @property
    def latent_channels(self) -> int:
        """Of the latents."""
        return int((self.vae_config or {}).get("latent_channels", 4))

    @property
    def pixels_per_latent(self) -> int:
        """Image pixels per latent pixel, per side."""
        return int(2 ** (len((self.vae_config or {})["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """What both sides of a training image, in pixels, must be a multiple of, so that no place rounds."""
        return self.pixels_per_latent * max(place.stride for place in self.places())

    def native_size(self) -> int:
        """Side in pixels of the square images that it was trained on."""
        return int(self.config.get("sample_size", 64)) * self.pixels_per_latent

    def feature_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of the feature at every place, for latents of `height` x `width`."""
        return [(-(-height // place.stride), -(-width // place.stride)) for place in self.places()]

    def latent_size(self, latents: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) of the latents of a call, from its tensor and the call's other arguments."""
        if latents.ndim != 4:
            raise InvalidArgument(
                self.latents_argument, "latents (B, C, H, W)", f"shape {tuple(latents.shape)}"
            )
        return int(latents.shape[2]), int(latents.shape[3])

    def empty_denoiser(self) -> Any:
        """The denoiser on the meta device: shapes without memory."""
        with torch.device("meta"):
            return self.denoiser_class.from_config(dict(self.config))

    @classmethod
    def pipeline_class(cls, index: Mapping[str, Any]) -> Any:
        """The stock text-to-image pipeline for a folder with this model_index.json."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline

    def check(self, source: str) -> None:  # noqa: B027  # a family may have nothing to refuse
        """`InvalidArgument` named "base" where it is no text-to-image base to train or generate with.

        `source`: what users call it. From the configs alone.
        """

    # A pipeline's calls.

    def check_pipeline(self, pipe: Any) -> None:  # noqa: B027  # nor a pipeline to refuse
        """`InvalidArgument` for a pipeline of whose calls no condition can be matched to the latents."""

    def check_call(self, argument: Callable[[str], Any]) -> None:  # noqa: B027  # nor a call
        """`InvalidArgument` where the denoiser would drop features; `argument` gives the call's by name."""

    def layout_of(self, calling: CallingPipeline, text: Tensor) -> CallLayout | None:
        """Which rows of a call belong to which guidance branch; None where the pipeline is not known."""
        return None

    def knows(self, pipe: Any) -> bool:
        """Whether `layout_of` can tell the branches of this pipeline's calls."""
        return False

    # Encoding: needs `pipe`.

    @property
    def device(self) -> torch.device:
        """Where the encoders lie."""
        device: torch.device = self.pipe.vae.device
        return device

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "b 3 y x"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents, float32, scaled to unit variance, of images in [-1, 1]."""
        vae = self.pipe.vae
        encoded = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        mean = (encoded.mean.float() - shift) * vae.config.scaling_factor
        return mean, encoded.std.float() * vae.config.scaling_factor

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds`, (b, n, d) float32, and whatever else the denoiser reads of a prompt, by name."""

    def encode_empty_prompt(self) -> dict[str, Tensor]:
        """As `encode_prompts`, of one sample without a prompt: what guidance reads in generation."""
        return self.encode_prompts([""])

    def content_hash(self) -> str:
        """SHA-256 over all that decides encodings: the encoders' weights and configs, and tokenizers."""
        parts = {name: part for name, part in self.pipe.components.items() if _encodes(part)}
        configs = {name: [type(part).__name__, public_config(part)] for name, part in sorted(parts.items())}
        text = json.dumps([parts_sha256(parts), configs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def release(self) -> None:
        """Let go of the encoders, to free their memory."""
        self.pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Training: needs `scheduler`.

    @cached_property
    @abstractmethod
    def schedule(self) -> Any:
        """The noise schedule that a training follows."""

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps are integers from 0 (the image) to one below this (noise)."""
        return int(self.schedule.config.num_train_timesteps)

    @abstractmethod
    def noised(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> tuple[Tensor, Tensor]:
        """(noisy latents, what the denoiser is to predict from them) at timesteps `t`."""

    def loss_weights(self, t: Int[Tensor, " b"], min_snr_gamma: float) -> Float[Tensor, " b"]:
        """Min-SNR weights of samples' losses (arXiv 2303.09556, section 3.4)."""
        raise InvalidArgument(
            "min_snr_gamma",
            f"0 for a {type(self).__name__}, which has no signal-to-noise ratio",
            min_snr_gamma,
        )

    def noise_factors(self, timesteps: Tensor | float, noise_exponent: float) -> Float[Tensor, "..."]:
        """The noise's share of the latents' variance at these timesteps, to the power `noise_exponent`."""
        raise InvalidArgument("noise_exponent", f"0 for a {type(self).__name__}", noise_exponent)

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """The denoiser's prediction, wrapped or not; `arguments` are further ones of its `forward`."""
        given = {self.latents_argument: noisy, self.text_argument: prompt_embeds, "timestep": t}
        prediction: Tensor = denoiser(**given, return_dict=False, **arguments)[0]
        return prediction

    def added_arguments(self, added: Mapping[str, Tensor]) -> dict[str, Any]:
        """The denoiser's arguments for what a batch has in addition to prompt embeddings (`Batch.added`)."""
        return {}

    def example_added(self, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch's `added` of the right shapes, on the current default device."""
        return {}


def parts_sha256(parts: Mapping[str, Any]) -> str:
    """SHA-256 over modules' weights, as they lie in memory, and over tokenizers; of nothing else."""
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
    """A part's config, by `without_origin`; empty for a part without one."""
    config = getattr(part, "config", {})
    return without_origin(config.to_dict() if hasattr(config, "to_dict") else config)


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the place it was loaded from, the version that saved it, and the weights' dtype."""
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
    """All that decides which tokens a tokenizer makes of a text, as JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    state = ("truncation", "padding")  # of the last call
    return [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        {name: rule for name, rule in rules.items() if name not in state},
        tokenizer.special_tokens_map,
        [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side],
    ]
