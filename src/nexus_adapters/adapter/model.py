"""NexusAdapter: takes a structure map and a prompt, returns one feature map per place in the denoiser."""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.adapter.arguments import (
    FORMAT,
    FORMAT_VERSION,
    attention_heads,
    base_geometry,
    check_arguments,
    check_channels,
    check_config,
    check_positive,
    check_saved_config,
    variant_arguments,
    variant_of,
)
from nexus_adapters.adapter.blocks import as_json, checked_options, constructor_keywords, find_block
from nexus_adapters.adapter.layout import check_layout
from nexus_adapters.adapter.saved import CONFIG, find_saved, read_json, standard_weights, within
from nexus_adapters.adapter.stage import Trunk
from nexus_adapters.adapter.tensors import load_tensors
from nexus_adapters.adapter.weights import (
    PATH,
    check_files,
    check_tensors,
    load_checked,
    read_header,
    save_with_hash,
)
from nexus_adapters.bases.families import config_of, inner
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.choices import MapKind
from nexus_adapters.errors import InvalidArgument, expect, one_line, renamed
from nexus_adapters.files import WEIGHTS


def check_inputs(condition: Tensor, prompt_embeds: Tensor, config: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument` unless `NexusAdapter.forward` can take these tensors."""
    fits = condition.ndim == 4 and condition.shape[1] == config["in_channels"]
    expect(fits, "condition", f"shape (B, {config['in_channels']}, H, W)", f"{tuple(condition.shape)}")
    is_float = condition.is_floating_point()
    expect(is_float, "condition", "floating-point numbers in [0, 1]", condition.dtype)
    height, width = condition.shape[2:]
    unshuffle = config["unshuffle"]
    expect(
        height > 0 and width > 0 and height % unshuffle == 0 and width % unshuffle == 0,
        "condition",
        f"a height and a width that are multiples of {unshuffle}",
        f"{height}x{width}",
        "Pad it on the right and at the bottom, as attach() does",
    )
    text_width = config["text_width"]
    fits = prompt_embeds.ndim == 3 and prompt_embeds.shape[1] > 0 and prompt_embeds.shape[2] == text_width
    expect(fits, "prompt_embeds", f"shape (B, N, {text_width})", f"{tuple(prompt_embeds.shape)}")
    batch, texts = len(condition), len(prompt_embeds)
    expect(batch == texts, "prompt_embeds", f"a batch of {batch}, as in condition", f"a batch of {texts}")


def _check_folder(kind: type, folder: Path, variant: str | None) -> None:
    """Raise `InvalidArgument` for errors in a saved adapter's files, before a model is built.

    diffusers does not check configs and indices, and builds whatever they describe.
    """
    with renamed({"adapter": PATH}):
        has_config = (folder / CONFIG).is_file()
        expect(has_config, PATH, f"a folder with {CONFIG}", f"'{folder}' without {CONFIG}")
        config = read_json(folder / CONFIG)
        files = standard_weights(folder, variant)
        named = f" of variant {variant!r}" if variant else ""
        expected = f"a folder with {WEIGHTS}.safetensors{named}"
        hint = "load_adapter and `nexus convert` read other files"
        if any(folder.glob(f"{WEIGHTS}*.bin")):
            return  # `check_files` reports why it is not read
        expect(bool(files), PATH, expected, f"'{folder}' without this file", hint)
    if kind is NexusAdapter:
        arguments = check_saved_config(config)
        tensors = {name: tensor for file in files for name, tensor in read_header(file, PATH).tensors.items()}
        check_layout(arguments, {name: tensor.shape for name, tensor in tensors.items()}, folder, PATH)


_GEOMETRY = {"channels", "pools", "unshuffle", "text_width"}


class NexusAdapter(ModelMixin, ConfigMixin):
    """Text-guided convolutional adapter, Prime or Slim (arXiv 2602.14514). A diffusers model.

    `for_unet` derives every argument from a UNet; all arguments are in `config`. A subclass saves and loads
    as itself; its own arguments go into the config if you use diffusers' `@register_to_config`.

    Args:
        in_channels: channels of the structure map.
        channels: width of each stage and of its feature.
        pools: per stage, whether (or how many times) a 2x2 average pooling precedes it. Never before the
            first.
        unshuffle: side of the pixel squares that the stem folds into channels; the first feature's stride.
        groups: groups of the 3x3 convolutions. 1 is Prime (plain convolutions); 2 or more is Slim
            (heterogeneous convolutions: grouped 3x3 plus dense 1x1).
        text_width: width of the prompt embeddings.
        heads: number of attention heads, the same in every stage.
        head_width: channels per attention head, the same in every stage.
        residual: add the attention's input to its output. False, as in the paper: the output alone.
        zero_init: initialize the attention's output projection to zero; needs `residual`.
        noise_exponent: in every step of training and generation, features are multiplied by the noise's share
            of the latents' variance to this power (`noise_factors`). 0, as in the paper, gives the same
            strength in all steps. `forward` returns the features without this factor.
        block: name of the block that each level computes: "paper", or one of `register_block`.
        block_options: options of the block, as JSON values.

    Raises:
        InvalidArgument: for the first argument that cannot be used, or a block that is not registered.
    """

    # Saved pipelines look the class up here; they must still load if this file moves.
    __module__ = "nexus_adapters"

    # Kind of the maps that it was trained on, if its loader knows; not saved.
    condition_kind: MapKind | None = None

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("norm",)

    # The ignores below: diffusers has no types for these functions.
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
        block: str = "paper",
        block_options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # diffusers' own
        check_arguments(self.config)
        # The config should be the same before saving and after loading; JSON has no tuples.
        self.register_to_config(  # type: ignore[no-untyped-call]  # diffusers' own
            channels=tuple(channels), pools=tuple(pools), block_options=as_json(block_options)
        )
        kind = find_block(block)
        self.adapter = Trunk(
            in_channels,
            channels,
            pools,
            unshuffle,
            kind,
            groups=groups,
            text_width=text_width,
            heads=heads,
            head_width=head_width,
            residual=residual,
            zero_init=zero_init,
            **checked_options(block, kind, block_options),
        )

    @classmethod
    def for_unet(
        cls, unet: nn.Module, variant: str = "prime", *, vae_scale_factor: int = 8, **overrides: Any
    ) -> Self:
        """Create a new, randomly initialized adapter whose features fit `unet`.

        Args:
            unet: a `UNet2DConditionModel` of `CrossAttnDownBlock2D` and `DownBlock2D`.
            variant: "prime" or "slim", with a residual connection around the attention; "prime-paper" or
                "slim-paper" without it, as in the paper.
            vae_scale_factor: image pixels per latent pixel, per side. `unshuffle` is this number times the
                first feature's stride on the latents.
            overrides: constructor arguments that replace the derived ones.

        Raises:
            InvalidArgument: for a UNet that accepts no features, an unknown variant or override, an override
                that contradicts the variant, or an invalid value.
        """
        check_positive("vae_scale_factor", vae_scale_factor)
        config = config_of(unet)
        hint = "Pass its .unet" if isinstance(getattr(unet, "unet", None), nn.Module) else ""
        is_unet = UNetBase.recognizes(config)
        expect(is_unet, "unet", "a UNet2DConditionModel", f"a {type(inner(unet)).__name__}", hint)
        return cls.for_geometry(base_geometry(UNetBase(config), vae_scale_factor), variant, **overrides)

    @classmethod
    def for_geometry(cls, geometry: Mapping[str, Any], variant: str = "prime", **overrides: Any) -> Self:
        """Create a new, randomly initialized adapter for the places of any denoiser.

        Args:
            geometry: `channels`, `pools`, `unshuffle` and `text_width`, as returned by `base_geometry`.
            variant: as in `for_unet`.
            overrides: as in `for_unet`.

        Raises:
            InvalidArgument: as in `for_unet`.
        """
        form = variant_arguments(variant, overrides)
        known = list(constructor_keywords(cls))
        unknown = ", ".join(sorted(set(overrides) - set(known)))
        expect(not unknown, "overrides", f"some of {', '.join(known)}", unknown)
        expected, found = ", ".join(sorted(_GEOMETRY)), ", ".join(sorted(geometry))
        expect(set(geometry) == _GEOMETRY, "geometry", f"the keys {expected}", found)
        arguments = {**geometry, **form, **overrides}
        check_channels(arguments["channels"])
        heads, head_width = attention_heads(arguments["channels"])
        adapter: Self = cls(**{"heads": heads, "head_width": head_width, **arguments})
        return adapter

    @property
    def variant(self) -> str:
        """The name of the configuration: "prime", "slim", "prime-paper" or "slim-paper"."""
        return variant_of(self.config["groups"], self.config["residual"])

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of modules that a device map must not split."""
        return sorted({type(stage).__name__ for stage in self.adapter.body})

    def forward(
        self,
        # `| Tensor`: misshapen input should reach the checks below, also under pytest.
        condition: Float[Tensor, "b c h w"] | Tensor,
        prompt_embeds: Float[Tensor, "b n d"] | Tensor,
    ) -> list[Tensor]:
        """Return one feature map per stage: (B, channels[i], ceil(H / stride), ceil(W / stride)).

        The stride of stage i is `unshuffle`, doubled by every pooling up to and including stage i.

        Args:
            condition: structure maps, (B, in_channels, H, W), floating point in [0, 1]; H and W are multiples
                of `unshuffle`.
            prompt_embeds: the text encoder's output as the UNet receives it, (B, N, text_width).

        Raises:
            InvalidArgument: for inputs of another shape or type.
        """
        check_inputs(condition, prompt_embeds, self.config)
        features: list[Tensor] = self.adapter(condition, prompt_embeds)
        return features

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a saved adapter from a folder or the Hub. Takes all arguments of diffusers' `from_pretrained`.

        Returns:
            The adapter, or (adapter, loading info) with `output_loading_info=True`.

        Raises:
            InvalidArgument: if tensors are missing, unexpected or have the wrong shape (diffusers itself
                leaves some of these uninitialized and only logs it); for the config of another class, of a
                newer format, or of a block that is not registered; for a folder without its files; and for a
                single file, which `from_single_file` loads.
            OSError: from diffusers, if there is no such folder and no such repository on the Hub.
        """
        source = Path(pretrained_model_name_or_path)
        hint = f"Use {cls.__name__}.from_single_file for a file, or load_adapter for either"
        expect(not source.is_file(), PATH, "a folder or Hub id", f"'{source}', a file", hint)
        if source.is_dir():
            _check_folder(cls, source / (kwargs.get("subfolder") or ""), kwargs.get("variant"))
        load: Any = super().from_pretrained
        return load_checked(load, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_single_file(cls, file: str | os.PathLike[str], torch_dtype: torch.dtype | None = None) -> Any:
        """Load an adapter from a file written by `nexus convert --to single-file` or `export_file`.

        Args:
            file: the .safetensors file.
            torch_dtype: of the weights; None keeps the file's.

        Raises:
            InvalidArgument: for any other file, and as in `from_pretrained`.
        """
        with renamed(dict.fromkeys(("adapter", "source", "path"), "file")):
            expect(Path(file).is_file(), "file", "an existing file", f"'{os.fspath(file)}'")
            saved = find_saved(Path(file))
            hint = "Use load_adapter for other formats, or `nexus convert` to convert them"
            expect(saved.is_nexus, "file", "a file that contains its config", f"'{file}' without one", hint)
            adapter: Any = build_checked(saved.config, load_tensors(saved), saved.path, cls)
        return adapter if torch_dtype is None else nn.Module.to(adapter, torch_dtype)

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        """Call diffusers' method with the tensors that are in the files, not those that an index lists."""
        load: Any = super()._load_pretrained_model  # type: ignore[misc]  # diffusers' own, without types
        call = inspect.signature(load).bind(*args, **kwargs)
        files = [Path(file) for file in call.arguments.get("resolved_model_file") or ()]
        call.arguments["loaded_keys"] = check_files(files, call.arguments["model"])
        return load(*call.args, **call.kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        variant: str | None = None,  # named: diffusers' pipelines pass it only to parts that name it
        **kwargs: Any,
    ) -> None:
        """Save the adapter into a folder. Takes all arguments of diffusers' `save_pretrained`.

        The SHA-256 of all tensors is added to the metadata of each weights file; loading checks it.

        Raises:
            InvalidArgument: for `safe_serialization=False`: pickles can hold code and are never loaded.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]  # diffusers' own, without types
        named = {} if variant is None else {"variant": variant}
        save_with_hash(save, self.push_to_hub, Path(save_directory), *args, **kwargs, **named)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build an untrained adapter from its config.

        Raises:
            InvalidArgument: if arguments are missing or unknown, and for the config of another class.
        """
        # diffusers treats text as a path or Hub id: it would fetch whatever a JSON string in a config names.
        expect(
            config is None or isinstance(config, Mapping), "config", "a dict", f"a {type(config).__name__}"
        )
        if isinstance(config, Mapping):
            arguments = constructor_keywords(cls)
            check_config(
                config,
                overridden=kwargs,
                classes=[base.__name__ for base in cls.__mro__ if issubclass(base, NexusAdapter)],
                arguments=list(arguments),
                optional=[name for name, p in arguments.items() if p.default is not p.empty],
            )
            config = {name: value for name, value in config.items() if name != FORMAT}
        try:
            return super().from_config(  # type: ignore[no-untyped-call]  # diffusers' own
                config, return_unused_kwargs, **kwargs
            )
        except (RuntimeError, OverflowError, MemoryError) as error:
            reason = one_line(error)
            raise InvalidArgument("config", "the config of an adapter that can be built", reason) from error

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Return the constructor's keywords, including those that a subclass passes on as `**kwargs`."""
        return {"self", *constructor_keywords(input_class)}

    def to_json_string(self) -> str:
        """Return the config as it is saved, with its format version."""
        text: str = super().to_json_string()
        content = {**json.loads(text), FORMAT: FORMAT_VERSION}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def build_checked(
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    kind: type[NexusAdapter] = NexusAdapter,
) -> NexusAdapter:
    """Build an adapter of the class `kind` from a config and tensors, which are checked first.

    `path` is the tensors' file, for errors: `InvalidArgument` named "source".
    """
    try:
        if kind is NexusAdapter:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            check_layout(check_saved_config(arguments), shapes, path, "source")
        given = {name: arguments[name] for name in constructor_keywords(kind) if name in arguments}
        with torch.device("meta"):
            adapter: Any = kind(**given)
    except InvalidArgument as error:
        raise error if error.name == "source" else within("source", "a valid config", path, error) from error
    except (RuntimeError, TypeError, OverflowError) as error:  # from a user's block or class
        found = f"'{path}' ({one_line(error)})"
        raise InvalidArgument("source", "an adapter that can be built", found) from error
    check_tensors(adapter, tensors, path, "source")
    # Copied, since loaded tensors may stay mapped to their file.
    adapter.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    built: NexusAdapter = adapter.eval()
    return built
