"""One control's features for one call of the denoiser."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.bases.base import Base
from nexus_adapters.bases.unet import KEYWORD
from nexus_adapters.choices import MapKind
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.injection.branches import BranchPlan
from nexus_adapters.injection.compatibility import geometry_of, match_places, pixels_per_latent
from nexus_adapters.injection.condition import check_aspect, judged
from nexus_adapters.injection.control import Control
from nexus_adapters.injection.fit import fit_condition, mask_levels
from nexus_adapters.injection.scales import check_one_each

_LOOKED_AT_BYTES = 1 << 20  # of a condition, hashed in each call

# Attributes of PEFT layers that decide which of their weights act, and how strongly.
_PEFT_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")

# Enough for pipelines that alternate between a few embeddings, or run a batch in slices.
MAX_ENTRIES = 4


def version_of(tensor: Tensor) -> int | None:
    """Return how often the tensor was written in place; None for inference tensors, which do not count it."""
    return None if tensor.is_inference() else tensor._version


def content_of(maps: Float[Tensor, "k c h w"] | None) -> Hashable:
    """Return a value that changes if a condition or mask is written to in place.

    It includes the tensor's version. Writes that bypass the version counter (through `.data` or NumPy, or to
    an inference tensor) are detected by a checksum, only on the CPU, where it is cheap compared with a
    denoiser; for large tensors, of evenly spaced rows.
    """
    if maps is None or maps.device.type != "cpu":
        return None if maps is None else version_of(maps)
    rows = maps.detach()[:, :, :: 1 + maps.nbytes // _LOOKED_AT_BYTES].contiguous()
    return version_of(maps), zlib.crc32(rows.view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Weights:
    """An adapter's weights, and everything else that its features depend on, to detect changes later.

    Replaced tensors and in-place writes (an optimizer step, `load_state_dict`) are detected by identity and
    version. Writes that bypass the version counter (`parameter.data`, as when averaged weights are swapped
    in; any write to an inference tensor) are detected by a sample of the values, one per output channel.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    sample: Tensor | None
    settings: Hashable

    @classmethod
    def of(cls, adapter: nn.Module) -> Self:
        """Record the adapter's current weights."""
        tensors = _tensors(adapter)
        return cls(tensors, tuple(map(version_of, tensors)), _sample(tensors), _settings(adapter))

    def hold(self, adapter: nn.Module, look_closely: bool) -> bool:
        """Return whether the weights are unchanged; `look_closely` compares values, syncing the device."""
        tensors = _tensors(adapter)
        if len(tensors) != len(self.tensors) or any(
            a is not b for a, b in zip(tensors, self.tensors, strict=True)
        ):
            return False
        if tuple(map(version_of, tensors)) != self.versions or _settings(adapter) != self.settings:
            return False
        if not look_closely or self.sample is None:
            return True
        sample = _sample(tensors)
        return sample is None or torch.equal(sample, self.sample)


def _settings(adapter: nn.Module) -> Hashable:
    """Return for every module its mode, its hooks' numbers, its own `forward`, and PEFT's switches."""
    return tuple(
        (
            module.training,
            *module._forward_pre_hooks,
            None,
            *module._forward_hooks,
            id(vars(module).get("forward")),
            *(repr(vars(module)[name]) for name in _PEFT_SWITCHES if name in vars(module)),
        )
        for module in adapter.modules()
    )


def _tensors(adapter: nn.Module) -> tuple[Tensor, ...]:
    return tuple(chain(adapter.parameters(), adapter.buffers()))


def _sample(tensors: tuple[Tensor, ...]) -> Tensor | None:
    if not tensors or any(t.is_meta for t in tensors):  # offloaded: no values to sample
        return None
    # On the CPU, since offloading moves the weights between calls.
    return torch.cat([_first_of_each_channel(t.detach()).float() for t in tensors]).cpu()


def _first_of_each_channel(tensor: Tensor) -> Tensor:
    """Return a view, in any memory format."""
    while tensor.ndim > 1:
        tensor = tensor.select(-1, 0)
    return tensor.reshape(-1)


@dataclass
class _Entry:
    key: Hashable
    text: Tensor  # a strong reference, so that no other object gets its identity
    text_version: int | None
    text_before: Tensor | None  # copy of an inference tensor, whose writes are not counted
    weights: Weights
    features: list[Tensor]


