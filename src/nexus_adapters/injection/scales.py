"""The factors of a control's features: along the noise schedule and per level."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from nexus_adapters.choices import Balance
from nexus_adapters.errors import InvalidArgument


def training_timesteps(pipe: Any) -> int:
    """Return `num_train_timesteps` of the pipeline's scheduler. `InvalidArgument` if there is none."""
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    steps = config.get("num_train_timesteps")
    if not isinstance(steps, int) or steps <= 0:
        received = (
            "a denoiser alone" if pipe is None else f"a {type(pipe).__name__}, whose scheduler has none"
        )
        raise InvalidArgument(
            "pipe_or_denoiser",
            "a pipeline whose scheduler has num_train_timesteps, for a control that changes along the "
            "schedule (start, end, a changing scale, or a noise_exponent, including the adapter's own)",
            received,
        )
    return steps


def check_schedule(pipe: Any) -> None:
    """Raise `InvalidArgument` if the scheduler's timesteps are not training timesteps, as with EDM."""
    steps, scheduler = training_timesteps(pipe), pipe.scheduler
    timesteps = getattr(scheduler, "timesteps", None)
    is_outside = isinstance(timesteps, Tensor) and not bool(((timesteps >= 0) & (timesteps <= steps)).all())
    if is_outside or hasattr(scheduler, "precondition_noise"):
        raise InvalidArgument(
            "pipe_or_denoiser",
            f"a pipeline whose scheduler has timesteps from 0 to {steps}, for a control that changes along "
            "the schedule (start, end, a changing scale, or a noise_exponent, including the adapter's own)",
            f"a pipeline with {type(scheduler).__name__}, whose timesteps are functions of the noise level",
        )


def schedule_position(timestep: Any, num_train_timesteps: int) -> float:
    """Return 1 - t / num_train_timesteps: 0 is pure noise, 1 the image. Syncs with the timestep's device.

    Args:
        timestep: as passed to the UNet: a number, or a tensor with one value or equal values.
        num_train_timesteps: of the scheduler.

    Raises:
        InvalidArgument: for rows at different timesteps, and for values that are not training timesteps (some
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
    # Not 1 - t / n, which misses boundaries by rounding: 1 - 900 / 1000 is less than 0.1.
    return (num_train_timesteps - float(values[0])) / num_train_timesteps


# A number, a function of the position in the schedule, or numbers for equal parts of it.
Scale: TypeAlias = float | Callable[[float], float] | tuple[float, ...]

# Named factors of the features, from the first (finest) level to the last, for four levels. "prompt" has the
# soft weights that the web UI's ControlNet extension uses for T2I-Adapters.
LEVEL_SCALES: dict[str, tuple[float, ...]] = {
    "balanced": (1.0, 1.0, 1.0, 1.0),
    "prompt": (0.25, 0.62, 0.825, 1.0),
}

# What takes precedence, as settings of a control. Larger factors do not make structure stronger; a negative
# branch without features does (benchmarks/balances.py).
BALANCES: dict[Balance, dict[str, Any]] = {
    "balanced": {"level_scales": "balanced", "policy": "positive"},
    "prompt": {"level_scales": "prompt", "policy": "positive"},
    "control": {"level_scales": "balanced", "policy": "cond_only"},
}


def balance(name: str) -> dict[str, Any]:
    """Return settings by what takes precedence: `Control(adapter, condition, **balance("control"))`.

    "balanced" is the default: level scales 1, 1, 1, 1 and the policy "positive". "prompt" has level scales
    0.25, 0.62, 0.825, 1. "control" has level scales 1, 1, 1, 1 and the policy "cond_only".

    Raises:
        InvalidArgument: for another name.
    """
    if name not in BALANCES:
        raise InvalidArgument("balance", f"one of {', '.join(BALANCES)}", repr(name))
    return dict(BALANCES[name])


def check_number(value: object, name: str) -> float:
    """Return `value` as a float; raise `InvalidArgument` unless it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidArgument(name, "a finite number", repr(value))
    return float(value)


def check_start_end(start: object, end: object) -> tuple[float, float]:
    """Return (start, end) as floats; raise `InvalidArgument` unless 0 <= start <= end <= 1."""
    first, last = check_number(start, "start"), check_number(end, "end")
    if not 0 <= first <= last <= 1:
        raise InvalidArgument("start, end", "0 <= start <= end <= 1", f"{first}, {last}")
    return first, last


def check_scale(value: Any, name: str = "scale") -> Scale:
    """Return a finite number, function, or tuple of finite numbers; else raise `InvalidArgument`."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if callable(value):
        return value  # type: ignore[no-any-return]  # `scale_at` checks what it returns
    if _is_list(value):
        return _numbers(value, name)
    try:
        return check_number(value, name)
    except InvalidArgument as error:
        raise InvalidArgument(
            name,
            "a finite number, a function of the position in the schedule, or a list of finite numbers",
            repr(value),
        ) from error


def scale_at(scale: Scale, position: float) -> float:
    """Return the factor at a position, 0 (noise) to 1 (image). Each of n numbers is for one nth.

    `InvalidArgument` if a function does not return a finite number.
    """
    if isinstance(scale, tuple):
        place = int(position * len(scale) + 1e-9)  # 0.29 * 100 is less than 29
        return scale[max(0, min(place, len(scale) - 1))]
    return check_number(scale(position), f"scale({position:g})") if callable(scale) else scale


def check_level_scales(value: Any, levels: int) -> tuple[float, ...] | None:
    """Return one number per feature: the given ones, or those of a name.

    If the adapter does not have four features, the numbers of a name are interpolated. `InvalidArgument` for
    another number of values or other values.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value not in LEVEL_SCALES:
            raise InvalidArgument(
                "level_scales",
                f"{levels} numbers, or one of {', '.join(LEVEL_SCALES)}",
                repr(value),
                f"For this balance, use Control(..., **balance({value!r}))" if value in BALANCES else "",
            )
        numbers = LEVEL_SCALES[value]
        places = np.linspace(0, len(numbers) - 1, levels)
        return tuple(float(number) for number in np.interp(places, range(len(numbers)), numbers))
    numbers = _numbers(value, "level_scales") if _is_list(value) else ()
    if len(numbers) != levels:
        received = f"{len(numbers)}: {list(numbers)}" if _is_list(value) else repr(value)
        raise InvalidArgument(
            "level_scales",
            f"{levels} numbers, one per feature of the adapter, or one of {', '.join(LEVEL_SCALES)}",
            received,
        )
    return numbers


def check_image_scales(value: Any) -> tuple[float, ...] | None:
    """Return a tuple of finite numbers, at least one; None for None. `InvalidArgument` for other values."""
    numbers = _numbers(value, "image_scales") if _is_list(value) else ()
    if value is not None and not numbers:
        raise InvalidArgument("image_scales", "a list of numbers, one for each condition", repr(value))
    return numbers or None


def check_one_each(name: str, values: Sequence[float] | None, conditions: int) -> None:
    """Raise `InvalidArgument` unless `values` is None or has one value per condition."""
    if values is not None and len(values) != conditions:
        raise InvalidArgument(name, f"{conditions}, one per condition", len(values))


def _is_list(value: object) -> bool:
    return isinstance(value, (Sequence, np.ndarray, Tensor)) and not isinstance(value, (str, bytes))


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    listed = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else list(values)
    if not isinstance(listed, list) or not listed:
        raise InvalidArgument(name, "at least one number", repr(values))
    return tuple(check_number(value, f"{name}[{place}]") for place, value in enumerate(listed))
