"""Where in the noise schedule a call lies, whatever steps the pipeline takes, and how much noise is there."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

_NO_NOISE = (
    "noise_exponent: expected a scheduler with alphas_cumprod, which tells the noise in each step, or 0 (an "
    "adapter that was trained with more is then too strong in late steps)"
)


def noise_factors(scheduler: Any, timesteps: Tensor | float, noise_exponent: float) -> Float[Tensor, "..."]:
    """(1 - alphas_cumprod[t]) ** noise_exponent: the noise's share of the latents' variance, to a power.

    What the features of an adapter with this `noise_exponent` are multiplied by: near 1 in the first steps,
    which decide structure, and near 0 in the last, which paint details. For `residuals(features, scale=...)`.

    Args:
        scheduler: of diffusers, with `alphas_cumprod`, as that of every Stable Diffusion.
        timesteps: 0 to num_train_timesteps, any shape; between two whole ones it is interpolated.
        noise_exponent: 0 gives ones.

    Returns:
        float32 on the device of `timesteps`, of their shape; in [0, 1].

    Raises:
        ValueError: for a scheduler without `alphas_cumprod`.
    """
    products = getattr(scheduler, "alphas_cumprod", None)
    is_flow = getattr(scheduler, "config", {}).get("use_flow_sigmas", False)  # which leaves the former there
    if not isinstance(products, Tensor) or is_flow:
        flow = " with use_flow_sigmas" if is_flow else ""
        raise ValueError(f"{_NO_NOISE}; received a {type(scheduler).__name__}{flow}")
    times = torch.as_tensor(timesteps)
    shares = 1 - products.to(times.device, torch.float32)
    places = times.float().clamp(0, len(shares) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(shares) - 1)
    return torch.lerp(shares[below], shares[above], places - below).clamp(0, 1) ** noise_exponent


def training_timesteps(pipe: DiffusionPipeline | None) -> int:
    """`num_train_timesteps` of the pipeline's scheduler; ValueError where there is none to ask."""
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    steps = config.get("num_train_timesteps")
    if not isinstance(steps, int) or steps <= 0:
        received = "a bare UNet" if pipe is None else f"a {type(pipe).__name__}, whose scheduler has none"
        raise ValueError(
            "start, end, scale, noise_exponent: expected 0, 1, a number and 0 (an adapter may have been "
            f"trained with more) where no scheduler tells num_train_timesteps; received {received}"
        )
    return steps


def schedule_position(timestep: Any, num_train_timesteps: int) -> float:
    """1 - t / num_train_timesteps: 0 is pure noise, 1 the image. Waits for the device if `timestep` is there.

    Args:
        timestep: as given to the UNet: a number, or a tensor of one value or of equal ones.
        num_train_timesteps: of the scheduler.

    Raises:
        ValueError: for rows at different timesteps, and for values that are no training timesteps (some
            schedulers pass a function of the noise level instead).
    """
    values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
    if len(set(values)) != 1 or not 0 <= values[0] <= num_train_timesteps:
        shown = ", ".join(f"{value:g}" for value in sorted(set(values)))
        raise ValueError(
            f"timestep: expected one timestep from 0 to {num_train_timesteps} for the whole batch, since a "
            f"control changes along the schedule; received {shown}"
        )
    # Not 1 - t / n, whose rounding misses boundaries: 1 - 900 / 1000 is less than 0.1.
    return (num_train_timesteps - float(values[0])) / num_train_timesteps