class FeatureCache:
    """Features by key and prompt embeddings. The same tensor object or equal content is a hit."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=MAX_ENTRIES)

    def find(self, key: Hashable, text: Tensor, adapter: nn.Module) -> list[Tensor] | None:
        """Return the cached features for this key and text, or None; clear the cache if weights changed."""
        for entry in self._entries:
            if entry.key != key or version_of(entry.text) != entry.text_version:
                continue
            same_object = entry.text is text
            if entry.text_before is not None or not same_object:
                kept = entry.text if entry.text_before is None else entry.text_before
                if not _equal(kept, text):
                    continue
            # A different object usually means a new generation, before which weights may have changed. Within
            # a generation, the check is cheap on the CPU, but would stall every step on an accelerator.
            look_closely = not same_object or next(adapter.parameters(), text).device.type == "cpu"
            if not entry.weights.hold(adapter, look_closely):
                self._entries.clear()
                return None
            entry.text, entry.text_version, entry.text_before = text, version_of(text), _copy_if_needed(text)
            return entry.features
        return None

    def keep(self, key: Hashable, text: Tensor, adapter: nn.Module, features: list[Tensor]) -> None:
        """Cache features; if the cache is full, they replace the oldest entry."""
        kept = (version_of(text), _copy_if_needed(text), Weights.of(adapter), features)
        self._entries.append(_Entry(key, text, *kept))

    def clear(self) -> None:
        """Remove all features and free their memory."""
        self._entries.clear()


def _copy_if_needed(text: Tensor) -> Tensor | None:
    return text.clone() if text.is_inference() else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def residuals(
    features: Sequence[Tensor],
    scale: float | int | Float[Tensor, " n"] = 1.0,
    factors: Sequence[float] = (1.0,),
    like: Tensor | None = None,
) -> dict[str, list[Tensor]]:
    """Return the UNet's keyword argument that adds these features: `unet(..., **residuals(features))`.

    Args:
        features: one (N, C, H, W) per place in the UNet, as returned by an adapter. They are not modified.
        scale: one factor for all rows, or one per row, shape (N,).
        factors: one per guidance branch; the N rows are repeated for each branch, multiplied by its factor.
            With (1, 1) both branches get the same features; with (0, 1) the first gets none.
        like: a tensor (the latents) whose device and dtype the result gets.

    Returns:
        `{"down_intrablock_additional_residuals": [...]}`, with one (N * len(factors), C, H, W) per feature.
        The list is new, since the UNet empties it.

    Raises:
        InvalidArgument: for a `scale` of another shape.
    """
    return {KEYWORD: scaled_rows(features, scale, factors, like)}


def scaled_rows(
    features: Sequence[Tensor],
    scale: float | int | Float[Tensor, " n"] = 1.0,
    factors: Sequence[float] = (1.0,),
    like: Tensor | None = None,
) -> list[Tensor]:
    """Return the features of all rows of a batch; for the arguments, see `residuals`."""
    return [_tiled(_scaled(feature, scale, like), factors) for feature in features]


def _scaled(feature: Tensor, scale: float | int | Tensor, like: Tensor | None) -> Tensor:
    if like is not None:
        feature = feature.to(device=like.device, dtype=like.dtype)
    if isinstance(scale, Tensor):
        if scale.shape != feature.shape[:1]:
            raise InvalidArgument("scale", f"shape ({len(feature)},)", f"shape {tuple(scale.shape)}")
        return feature * scale.to(feature).reshape(-1, *[1] * (feature.ndim - 1))
    return feature if scale == 1 else feature * scale


def _tiled(feature: Tensor, factors: Sequence[float]) -> Tensor:
    if tuple(factors) == (1.0,):
        return feature
    blocks = {f: feature if f == 1 else feature * f if f else torch.zeros_like(feature) for f in set(factors)}
    return torch.cat([blocks[f] for f in factors])


def compute_features(
    control: Control,
    plan: BranchPlan,
    base: Base,
    latents: Tensor,
    latent_size: tuple[int, int],
    prompt_embeds: Float[Tensor, "rows n d"],
    image_size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Run the adapter: return one (plan.count, C, H, W) per place, in the latents' device and dtype.

    The features include the control's mask and level scales, which are the same in all steps.

    The adapter runs on its own device and in its own dtype, which differs from its weights' dtype under
    layerwise casting. Offloaded weights are on `meta` until their module is called; then the inputs go to the
    latents' device.

    `image_size` is (width, height) of the image that contains the control's crop, as returned by
    `check_crop`; None if only the condition is known.
    """
    geometry = geometry_of(control.adapter)
    adapter: Any = control.adapter
    weight = next(adapter.parameters())
    device = latents.device if weight.is_meta else weight.device
    height, width = latent_size
    factor = pixels_per_latent(control.adapter, base)
    size = height * factor, width * factor
    condition = _fitted(control, control.condition, size, geometry.unshuffle, image_size)
    condition = _laid_out(condition.to(device, adapter.dtype), plan)
    if geometry.text_width is None:
        features = control.adapter(condition)
    else:
        if prompt_embeds.shape[-1] != geometry.text_width:
            raise InvalidArgument(
                base.text_argument,
                f"width {geometry.text_width}, as the adapter reads",
                prompt_embeds.shape[-1],
            )
        text = prompt_embeds[plan.first : plan.first + plan.count].to(device, adapter.dtype)
        features = control.adapter(condition, text)
    features = _weighted(features, control, plan)
    if control.mask is not None:
        mask = _fitted(control, control.mask, size, geometry.unshuffle, image_size, name="mask")
        features = _masked(features, mask, control, plan, geometry.unshuffle)
    matched = match_places(features, base, plan.count, height, width)
    return [feature.to(latents.device, latents.dtype) for feature in matched]


