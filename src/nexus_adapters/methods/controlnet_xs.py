"""ControlNet-XS (Zavadski et al. 2023, arXiv 2312.06573), from diffusers' parts, for bases of any shape.

diffusers' own version supports only 4 latent channels and two layers per block, and copies the base. Here,
adapter and base are fused without a copy: the fused network shares their parts, so training it trains the
adapter's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.bases.base import Base
from nexus_adapters.data.batch import Batch
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.injection.condition import ConditionLike, as_condition
from nexus_adapters.methods.controlnet import (
    check_is_unet,
    check_unet_widths,
    condition_channels,
    refuse_prompts,
)
from nexus_adapters.methods.cost import Cost, counted_gmacs, example, parameter_count, skeleton
from nexus_adapters.methods.method import (
    AdapterOptions,
    Generate,
    GenerationSettings,
    Method,
    card_call,
)
from nexus_adapters.methods.registry import register_method

_SIZE_RATIO = 0.125
_LARGEST_RATIO = 4  # more is a mistake: the control should be smaller than the base
_STOCK = (4, 2)  # latent channels and layers per block of diffusers' own classes


class ReshapedControlNetXS(ControlNetXSAdapter):
    """A `ControlNetXSAdapter` for bases whose latent channels or layers per block differ from SD's."""

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers' own
    def __init__(
        self,
        base_in_channels: int,
        layers_per_block: int,
        conditioning_embedding_out_channels: Sequence[int],
        num_attention_heads: int | Sequence[int],
        block_out_channels: Sequence[int],
        base_block_out_channels: Sequence[int],
        cross_attention_dim: int,
        down_block_types: Sequence[str],
        sample_size: int,
        transformer_layers_per_block: int | Sequence[int],
        upcast_attention: bool,
        max_norm_num_groups: int,
        use_linear_projection: bool,
        conditioning_channels: int = 3,
        conditioning_channel_order: str = "rgb",
        time_embedding_mix: float = 1.0,
        learn_time_embedding: bool = False,
    ) -> None:
        super().__init__(
            conditioning_channels=conditioning_channels,
            conditioning_channel_order=conditioning_channel_order,
            time_embedding_mix=time_embedding_mix,
            learn_time_embedding=learn_time_embedding,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            num_attention_heads=num_attention_heads,
            block_out_channels=block_out_channels,
            base_block_out_channels=base_block_out_channels,
            cross_attention_dim=cross_attention_dim,
            down_block_types=down_block_types,
            sample_size=sample_size,
            transformer_layers_per_block=transformer_layers_per_block,
            upcast_attention=upcast_attention,
            max_norm_num_groups=max_norm_num_groups,
            use_linear_projection=use_linear_projection,
        )
        self.conv_in = nn.Conv2d(base_in_channels, block_out_channels[0], 3, padding=1)
        self._cut_layers(layers_per_block, tuple(block_out_channels), tuple(base_block_out_channels))

    def _cut_layers(self, layers: int, own: tuple[int, ...], base: tuple[int, ...]) -> None:
        skips = [own[0]]
        block: Any
        connection: Any
        for block, channels in zip(self.down_blocks, own, strict=True):
            tail = 1 if block.downsamplers is not None else 0
            block.resnets = block.resnets[:layers]
            if block.attentions is not None:
                block.attentions = block.attentions[:layers]
            for name in ("base_to_ctrl", "ctrl_to_base"):
                parts = list(getattr(block, name))
                setattr(block, name, nn.ModuleList(parts[:layers] + parts[len(parts) - tail :]))
            skips += [channels] * (layers + tail)
        previous = base[-1]
        for connection, channels in zip(self.up_connections, reversed(base), strict=True):
            inputs = [previous, *[channels] * layers]
            connection.ctrl_to_base = nn.ModuleList(_zero_conv(skips.pop(), width) for width in inputs)
            previous = channels


