"""`attach`: controls onto a UNet, whichever pipeline calls it."""

import threading
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from nexus_adapters.adapter.geometry import unet_config
from nexus_adapters.injection.cache import FeatureCache
from nexus_adapters.injection.calls import Arguments, Call, CallGuard, hook_calls, parameter_names
from nexus_adapters.injection.condition import ConditionLike
from nexus_adapters.injection.control import Control
from nexus_adapters.injection.features import check_call, compute_features
from nexus_adapters.injection.fit import check_fit, check_pixels
from nexus_adapters.injection.residuals import ARGUMENT, add_residuals, residuals
from nexus_adapters.injection.rows import call_layout, check_policy, plan_rows
from nexus_adapters.injection.running import Running, is_running, refuse_tiled, running_pipeline
from nexus_adapters.injection.schedule import noise_factors, schedule_position, training_timesteps
from nexus_adapters.injection.strength import Scale


def attach(
    pipe_or_unet: DiffusionPipeline | nn.Module | Any, *controls: Control | Any, shared: bool = True
) -> "Attachment":
    """Add the controls' features to every call of the UNet, until removed.

    As a context manager, `with attach(pipe, control): ...`, or as a handle with `remove()`, on whose
    `controls` scale, condition and the other settings can be changed at any time. Several controls add up.
    After removal, also by an exception, the UNet is exactly as it was. All pipelines that share the UNet
    share its controls, unless told otherwise. A UNet that is to be compiled must be compiled first.

    Args:
        pipe_or_unet: any pipeline with a `UNet2DConditionModel`, or such a UNet. A bare UNet, like a
            pipeline whose batch layout is not known, needs the policy "per_branch"; a schedule window, a
            scale that changes along the schedule, or a noise exponent needs a pipeline.
        controls: one or more.
        shared: False: they act in calls by this very pipeline from this thread, and no other's. Needs a
            pipeline.

    Raises:
        ValueError: where an adapter and the UNet do not fit (both numbers), the policy needs a known
            pipeline, or the pipeline denoises tiles. In a call: where the counts of conditions and images,
            the sizes, or the arguments do not agree.
        RuntimeError: in a call, for two calls at once through the UNet.
    """
    pipe = None if isinstance(pipe_or_unet, nn.Module) else pipe_or_unet
    unet = pipe_or_unet if pipe is None else getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ValueError(
            f"pipe_or_unet: expected a pipeline with a UNet; received a {type(pipe_or_unet).__name__}"
        )
    unet_config(unet)
    if not controls or not all(isinstance(control, Control) for control in controls):
        received = ", ".join(type(control).__name__ for control in controls) or "none"
        raise ValueError(f"controls: expected one or more of Control; received {received}")
    if pipe is None and not shared:
        raise ValueError("shared: expected True for a bare UNet, which no pipeline calls; received False")
    refuse_tiled(pipe)
    for control in controls:
        check_fit(control.adapter, unet)
        check_pixels(control.adapter, unet, getattr(pipe, "vae_scale_factor", None))
        check_policy(pipe, control.policy)
        if control.reads_position:
            training_timesteps(pipe)
        if control.noise_exponent:
            noise_factors(getattr(pipe, "scheduler", None), 0, control.noise_exponent)
    return Attachment(unet, pipe, controls, None if shared else threading.current_thread())


