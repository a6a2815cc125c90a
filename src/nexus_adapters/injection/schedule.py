"""Where in the noise schedule a call lies, whatever steps the pipeline takes."""

from typing import Any

from torch import Tensor

from nexus_adapters.errors import InvalidArgument


def training_timesteps(pipe: Any) -> int:
    """`num_train_timesteps` of the pipeline's scheduler; `InvalidArgument` where there is none to ask."""
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    steps = config.get("num_train_timesteps")
    if not isinstance(steps, int) or steps <= 0:
        received = (
            "a denoiser alone" if pipe is None else f"a {type(pipe).__name__}, whose scheduler has none"
        )
        raise InvalidArgument(
            "pipe_or_denoiser",
            "a pipeline whose scheduler has num_train_timesteps, for a control that changes along the "
            "schedule (start, end, a scale that changes, or a noise_exponent, also the adapter's own)",
            received,
        )
    return steps


def schedule_position(timestep: Any, num_train_timesteps: int) -> float:
    """1 - t / num_train_timesteps: 0 is pure noise, 1 the image. Waits for the device if `timestep` is there.

    Args:
        timestep: as given to the UNet: a number, or a tensor of one value or of equal ones.
        num_train_timesteps: of the scheduler.

    Raises:
        InvalidArgument: for rows at different timesteps, and for values that are no training timesteps (some
            schedulers pass a function of the noise level instead).
    """
    values = timestep.flatten().tolist() if isinstance(timestep, Tensor) else [float(timestep)]
    if len(set(values)) != 1 or not 0 <= values[0] <= num_train_timesteps:
        shown = ", ".join(f"{value:g}" for value in sorted(set(values)))
        raise InvalidArgument(
            "timestep",
            f"one timestep from 0 to {num_train_timesteps} for the whole batch, since a control changes "
            "along the schedule",
            shown,
        )
    # Not 1 - t / n, whose rounding misses boundaries: 1 - 900 / 1000 is less than 0.1.
    return (num_train_timesteps - float(values[0])) / num_train_timesteps
