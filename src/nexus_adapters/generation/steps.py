"""Progress of a generation: one `Step` after each denoising step, with a preview on request."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

_PREVIEW_LATENTS = 32  # sides of the latents that are decoded, at most

OnStep = Callable[["Step"], None]
"""Called after each denoising step. An exception that it raises ends the generation."""


@dataclass(frozen=True)
class Step:
    """A denoising step that has just ended.

    Attributes:
        index: its number, from 1.
        total: the number of steps.
    """

    index: int
    total: int
    _predicted: "Callable[[], torch.Tensor]" = field(repr=False)
    _pipe: Any = field(repr=False)

    def preview(self) -> "Image.Image":
        """Decode the image that the denoiser predicts at this step, from at most 32x32 latents.

        Does not change the generated image. Call it before the next step.
        """
        import torch

        with torch.no_grad():
            return _decoded(self._pipe, self._predicted())


@contextmanager
def observed(pipe: Any, on_step: OnStep | None) -> Iterator[dict[str, Any]]:
    """Yield the arguments of a pipeline's call that make it report its steps; none without `on_step`.

    Args:
        pipe: the pipeline, whose scheduler is observed in the block.
        on_step: called after each step.
    """
    if on_step is None:
        yield {}
        return
    scheduler, last = pipe.scheduler, _LastStep()
    step = scheduler.step

    @functools.wraps(step)  # pipelines read its signature
    def observe(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        last.output, last.timestep, last.sample = model_output, timestep, sample
        return step(model_output, timestep, sample, *args, **kwargs)

    def callback(called: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        on_step(Step(index + 1, called.num_timesteps, functools.partial(last.predicted, scheduler), pipe))
        return arguments

    scheduler.step = observe
    try:
        yield {"callback_on_step_end": callback}
    finally:
        del scheduler.step


@dataclass
class _LastStep:
    """The arguments of the scheduler's last step."""

    output: Any = None
    timestep: Any = None
    sample: Any = None

    def predicted(self, scheduler: Any) -> "torch.Tensor":
        """Return the noise-free latents that the denoiser predicts, by the scheduler's parametrization."""
        output: torch.Tensor = self.output.float()
        sample: torch.Tensor = self.sample.float()
        kind = scheduler.config.get("prediction_type", "flow")
        if kind == "sample":
            return output
        timestep = float(self.timestep)
        if not hasattr(scheduler, "alphas_cumprod"):  # flow matching
            trained: int = scheduler.config.num_train_timesteps
            return sample - timestep / trained * output
        table = scheduler.alphas_cumprod
        share = float(table[min(round(timestep), len(table) - 1)])
        signal, noise = math.sqrt(share), math.sqrt(1 - share)
        if float(scheduler.init_noise_sigma) > 1:  # Euler and its like scale the latents to a signal of 1
            sample = sample * signal
        if kind == "v_prediction":
            return signal * sample - noise * output
        return (sample - noise * output) / signal


def _decoded(pipe: Any, latents: "torch.Tensor") -> "Image.Image":
    """Return the image of the first latents, averaged to at most 32x32."""
    import torch
    from torch.nn.functional import interpolate

    vae = pipe.vae
    factor = min(1.0, _PREVIEW_LATENTS / max(latents.shape[2:]))
    size = [max(1, round(side * factor)) for side in latents.shape[2:]]
    small = interpolate(latents[:1].float(), size, mode="area")
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    dtype = vae.dtype
    is_too_narrow = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        if is_too_narrow:  # as the pipeline itself does; float16 survives the way there and back
            vae.to(torch.float32)
        decoded = vae.decode((small / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)).sample
    finally:
        if is_too_narrow:
            vae.to(dtype)
    image: Image.Image = pipe.image_processor.postprocess(decoded.nan_to_num())[0]
    return image
