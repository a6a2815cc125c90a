"""NexusAdapter: a structure map and a prompt in, one feature map per place in the UNet out."""

import inspect
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.adapter.arguments import (
    ARGUMENTS,
    VARIANTS,
    attention_heads,
    check_arguments,
    check_channels,
    check_config,
    check_positive,
    variant_of,
)
from nexus_adapters.adapter.block import Trunk
from nexus_adapters.adapter.file_names import WEIGHTS
from nexus_adapters.adapter.geometry import adapter_geometry, unet_config
from nexus_adapters.adapter.inputs import check_inputs
from nexus_adapters.adapter.loaded import check_loaded
from nexus_adapters.adapter.stored import HASH, add_hash, check_hash, read_header


class NexusAdapter(ModelMixin, ConfigMixin):
    """Text-guided convolutional adapter, Prime or Slim (arXiv 2602.14514). A diffusers model.

    `for_unet` derives every argument from a UNet; all of them stand in `config`.

    Args:
        in_channels: channels of the structure map.
        channels: width of each stage, which is that of its feature.
        pools: per stage, whether (or how many times) a 2x2 average pooling precedes it. Never the first.
        unshuffle: side of the pixel squares that the stem folds into channels; the first feature's stride.
        groups: groups of the 3x3 convolutions. 1 is Prime (plain convolutions), 2 and more Slim
            (heterogeneous convolutions: grouped 3x3 plus dense 1x1).
        text_width: width of the prompt embeddings.
        heads, head_width: of the cross-attention, the same in every stage.
        residual: add the attention's input to its output. False, as in the paper, is the attention alone.
        zero_init: start the attention's output projection at zero; needs `residual`.
        noise_exponent: of the noise's share of the latents' variance, by whose power the features are
            multiplied in every step, in training and in generation (`noise_factors`). 0, as in the paper, is
            the same strength in all steps. The forward pass returns the features themselves.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """

    # Where saved pipelines look the class up: they must survive moves of this file.
    __module__ = "nexus_adapters"

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Stage"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]

    # The ignores below: diffusers has types for some of its functions, and not for these.
    @register_to_config  # type: ignore[untyped-decorator]  # diffusers' own
    def __init__(
        self,
        *,
        channels: Sequence[int],
        pools: Sequence[int],
        unshuffle: int,
        text_width: int,
        heads: int,
        head_width: int,
        in_channels: int = 3,
        groups: int = 1,
        residual: bool = False,
        zero_init: bool = False,
        noise_exponent: float = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # diffusers' own
        check_arguments(self.config)
        # JSON has no tuples: so that the config is the same before saving and after loading.
        self.register_to_config(  # type: ignore[no-untyped-call]  # diffusers' own
            channels=tuple(channels), pools=tuple(pools)
        )
        self.adapter = Trunk(
            in_channels,
            channels,
            pools,
            unshuffle,
            groups=groups,
            text_width=text_width,
            heads=heads,
            head_width=head_width,
            residual=residual,
            zero_init=zero_init,
        )

    @classmethod
    def for_unet(
        cls, unet: nn.Module, variant: str = "prime", *, vae_scale_factor: int = 8, **overrides: Any
    ) -> "NexusAdapter":
        """A new adapter, randomly initialised, whose features fit `unet`.

        Args:
            unet: a `UNet2DConditionModel` of `CrossAttnDownBlock2D` and `DownBlock2D`.
            variant: "prime" or "slim".
            vae_scale_factor: image pixels per latent pixel and side; times the first feature's stride on the
                latents it gives `unshuffle`.
            overrides: any constructor argument, in place of the derived one.

        Raises:
            ValueError: for a UNet that takes no features, an unknown variant or override, or a bad value.
        """
        if str(variant) not in VARIANTS:  # what has no hash, too, is told what was expected
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}; received {variant!r}")
        unknown = ", ".join(sorted(set(overrides) - set(ARGUMENTS)))
        if unknown:
            raise ValueError(f"overrides: expected some of {', '.join(ARGUMENTS)}; received {unknown}")
        check_positive("vae_scale_factor", vae_scale_factor)
        arguments = adapter_geometry(unet_config(unet), vae_scale_factor) | VARIANTS[variant] | overrides
        check_channels(arguments["channels"])
        heads, head_width = attention_heads(arguments["channels"])
        arguments = {"heads": heads, "head_width": head_width} | arguments
        if variant_of(arguments["groups"]) != variant:
            expected = f"a number that makes variant {variant!r} (1 is prime, 2 and more are slim)"
            raise ValueError(f"groups: expected {expected}; received {arguments['groups']}")
        adapter: NexusAdapter = cls(**arguments)
        return adapter

    @property
    def variant(self) -> str:
        """Name of the variant, "prime" or "slim"."""
        return variant_of(self.config["groups"])

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """For every feature: how many pixels of the condition one of its pixels spans, per side."""
        unshuffle: int = self.config["unshuffle"]
        return tuple(unshuffle * 2**pooled for pooled in accumulate(self.config["pools"]))

    def forward(
        self,
        # `| Tensor`: under pytest, too, misshapen input is to meet the ValueErrors below.
        condition: Float[Tensor, "b c h w"] | Tensor,
        prompt_embeds: Float[Tensor, "b n d"] | Tensor,
    ) -> list[Tensor]:
        """One feature map per stage: (B, channels[i], ceil(H / stride[i]), ceil(W / stride[i])).

        Args:
            condition: structure maps, (B, in_channels, H, W), floating point in [0, 1]; H and W multiples of
                `unshuffle`, B as in `prompt_embeds`.
            prompt_embeds: the text encoder's output as the UNet receives it, (B, N, text_width).

        Raises:
            ValueError: names the argument, what was expected and what came.
        """
        check_inputs(condition, prompt_embeds, self.config)
        features: list[Tensor] = self.adapter(condition, prompt_embeds)
        return features

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a saved adapter from a folder or the Hub; diffusers' own arguments, all of them.

        Returns the adapter, or (adapter, loading info) with `output_loading_info=True`.

        Raises:
            ValueError: names tensors that the file lacks, has in excess, or has in the wrong shape. diffusers
                itself leaves some of these uninitialised, with no more than a log message.
            OSError: diffusers' own, where there is no such folder or file.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        path = pretrained_model_name_or_path
        # Not to accept misshapen tensors, but to be told of all of them in place of the first.
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            adapter, info = super().from_pretrained(  # type: ignore[no-untyped-call]  # diffusers' own
                path, **kwargs
            )
        except NotImplementedError:
            # A device map moves the model before the info comes back, and parameters that were not loaded
            # cannot be moved: find out without it whether that is the reason.
            for name in ("device_map", "max_memory"):
                kwargs.pop(name, None)
            adapter, info = super().from_pretrained(  # type: ignore[no-untyped-call]  # diffusers' own
                path, **kwargs
            )
            check_loaded(adapter, info, path)
            raise
        check_loaded(adapter, info, path)
        return (adapter, info) if wants_info else adapter

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' own, told of the tensors that the files hold, in place of what an index says of them."""
        load: Any = super()._load_pretrained_model  # type: ignore[misc]  # diffusers' own, without types
        call = inspect.signature(load).bind(*args, **kwargs)
        files = [Path(file) for file in call.arguments.get("resolved_model_file") or ()]
        for file in files:
            if file.suffix != ".safetensors":
                raise ValueError(
                    f"weights: expected safetensors, which hold no code; received '{file}'. `nexus convert` "
                    "reads the tensors of pickles, and runs nothing of what else is in them"
                )
        stored = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
        needed = {name: tuple(tensor.shape) for name, tensor in call.arguments["model"].state_dict().items()}
        if {name: tensor.shape for name, tensor in stored.items()} == needed:
            check_hash(files, "weights")  # else `check_loaded` has more to say
        call.arguments["loaded_keys"] = list(stored)
        return load(*call.args, **call.kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save into a folder; diffusers' own arguments, all of them.

        The SHA-256 of all tensors goes into the metadata of each weights file, by which loading tells
        whether they are still the same.

        Raises ValueError for `safe_serialization=False`: pickles can hold code, and are not loaded.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]  # diffusers' own, without types
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        if given.get("safe_serialization", True) is not True:
            raise ValueError("safe_serialization: expected True; received False")
        folder, before = Path(save_directory), _written(Path(save_directory))
        options = {"repo_id", "commit_message", "private", "token", "create_pr"}
        upload = {name: value for name, value in given.get("kwargs", {}).items() if name in options}
        pushes = bool(given.pop("push_to_hub", False))
        extra = {k: v for k, v in given.pop("kwargs", {}).items() if k not in options}
        save(**given, **extra)
        new = [file for file, changed in _written(folder).items() if before.get(file) != changed]
        if new and given.get("is_main_process", True):
            add_hash(sorted(new))
        if pushes:
            push: Any = self.push_to_hub
            upload.setdefault("repo_id", folder.name)
            push(**upload, variant=given.get("variant"))

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build an untrained adapter of this config. ValueError where arguments are missing or unknown."""
        if isinstance(config, dict):
            check_config(config, overridden=kwargs)
        return super().from_config(  # type: ignore[no-untyped-call]  # diffusers' own
            config, return_unused_kwargs, **kwargs
        )


def _written(folder: Path) -> dict[Path, tuple[int, bool]]:
    """The weights files in a folder: when they were written, and whether they have a hash."""
    files = folder.glob(f"{WEIGHTS}*.safetensors")
    return {file: (file.stat().st_mtime_ns, _has_hash(file)) for file in files}


def _has_hash(file: Path) -> bool:
    try:
        return HASH in read_header(file).metadata
    except ValueError:  # a damaged one that is in the way, and most likely to be written over
        return False
