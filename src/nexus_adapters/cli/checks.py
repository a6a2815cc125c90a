"""Checks of options that need nothing slow to import."""

import math

from nexus_adapters.errors import expect

# Help texts of options that several commands have.
ADAPTER_HELP = (
    "a name (prime, slim, prime-paper, slim-paper, t2i), folder, Hub id, file, training run, checkpoint or "
    "pipeline"
)
BASE_CONFIG_HELP = (
    "for a --base in one file: a folder or Hub id in diffusers' layout; only its configs and tokenizer are "
    "read (default: the Hub's)"
)
PREDICTION_TYPE_HELP = "for a --base in one file: what it predicts; required for Stable Diffusion 2.x"
PREDICTION_TYPES = ("epsilon", "v_prediction")


def expect_finite(argument: str, value: float) -> None:
    """Refuse infinities and what is not a number."""
    expect(math.isfinite(value), argument, "a finite number", value)


def expect_between(argument: str, value: int, low: int, high: int) -> None:
    """Refuse integers outside `low` to `high`, both included."""
    expect(low <= value <= high, argument, f"an integer from {low} to {high}", value)


def expect_side(argument: str, value: int | None) -> None:
    """Refuse an image side that latents cannot have. None, for a side not given, passes."""
    expect(value is None or (value > 0 and value % 8 == 0), argument, "a positive multiple of 8", value)