def build_controlnet_xs(
    unet: Any, size_ratio: float, condition_channels: Sequence[int]
) -> ControlNetXSAdapter:
    """Build the untrained adapter in float32; diffusers' own `ControlNetXSAdapter` if it fits the base.

    Args:
        unet: the base's UNet.
        size_ratio: the adapter's channels as a fraction of the base's.
        condition_channels: channels of the condition encoder, which halves a condition once less than this
            has entries.

    Raises:
        InvalidArgument: for a base with more layers than diffusers supports, or a ratio whose channels are
            not divisible by the base's attention heads.
    """
    config = unet.config
    layers = config.layers_per_block
    if layers not in (1, 2):
        raise InvalidArgument(
            "base", f"at most {_STOCK[1]} layers per block, as in diffusers' ControlNet-XS", layers
        )
    channels = tuple(int(width * size_ratio) for width in config.block_out_channels)
    heads = config.attention_head_dim  # in older UNets, this is diffusers' name for the number of heads
    counts = [heads] * len(channels) if isinstance(heads, int) else heads
    for width, count in zip(channels, counts, strict=True):
        if width < 1 or width % count:
            raise InvalidArgument(
                "size_ratio",
                f"a ratio whose channels are divisible by the base's {tuple(counts)} attention heads",
                f"{size_ratio}, which gives {channels}",
            )
    shared = {
        "conditioning_embedding_out_channels": tuple(condition_channels),
        "num_attention_heads": heads,
        "block_out_channels": channels,
        "base_block_out_channels": tuple(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": tuple(config.down_block_types),
        "sample_size": config.sample_size,
        "transformer_layers_per_block": config.transformer_layers_per_block,
        "upcast_attention": bool(config.upcast_attention),
        "max_norm_num_groups": config.norm_num_groups,
        "use_linear_projection": config.use_linear_projection,
    }
    built: Any
    if (config.in_channels, layers) == _STOCK:
        built = ControlNetXSAdapter(**shared)
    else:
        built = ReshapedControlNetXS(base_in_channels=config.in_channels, layers_per_block=layers, **shared)
    adapter: ControlNetXSAdapter = nn.Module.to(built, torch.float32)
    return adapter


def fuse(unet: Any, adapter: Any) -> Any:
    """Fuse base and adapter into the network that denoises under control; it shares their parts.

    Call it like the UNet, with two more arguments: `controlnet_cond`, (b, 3, h, w), and `conditioning_scale`.
    `requires_grad` of the weights does not change.
    """
    names = ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim")
    more = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    with torch.device("meta"):  # a skeleton whose parts are all replaced
        kind: Any = UNetControlNetXSModel
        fused = kind(
            **{name: unet.config[name] for name in (*names, *more, "norm_num_groups")},
            num_attention_heads=unet.config.attention_head_dim,
            ctrl_block_out_channels=adapter.config.block_out_channels,
            ctrl_num_attention_heads=adapter.config.num_attention_heads,
            ctrl_conditioning_embedding_out_channels=adapter.config.conditioning_embedding_out_channels,
            ctrl_max_norm_num_groups=adapter.config.max_norm_num_groups,
        )
    for name in ("conv_in", "time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out"):
        setattr(fused, f"base_{name}", getattr(unet, name))
    if fused.base_add_embedding is not None:
        fused.base_add_time_proj, fused.base_add_embedding = unet.add_time_proj, unet.add_embedding
    fused.controlnet_cond_embedding = adapter.controlnet_cond_embedding
    fused.ctrl_conv_in = adapter.conv_in
    fused.control_to_base_for_conv_in = adapter.control_to_base_for_conv_in
    for block, base, control in zip(fused.down_blocks, unet.down_blocks, adapter.down_blocks, strict=True):
        _fuse_down(block, base, control)
    fused.mid_block.base_midblock, fused.mid_block.ctrl_midblock = unet.mid_block, adapter.mid_block.midblock
    fused.mid_block.base_to_ctrl = adapter.mid_block.base_to_ctrl
    fused.mid_block.ctrl_to_base = adapter.mid_block.ctrl_to_base
    for block, base, control in zip(fused.up_blocks, unet.up_blocks, adapter.up_connections, strict=True):
        block.resnets, block.ctrl_to_base = base.resnets, control.ctrl_to_base
        block.attentions = getattr(base, "attentions", None) or [None] * len(base.resnets)
        block.upsamplers = base.upsamplers[0] if base.upsamplers is not None else None
    parts = {id(parameter) for module in (unet, adapter) for parameter in module.parameters()}
    assert {id(parameter) for parameter in fused.parameters()} == parts  # nothing of the skeleton is left
    return fused


def _fuse_down(block: Any, base: Any, control: Any) -> None:
    layers = len(base.resnets)
    block.base_resnets, block.ctrl_resnets = base.resnets, control.resnets
    block.base_attentions = getattr(base, "attentions", None) or [None] * layers
    block.ctrl_attentions = control.attentions if control.attentions is not None else [None] * layers
    block.base_to_ctrl, block.ctrl_to_base = control.base_to_ctrl, control.ctrl_to_base
    block.base_downsamplers = base.downsamplers[0] if base.downsamplers is not None else None
    block.ctrl_downsamplers = control.downsamplers


@contextmanager
def controlled_by_xs(
    pipe: Any, adapter: Any, conditions: ConditionLike, scale: float = 1.0
) -> Iterator[None]:
    """Make a stock pipeline's UNet denoise under an adapter's control. A context manager.

    Args:
        pipe: the pipeline.
        adapter: a ControlNet-XS for its UNet.
        conditions: as in `Control`, one for each prompt of a call; every guidance branch gets them.
        scale: strength of the control; 0 is the base alone.
    """
    unet = pipe.unet
    fused, before = fuse(unet, adapter), unet.forward
    given = as_condition(conditions, channels=3, invert=False).to(unet.device, unet.dtype)

    def forward(sample: Tensor, *args: Any, **arguments: Any) -> Any:
        rows = given.repeat(len(sample) // len(given), 1, 1, 1)
        known = {name: value for name, value in arguments.items() if value is not None}
        return fused(sample, *args, controlnet_cond=rows, conditioning_scale=scale, **known)

    replaced: Callable[..., Any] = forward
    unet.forward = replaced
    try:
        yield
    finally:
        assert unet.forward is replaced
        del unet.forward
        assert unet.forward == before


def _ratio(own: Any, base: Any) -> float | None:
    """Return the smallest size ratio that gives the adapter's channels from its base's; None if none does."""
    are_lists = all(isinstance(widths, list | tuple) for widths in (own, base)) and len(own) == len(base) > 0
    if not are_lists or not all(isinstance(width, int) and width > 0 for width in (*own, *base)):
        return None
    ratio = max(part / whole for part, whole in zip(own, base, strict=True))
    if any(int(whole * ratio) < part for part, whole in zip(own, base, strict=True)):
        ratio = math.nextafter(ratio, math.inf)  # the division rounded down
    is_exact = all(int(whole * ratio) == part for part, whole in zip(own, base, strict=True))
    return ratio if is_exact else None


def _zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 1)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


@dataclass(frozen=True)
class ControlNetXSOptions(AdapterOptions):
    """The `[adapter]` section for a ControlNet-XS."""

    size_ratio: float | None = None
    """Its channels as a fraction of the base's. Default: the ratio of the adapter in `start_from`, else
    0.125."""

    def __post_init__(self) -> None:
        """Check the ratio."""
        fits = self.size_ratio is None or 0 < self.size_ratio <= _LARGEST_RATIO
        expect(fits, "size_ratio", f"a number above 0 and at most {_LARGEST_RATIO}", self.size_ratio)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the network and its training, in a canonical form."""
        found = super().identity()
        if self.size_ratio is None and not self.start_from:  # else that adapter decides
            found["size_ratio"] = _SIZE_RATIO
        return found


class ControlNetXSMethod(Method):
    """ControlNet-XS: one network with the base, which is called instead of the base's denoiser."""

    label = "ControlNet-XS"
    Options = ControlNetXSOptions
    keeps_float32 = True
    classes = (ControlNetXSAdapter, ReshapedControlNetXS)

    def build(self, base: Base, denoiser: nn.Module, options: ControlNetXSOptions) -> nn.Module:
        """Build the adapter, with the UNet's widths times `size_ratio`."""
        check_is_unet(self.name, denoiser)
        channels = condition_channels(self.name, base.pixels_per_latent)
        ratio = _SIZE_RATIO if options.size_ratio is None else options.size_ratio
        return build_controlnet_xs(denoiser, ratio, channels)

    def adopt(self, options: ControlNetXSOptions, saved: Saved) -> ControlNetXSOptions:
        """Take over the size ratio of a saved ControlNet-XS."""
        if not self.recognizes(saved) or "block_out_channels" not in saved.config:
            return options
        own: Any = saved.config["block_out_channels"]
        base: Any = saved.config.get("base_block_out_channels")
        ratio = _ratio(own, base)
        expected = f"a {self.label} with a fraction of its base's channels"
        received = f"'{saved.source}', with channels {own} for {base}"
        if ratio is None:
            raise InvalidArgument("start_from", expected, received)
        given = options.size_ratio
        if given is None:
            return replace(options, size_ratio=ratio)
        fits = [int(width * given) for width in base] == list(own)
        expect(fits, "size_ratio", f"{ratio:g}, as in '{saved.source}'", given)
        return options

    def check_fit(self, module: Any, base: Base) -> None:
        """Check the channels and the text width of the UNet."""
        check_unet_widths(module.config, module.conv_in.in_channels, "base_block_out_channels", base)

    def network(self, module: nn.Module, denoiser: nn.Module) -> nn.Module:
        """Return base and adapter fused into one network."""
        fused: nn.Module = fuse(denoiser, module)
        return fused

    @property
    def is_fused(self) -> bool:
        """True: the fused network is called instead of the UNet."""
        return True

    def denoiser_arguments(
        self,
        module: nn.Module | Any,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        base: Base,
    ) -> dict[str, Any]:
        """Return the fused network's arguments besides the UNet's. Dropped conditions have scale 0."""
        return {
            "controlnet_cond": batch.condition.to(noisy.dtype),
            "conditioning_scale": batch.has_condition.to(noisy.dtype)[:, None, None, None],
        }

    @contextmanager
    def generating(
        self, pipe: Any, module: nn.Module, conditions: Sequence[Image.Image], settings: GenerationSettings
    ) -> Iterator[Generate]:
        """Generate with the base's own pipeline, whose UNet is replaced meanwhile."""
        refuse_prompts(self, settings)
        with controlled_by_xs(pipe, module, list(conditions), settings.scale):
            yield pipe

    def cost(self, module: nn.Module, base: Base, size: int, steps: int) -> Cost:
        """Count the cost per step: that of the fused network minus that of the base."""
        s, unet = example(base, size), base.empty_denoiser()
        fused = fuse(unet, skeleton(module))
        both = counted_gmacs(lambda: fused(s.latents, s.timestep, s.text, s.condition, **s.added))
        alone = counted_gmacs(lambda: unet(s.latents, s.timestep, s.text, **s.added))
        return Cost(parameter_count(module), gmacs_per_step=both - alone)

    def card(self, module: nn.Module, base: str, source: str) -> str:
        """Return code for the model card, which uses the base's pipeline."""
        return "\n".join(
            [
                "from nexus_adapters import load_adapter, load_base",
                "from nexus_adapters.methods.controlnet_xs import controlled_by_xs",
                "",
                f'pipe = load_base("{base}")',
                f'adapter = load_adapter("{source}")',
                "# condition: a PIL image of the structure map",
                "with controlled_by_xs(pipe, adapter, condition):",
                f"    {card_call(base)}",
            ]
        )


register_method(ControlNetXSMethod("controlnet-xs"))
