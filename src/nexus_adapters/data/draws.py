"""All that is random about one sample in one optimizer step, from (seed, step, place in the step) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SampleDraws:
    """One sample's. The uniform numbers lie in [0, 1).

    Attributes:
        noise: standard normal, of the latents' shape: what is added to them.
        latent_noise: standard normal: what draws the latents from their mean and deviation.
        timestep: uniform; where in the schedule, through `loss.timesteps`.
        caption: uniform; which of the sample's captions.
        prompt_dropout: uniform; below the dropout's fraction, the prompt is empty.
        condition_dropout: uniform; below the dropout's fraction, there are no features.
    """

    noise: Float[Tensor, "c h w"]
    latent_noise: Float[Tensor, "c h w"]
    timestep: float
    caption: float
    prompt_dropout: float
    condition_dropout: float


def draw_for_sample(seed: int, step: int, place: int, latent_shape: Sequence[int]) -> SampleDraws:
    """Draw what belongs to the sample at `place` of the global batch, however many processes share it.

    On the CPU, so that every device trains on the same.
    """
    mixed = np.random.SeedSequence((seed, step, place, 1)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed) >> 1)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    noise, latent_noise = torch.randn((2, *latent_shape), generator=generator)
    return SampleDraws(noise, latent_noise, *uniform)
