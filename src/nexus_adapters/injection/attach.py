"""`attach`: add controls to a denoiser, whichever pipeline calls it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from itertools import combinations
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from nexus_adapters.bases.base import Base, Branches, CallingPipeline, parse_branches
from nexus_adapters.bases.families import base_of, layers
from nexus_adapters.errors import InvalidArgument, warn_caller
from nexus_adapters.injection.acting import ActingRecord
from nexus_adapters.injection.branches import call_layout, check_policy, plan_branches
from nexus_adapters.injection.calling_pipeline import NO_PIPELINE, calling_pipeline, check_crop, is_calling
from nexus_adapters.injection.compatibility import check_fit, check_pixels
from nexus_adapters.injection.condition import ConditionLike
from nexus_adapters.injection.control import Control
from nexus_adapters.injection.denoiser_hook import (
    Arguments,
    Call,
    CallGuard,
    CallHooks,
    hook_calls,
    owners_of_hooks,
    parameter_names,
)
from nexus_adapters.injection.features import (
    FeatureCache,
    check_call,
    compute_features,
    content_of,
    scaled_rows,
)
from nexus_adapters.injection.places import FeaturePlaces, added
from nexus_adapters.injection.scales import Scale, check_schedule, schedule_position, training_timesteps


def attach(
    pipe_or_denoiser: nn.Module | Any,
    *controls: Control | Any,
    shared: bool = True,
    branches: Sequence[str] | Any = None,
) -> Attachment:
    """Add the controls' features to every call of the denoiser, until they are removed.

    Use it as a context manager, `with attach(pipe, control): ...`, or keep the handle and call `remove()`.
    You can change scale, condition and the other settings on the handle's `controls` at any time. Several
    controls add up; a control that repeats another gives a warning. After removal, also because of an
    exception, the denoiser is exactly as before; without an exception, a warning then names controls that
    never acted. All pipelines that share the denoiser share its controls, unless `shared` is False. Threads
    may attach and remove at any time.

    Args:
        pipe_or_denoiser: any pipeline of a known base family, such as one with a `UNet2DConditionModel`, or
            such a denoiser. A denoiser alone, like a pipeline with unknown guidance branches, needs
            `branches` or the policy "per_branch". `start`, `end`, a scale that changes along the schedule and
            a noise exponent need a pipeline.
        controls: one or more controls.
        shared: if False, the controls act only in calls by this pipeline from this thread. Needs a pipeline.
        branches: for an unknown pipeline, its guidance branches in the order of the batch, such as
            ("negative", "positive"), or ("positive",) without guidance.

    Returns:
        The handle.

    Raises:
        InvalidArgument: if an adapter does not fit the base (with both numbers), the policy needs a known
            pipeline, or the pipeline denoises tiles; in a call, if the number of conditions, the sizes or the
            arguments do not match.
        RuntimeError: in a call, if another thread is in a call of the same denoiser.
    """
    base, denoiser = base_of(pipe_or_denoiser)
    pipe = base.pipe
    if not controls or not all(isinstance(control, Control) for control in controls):
        received = ", ".join(type(control).__name__ for control in controls) or "no control"
        raise InvalidArgument("controls", "one or more controls", received)
    if pipe is None and not shared:
        raise InvalidArgument("shared", "True for a denoiser without a pipeline", False)
    declared = None if branches is None else parse_branches(branches)
    base.check_pipeline(pipe)
    _check_keywords(base, denoiser)
    for control in controls:
        check_fit(control.adapter, base)
        check_pixels(control.adapter, base, getattr(pipe, "vae_scale_factor", None))
        check_policy(base, pipe, control.policy, declared)
        if control.reads_position:
            check_schedule(pipe)
        if control.noise_exponent:
            base.noise_factors(0, control.noise_exponent)
    only_in = None if shared else threading.current_thread()
    _warn_of_repeated(controls, base, denoiser, only_in)
    return Attachment(base, denoiser, controls, declared, only_in)


def detach(pipe_or_denoiser: nn.Module | Any) -> None:
    """Remove all attachments to a pipeline's denoiser, from all threads, also if their handles are lost.

    Raises:
        InvalidArgument: if there is no denoiser, as in `attach`.
    """
    for attachment in owners_of_hooks(base_of(pipe_or_denoiser)[1]):
        attachment.remove()


class Attachment:
    """Controls attached to a denoiser; the result of `attach`.

    Change the settings of `controls` at any time. With a single control, `scale` and `condition` can also be
    read and set on the handle itself.
    """

    def __init__(
        self,
        base: Base,
        denoiser: nn.Module,
        controls: tuple[Control, ...],
        branches: Branches | None = None,
        only_in: threading.Thread | None = None,
    ) -> None:
        self.controls = controls
        self._only_in = only_in
        self._base = base
        self._denoiser = denoiser
        self._branches = branches
        self._names = parameter_names(denoiser)
        self._caches = tuple(FeatureCache() for _ in controls)
        self._guard = CallGuard(denoiser)
        self._attached = True
        self._records = tuple(
            ActingRecord(f"control {number} of {len(controls)}") for number in range(1, len(controls) + 1)
        )
        self._was_called = False
        self._was_called_elsewhere = False  # by its pipeline, in a thread where it does not act
        self._places = FeaturePlaces(denoiser, base.places())
        self._unhook = hook_calls(denoiser, CallHooks(self, self._before, self._after))

    @property
    def scale(self) -> Scale:
        """The scale of a single control. `InvalidArgument` if there are several."""
        return self._only_control().scale

    @scale.setter
    def scale(self, value: Scale | Any) -> None:
        self._only_control().scale = value

    @property
    def condition(self) -> Tensor:
        """A single control's condition, (K, C, H, W) in [0, 1]. `InvalidArgument` if there are several."""
        return self._only_control().condition

    @condition.setter
    def condition(self, value: ConditionLike) -> None:
        self._only_control().condition = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Reject unknown settings, which would silently do nothing."""
        if name[:1] != "_" and name != "controls" and not hasattr(type(self), name):
            raise AttributeError(
                f"the handle has no setting {name}: use scale or condition, or set it on one of `controls`"
            )
        super().__setattr__(name, value)

    def _only_control(self) -> Control:
        if len(self.controls) != 1:
            raise InvalidArgument(
                "controls", "a single control, or the setting on one of `controls`", len(self.controls)
            )
        return self.controls[0]

    def meets(self, pipe: Any, only_in: threading.Thread | None) -> bool:
        """Return whether it can act in a call together with an attachment to `pipe` and `only_in`.

        `only_in` is the thread of that attachment, or None if it is shared.
        """
        return (
            self._only_in is None or only_in is None or (self._only_in is only_in and self._base.pipe is pipe)
        )

    def remove(self) -> None:
        """Remove the controls and restore the denoiser exactly, in any order and as often as you like.

        A warning names controls that never acted.
        """
        try:
            self._report()
        finally:  # also if warnings are errors
            self._remove()

    def _report(self) -> None:
        if not self._attached:
            return
        for record in self._records:
            record.report()
        name = self._base.denoiser_name
        current = getattr(self._base.pipe, name, None)
        is_hooked = any(owner is self for owner in owners_of_hooks(self._denoiser))
        is_called = current is None or any(layer is self._denoiser for layer in layers(current))
        if not (is_hooked and is_called):
            warn_caller(
                f"the pipeline's {name} was replaced or compiled again after attach(), and the controls have "
                "not acted since then. Call attach() again"
            )
        elif self._was_called_elsewhere and not self._was_called:
            warn_caller(
                "the controls never acted: with shared=False they act only in the thread that called "
                "attach(), but the pipeline ran in another thread. Call attach() there, or omit shared=False"
            )

    def _remove(self) -> None:
        if self._attached:
            self._attached = False
            self._unhook()
            self._places.remove()
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
        if error is None:
            self.remove()
        else:  # the error matters more than a control that never acted
            self._remove()

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        self._places.clear()  # an interrupted call leaves its features behind
        if not self._attached or (self._only_in is not None and not self._is_own_call()):
            return None  # removed by another thread since the call began, or a call of another thread
        self._guard.enter()
        call = Call(self._names, args, kwargs)
        ours = self._features(call)
        if ours is None:
            return None
        self._base.check_call(call.get)
        present = {name: call.get(name) for name in self._places.keywords()}
        for name, features in self._places.arguments(ours, present).items():
            call = Call(self._names, *call.replace(name, features))
        return call.args, dict(call.kwargs)

    def _is_own_call(self) -> bool:
        is_here = threading.current_thread() is self._only_in
        # Calls in other threads are only checked until `_report` has what it needs.
        if not is_here and (self._was_called or self._was_called_elsewhere):
            return False
        if not is_calling(self._base.pipe, self._base, self._denoiser):
            return False
        self._was_called |= is_here
        self._was_called_elsewhere |= not is_here
        return is_here

    def _after(self) -> None:
        self._places.clear()
        self._guard.leave()

    def _features(self, call: Call) -> list[Tensor] | None:
        """Return the sum over the controls that act in this call; None (add nothing at all) if none does."""
        total = None
        if all(control.scale == 0 for control in self.controls):
            return total
        # If pipelines share the denoiser, the caller may not be the pipeline that was attached to; and its
        # layout is only known while it runs.
        calling = calling_pipeline(self._base, self._denoiser)
        for control, cache, record in zip(self.controls, self._caches, self._records, strict=True):
            scale, position = _scale(control, call, self._base, calling.pipe or self._base.pipe)
            record.note(scale, position)
            if scale != 0:
                image_size = check_crop(calling, control.crop)
                # If attached to a denoiser, the pipeline's layout is not used.
                laid_out = calling if self._base.pipe is not None else NO_PIPELINE
                ours = self._features_of(control, scale, cache, call, laid_out, image_size)
                total = ours if total is None else added("controls", total, ours)
        return total

    def _features_of(
        self,
        control: Control,
        scale: float,
        cache: FeatureCache,
        call: Call,
        calling: CallingPipeline,
        image_size: tuple[int, int] | None,
    ) -> list[Tensor]:
        base = self._base
        latents, text = check_call(base, call.get(base.latents_argument), call.get(base.text_argument))
        size = base.latent_size(latents, {name: call.get(name) for name in self._names})
        layout = call_layout(base, calling, control.policy, text, self._branches)
        plan, text = plan_branches(control.policy, layout, len(control.condition)), layout.text
        maps = content_of(control.condition), content_of(control.mask)
        key = (control.revision, maps, plan.key, size, latents.dtype, latents.device, image_size)
        # With gradients, each call needs its own graph.
        may_keep = not torch.is_grad_enabled()
        features = cache.find(key, text, control.adapter) if may_keep else None
        if features is None:
            features = compute_features(control, plan, base, latents, size, text, image_size)
            if may_keep:
                cache.keep(key, text, control.adapter, features)
        kept = features if plan.kept is None else [feature[plan.kept] for feature in features]
        return scaled_rows(kept, scale, plan.factors)


def _warn_of_repeated(
    controls: Sequence[Control], base: Base, denoiser: nn.Module, only_in: threading.Thread | None
) -> None:
    """Warn of controls that repeat each other or an attached one, as when a notebook cell runs again."""
    present = [
        control
        for attachment in owners_of_hooks(denoiser)
        if attachment.meets(base.pipe, only_in)
        for control in attachment.controls
    ]
    repeated = sum(any(_repeats(control, other) for other in present) for control in controls)
    if repeated:
        warn_caller(
            f"{repeated} of {len(controls)} controls are already attached with the same adapter and "
            "condition: their features add up. To replace an earlier attachment, call its remove() first, or "
            "nexus_adapters.injection.detach(pipe) if its handle is lost"
        )
    twins = [
        (first, second)
        for (first, a), (second, b) in combinations(enumerate(controls, start=1), 2)
        if _repeats(a, b)
    ]
    if twins:
        pairs = ", ".join(f"{first} and {second}" for first, second in twins)
        warn_caller(f"controls {pairs} have the same adapter and condition: their features add up")


def _repeats(control: Control, other: Control) -> bool:
    """Return whether both controls use the same adapter, condition and mask at overlapping positions."""
    return (
        max(control.start, other.start) < min(control.end, other.end)
        and _are_equal(control.condition, other.condition)
        and _are_equal(control.mask, other.mask)
        and _is_same_adapter(control.adapter, other.adapter)
    )


def _is_same_adapter(adapter: nn.Module, other: nn.Module) -> bool:
    """Return whether the adapters are one object, or have the same config and weights (loaded twice)."""
    if adapter is other:
        return True
    if type(adapter) is not type(other) or _config_of(adapter) != _config_of(other):
        return False
    ours, theirs = adapter.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(_are_equal(ours[name], theirs[name]) for name in ours)


def _config_of(adapter: Any) -> str:
    """Return the config that decides the network, without diffusers' own entries, which start with "_"."""
    public = {name: value for name, value in adapter.config.items() if name[:1] != "_"}
    return json.dumps(public, sort_keys=True, default=repr)  # a loaded config has lists instead of tuples


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors have equal values, on any device, in any dtype; False for offloaded ones."""
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    return torch.equal(a.float(), b.to(a.device).float())


def _check_keywords(base: Base, denoiser: nn.Module) -> None:
    missing = {place.keyword for place in base.places()} - {"", *parameter_names(denoiser)}
    if missing:  # a copy of an old diffusers model
        raise InvalidArgument(
            "pipe_or_denoiser",
            f"a denoiser whose forward() takes {', '.join(sorted(missing))}",
            f"a {type(denoiser).__name__} without it",
        )


def _scale(control: Control, call: Call, base: Base, pipe: Any) -> tuple[float, float | None]:
    """Return the control's factor in a call, and the position in the schedule, None if it is not needed."""
    # The timestep is not read unless needed: on an accelerator, reading it would stall every step.
    if not control.reads_position:
        return control.scale_at(None), None
    steps = training_timesteps(pipe)
    position = schedule_position(call.get("timestep"), steps)
    scale = control.scale_at(position)
    if control.noise_exponent and scale:
        timestep = (1 - position) * steps
        scale *= float(base.bound_to(pipe).noise_factors(timestep, control.noise_exponent))
    return scale, None if control.scale == 0 else position
