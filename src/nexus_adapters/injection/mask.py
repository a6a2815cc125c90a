"""Masks: where in the image a control acts."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.injection.condition import ConditionLike, as_condition


def as_mask(value: ConditionLike | None) -> Float[Tensor, "k 1 h w"] | None:
    """A copy as (K, 1, H, W) in [0, 1]; None for none.

    Args:
        value: as a condition of one channel: a PIL image (color becomes grey), a tensor (K, 1, H, W) in
            [0, 1], or a list of PIL images or of tensors (1, H, W) or (1, 1, H, W). White acts.

    Raises:
        InvalidArgument: as `as_condition`.
    """
    return None if value is None else as_condition(value, channels=1, name="mask")


def mask_levels(
    mask: Float[Tensor, "k 1 h w"], features: Sequence[Tensor], unshuffle: int
) -> list[Float[Tensor, "k 1 h_level w_level"]]:
    """The mask at every feature's size: the mean over the pixels that each of its values spans.

    Pooled as adapters pool their features, so that both stay aligned. `mask` has the size of the condition
    as the adapter reads it, which is a multiple of `unshuffle`.
    """
    level = F.avg_pool2d(mask, unshuffle)
    levels = []
    for feature in features:
        while level.shape[-1] > feature.shape[-1] or level.shape[-2] > feature.shape[-2]:
            level = F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False)
        assert level.shape[-2:] == feature.shape[-2:]
        levels.append(level)
    return levels