def _weighted(features: Sequence[Tensor], control: Control, plan: BranchPlan) -> list[Tensor]:
    weighted = list(features)
    if control.level_scales is not None:
        weighted = [f * factor for f, factor in zip(weighted, control.level_scales, strict=True)]
    if control.image_scales is not None:
        check_one_each("image_scales", control.image_scales, len(control.condition))
        factors = _laid_out(torch.tensor(control.image_scales)[:, None, None, None], plan)
        weighted = [f * factors.to(f) for f in weighted]
    return weighted


def _masked(
    features: Sequence[Tensor], mask: Tensor, control: Control, plan: BranchPlan, unshuffle: int
) -> list[Tensor]:
    if len(mask) not in (1, len(control.condition)):
        count = len(control.condition)
        expected = "1 mask" if count == 1 else f"1 mask, or {count}, one per condition"
        raise InvalidArgument("mask", expected, len(mask))
    mask = mask.to(features[0].device).expand(len(control.condition), -1, -1, -1)
    levels = mask_levels(_laid_out(mask, plan), features, unshuffle)
    return [f * level.to(f.dtype) for f, level in zip(features, levels, strict=True)]


def _laid_out(maps: Float[Tensor, "k c h w"], plan: BranchPlan) -> Float[Tensor, "n c h w"]:
    """Return one map for each row that the adapter runs on."""
    return maps.repeat_interleave(plan.repeat, dim=0).repeat(plan.tile, 1, 1, 1)


def _fitted(
    control: Control,
    maps: Float[Tensor, "k c h w"],
    size: tuple[int, int],
    multiple: int,
    image_size: tuple[int, int] | None,
    name: str = "condition",
) -> Float[Tensor, "k c h_padded w_padded"]:
    """Return the control's condition or mask, cropped to `control.crop`, at `size`, (height, width)."""
    if name != "condition":  # a mask: averaged
        return _fitted_as("image", control, maps, size, multiple, image_size, name)
    if control.kind is not None or (control.crop is None and maps.shape[2:] == size):
        return _fitted_as(control.kind or "image", control, maps, size, multiple, image_size, name)
    fitted = [
        _fitted_as(judged(each), control, each[None], size, multiple, image_size, name) for each in maps
    ]
    return torch.cat(fitted)


def _fitted_as(
    kind: MapKind,
    control: Control,
    maps: Float[Tensor, "k c h w"],
    size: tuple[int, int],
    multiple: int,
    image_size: tuple[int, int] | None,
    name: str,
) -> Float[Tensor, "k c h_padded w_padded"]:
    """Fit maps of one kind; see `_fitted`."""
    if control.crop is None:
        return fit_condition(maps, *size, multiple, name, kind, control.resize_mode)
    height, width = control.condition.shape[2:]
    width, height = image_size or (width, height)
    left, top, right, bottom = control.crop
    if right > width or bottom > height:
        whole = "condition" if image_size is None else "image"
        raise InvalidArgument(
            "crop",
            f"a part of the {whole}, which has {width}x{height} pixels",
            f"left {left}, top {top}, right {right}, bottom {bottom}",
        )
    if control.resize_mode in ("crop", "pad"):  # the box refers to the image, so first fit the map to it
        maps = fit_condition(maps, height, width, 1, name, kind, control.resize_mode)
    elif control.resize_mode is None:
        check_aspect(maps.shape[2], maps.shape[3], height, width, name)
    across, down = maps.shape[3] / width, maps.shape[2] / height
    box = (left * across, top * down, right * across, bottom * down)
    return fit_condition(maps, *size, multiple, name, kind, control.resize_mode, box)


def check_call(base: Base, latents: object, prompt_embeds: object) -> tuple[Tensor, Tensor]:
    """Return both, after checking that they are latents and prompt embeddings with equally many rows."""
    if not isinstance(latents, Tensor) or latents.ndim < 3:
        raise InvalidArgument(base.latents_argument, "latents", _shape(latents))
    text, rows = prompt_embeds, len(latents)
    if not isinstance(text, Tensor) or text.ndim != 3 or len(text) != rows:
        raise InvalidArgument(
            base.text_argument,
            f"prompt embeddings ({rows}, N, D), one row per row of the latents",
            _shape(text),
        )
    return latents, text


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
