"""The learning rate by step."""

from __future__ import annotations

import math

from nexus_adapters.training.config import TrainingOptions


def learning_rate_at(options: TrainingOptions, step: int) -> float:
    """The rate of the optimizer step that follows `step` finished ones.

    It rises over `warmup_steps` to `learning_rate`, and then stays, or falls to zero at `max_train_steps`:
    along a line, or along half a cosine.
    """
    peak = options.learning_rate * min(1.0, (step + 1) / (options.warmup_steps + 1))
    if options.schedule == "constant":
        return peak
    rest = max(1, options.max_train_steps - options.warmup_steps)
    progress = min(1.0, max(0, step - options.warmup_steps) / rest)
    if options.schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