class Attachment:
    """Controls attached to a UNet; made by `attach`. `controls` are the ones given, to be changed live.

    Of a single control, scale and condition can be read and set on the handle itself.
    """

    def __init__(
        self,
        unet: nn.Module,
        pipe: DiffusionPipeline | None,
        controls: tuple[Control, ...],
        only_in: threading.Thread | None = None,
    ) -> None:
        self.controls = controls
        self._only_in = only_in
        self._unet = unet
        self._pipe = pipe
        self._names = parameter_names(unet)
        self._caches = tuple(FeatureCache() for _ in controls)
        self._guard = CallGuard(unet)
        self._attached = True
        self._unhook = hook_calls(unet, self._before, self._after)

    @property
    def scale(self) -> Scale:
        """The only control's scale; ValueError where there are several."""
        return self._only_control().scale

    @scale.setter
    def scale(self, value: Scale | Any) -> None:
        self._only_control().scale = value

    @property
    def condition(self) -> Tensor:
        """The only control's condition, (K, C, H, W) in [0, 1]; ValueError where there are several."""
        return self._only_control().condition

    @condition.setter
    def condition(self, value: ConditionLike) -> None:
        self._only_control().condition = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what is no setting of the handle: it would do nothing, without a word."""
        if name[:1] != "_" and name != "controls" and not hasattr(type(self), name):
            raise AttributeError(
                f"expected scale or condition, or the setting on one of `controls`; received {name}"
            )
        super().__setattr__(name, value)

    def _only_control(self) -> Control:
        if len(self.controls) != 1:
            raise ValueError(
                "controls: expected a single one, or the setting on one of `controls`; received "
                f"{len(self.controls)}"
            )
        return self.controls[0]

    def remove(self) -> None:
        """Leave the UNet exactly as it was. In any order among several attachments; again is no harm."""
        if self._attached:
            self._attached = False
            self._unhook()
            for cache in self._caches:
                cache.clear()

    def __enter__(self) -> Self:
        if not self._attached:
            raise RuntimeError("this attachment has been removed; call attach() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self._only_in is not None and not self._is_own_call():
            return None
        self._guard.enter()
        call = Call(self._names, args, kwargs)
        ours = self._residuals(call)
        if ours is None:
            return None
        if call.get("down_block_additional_residuals") is not None and (
            call.get("mid_block_additional_residual") is None
        ):
            raise ValueError(
                "down_block_additional_residuals: expected mid_block_additional_residual with it, as from a "
                f"ControlNet, or {ARGUMENT} in its place: the UNet would drop it; received it alone"
            )
        return call.replace(ARGUMENT, add_residuals(call.get(ARGUMENT), ours))

    def _is_own_call(self) -> bool:
        return threading.current_thread() is self._only_in and is_running(self._pipe, self._unet)

    def _after(self, *_: object) -> None:
        self._guard.leave()

    def _residuals(self, call: Call) -> list[Tensor] | None:
        """The sum over the controls that act in this call; None where none does: not even zeros are added."""
        total = None
        if all(control.scale == 0 for control in self.controls):
            return total
        # Where pipelines share the UNet, the one that runs is not always the one that was attached to; and
        # what it says of its layout holds only while it runs.
        running = running_pipeline(self._unet)
        for control, cache in zip(self.controls, self._caches, strict=True):
            scale = _scale(control, call, running.pipe or self._pipe)
            if scale != 0:
                running.check_crop(control.crop)
                # One that was attached to the UNet promises no layout.
                laid_out = running if self._pipe is not None else Running(None, {})
                total = add_residuals(total, self._residuals_of(control, scale, cache, call, laid_out))
        return total

    def _residuals_of(
        self, control: Control, scale: float, cache: FeatureCache, call: Call, running: Running
    ) -> list[Tensor]:
        latents, text = check_call(call.get("sample"), call.get("encoder_hidden_states"))
        layout = call_layout(running, control.policy, text)
        plan, text = plan_rows(control.policy, layout, len(control.condition)), layout.text
        key = (control.revision, plan.computed, latents.shape[2:], latents.dtype, latents.device)
        # With gradients each call needs a graph of its own.
        may_keep = not torch.is_grad_enabled()
        features = cache.find(key, text, control.adapter) if may_keep else None
        if features is None:
            features = compute_features(control, plan, self._unet, latents, text)
            if may_keep:
                cache.keep(key, text, control.adapter, features)
        kept = features if plan.kept is None else [feature[: plan.kept] for feature in features]
        return residuals(kept, scale, plan.factors)[ARGUMENT]


def _scale(control: Control, call: Call, pipe: DiffusionPipeline | None) -> float:
    # Where nothing depends on it the timestep is not read: on an accelerator that would stall every step.
    if not control.reads_position:
        return control.scale_at(None)
    steps = training_timesteps(pipe)
    position = schedule_position(call.get("timestep"), steps)
    scale = control.scale_at(position)
    if control.noise_exponent and scale:
        scheduler = getattr(pipe, "scheduler", None)
        scale *= float(noise_factors(scheduler, (1 - position) * steps, control.noise_exponent))
    return scale
