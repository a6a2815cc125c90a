"""A control: an adapter, its condition, and when, where and how strongly it acts."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Generic, TypeAlias, TypeVar, overload

from torch import Tensor, nn

from nexus_adapters.adapter.arguments import check_noise_exponent
from nexus_adapters.choices import (
    DEFAULT_POLICY,
    MAP_KINDS,
    POLICIES,
    RESIZE_MODES,
    MapKind,
    ResizeMode,
)
from nexus_adapters.conditions.maps import check_invert, is_choice
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.injection.compatibility import geometry_of
from nexus_adapters.injection.condition import ConditionLike, as_condition, as_mask, report_photos
from nexus_adapters.injection.scales import (
    Scale,
    check_image_scales,
    check_level_scales,
    check_one_each,
    check_scale,
    check_start_end,
    scale_at,
)

Crop: TypeAlias = tuple[int, int, int, int]

T = TypeVar("T")


class Checked(Generic[T]):
    """An attribute that is checked and converted at every assignment, so that live changes are safe.

    With `changes_features`, an assignment invalidates cached features; with `reads_again`, the condition is
    read again from the user's value.
    """

    def __init__(
        self,
        check: Callable[["Control", Any], T],
        changes_features: bool = False,
        reads_again: bool = False,
    ) -> None:
        self.check = check
        self.changes_features = changes_features
        self.reads_again = reads_again

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, control: None, owner: type) -> "Checked[T]": ...
    @overload
    def __get__(self, control: "Control", owner: type) -> T: ...
    def __get__(self, control: Any, owner: type) -> Any:
        return self if control is None else control.__dict__[self.name]

    def __set__(self, control: "Control", value: Any) -> None:
        before = control.__dict__.get(self.name)
        control.__dict__[self.name] = self.check(control, value)
        if self.changes_features:
            control.revision += 1
        if self.reads_again and _GIVEN in control.__dict__:
            try:
                control.condition = control.__dict__[_GIVEN]
            except InvalidArgument:
                control.__dict__[self.name] = before
                raise


_GIVEN = "_given"  # a copy of the user's value of the condition


def _check_policy(_: "Control", value: object) -> str:
    if not is_choice(value, POLICIES):
        raise InvalidArgument("policy", f"one of {', '.join(POLICIES)}", repr(value))
    return str(value)


def _trained_exponent(control: "Control") -> Any:
    config: Any = control.adapter.config
    return config.get("noise_exponent", 0.0)


def _check_crop(_: "Control", value: Any) -> Crop | None:
    """Check that `value` is None or a box. Whether it lies in the condition is checked in each call."""
    if value is None:
        return None
    is_box = isinstance(value, (tuple, list)) and len(value) == 4
    if not is_box or not all(isinstance(side, Integral) and not isinstance(side, bool) for side in value):
        raise InvalidArgument("crop", "(left, top, right, bottom) in whole pixels", repr(value))
    left, top, right, bottom = (int(side) for side in value)
    if not (0 <= left < right and 0 <= top < bottom):
        raise InvalidArgument("crop", "0 <= left < right and 0 <= top < bottom", repr(value))
    return left, top, right, bottom


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value is not None and not is_choice(value, choices):
        raise InvalidArgument(name, f"None or one of {', '.join(choices)}", repr(value))
    return value


def _check_invert(value: Any) -> bool | None:
    check_invert(value)
    return value if value is None else bool(value)


def _read_condition(control: "Control", value: Any) -> Tensor:
    channels = geometry_of(control.adapter).in_channels
    condition = as_condition(value, channels, kind=control.kind, invert=control.invert)
    if control.kind is None and getattr(control.adapter, "condition_kind", None) == "lines":
        report_photos(condition, "condition")
    control.__dict__[_GIVEN] = _copied(value)
    return condition


def _copied(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_copied(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value.copy()  # an image or an array


class Control:
    """An adapter with its condition and settings, for `attach`. All but the adapter may change at any time.

    Args:
        adapter: a `NexusAdapter`, or a diffusers `T2IAdapter`, which does not read the prompt.
        condition: structure maps, as in `as_condition`: a PIL image, a tensor (C, H, W) or (K, C, H, W), or a
            NumPy array (H, W), (H, W, C), (C, H, W), (K, H, W, C) or (K, C, H, W), of floats in [0, 1],
            uint8, or uint16 if gray, or a list of K of these. A single map is used for any number of images;
            with K maps, the number of images n must be a multiple of K, and each map is used for n / K
            consecutive images. It is copied: to change it, assign a new one. Reading it returns the tensor
            (K, C, H, W).
        scale: factor of the features: any finite number; 0 is exactly the base model. Or a function that
            returns the factor for a position in the schedule, 0 (noise) to 1 (image); or a list of n numbers,
            each for one nth of the schedule.
        start: where in the noise schedule the control starts to act, 0 <= start <= end <= 1. The position is
            1 - t / num_train_timesteps, whichever steps a pipeline takes: image-to-image starts late.
            (diffusers' ControlNet counts the steps instead.) 0 always includes the first step.
        end: where in the noise schedule the control stops acting. 1 always includes the last step.
        policy: "positive": the adapter reads the prompt, and all guidance branches get its features, as in
            the paper's release. "per_branch": each row gets the features of its own text. "cond_only": the
            negative branch gets no features.
        mask: where the control acts: fully where the mask is white, partly where it is gray, not where it is
            black. A PIL image, a tensor (K, 1, H, W) in [0, 1], or a list of these; one for all conditions or
            one each. It covers the image like the condition, in any resolution; a feature gets the mean over
            its pixels.
        level_scales: an additional factor per feature, finest first; or a name: "balanced" is 1 for all,
            "prompt" is 0.25, 0.62, 0.825, 1. See also `balance`.
        noise_exponent: in each step, the features are multiplied by the noise's share of the latents'
            variance to this power (`noise_factors`); 0 turns this off. None uses the value that the adapter
            was trained with.
        crop: (left, top, right, bottom): the part of the condition that the latents show. With
            `padding_mask_crop`, this must be
            `pipe.mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)`, in pixels
            of the `mask_image`, whatever the condition's size. Otherwise, it is in pixels of the condition.
        kind: kind of the condition, which decides how it is read (`read_map`) and resized (`fit_condition`):
            "lines", "labels", "depth" or "image". None guesses it for each map (`judge_kind`); for an
            extractor's maps, it is `find_extractor(name).kind`. If `kind` or `invert` changes, the condition
            is read again.
        resize_mode: how to fit a condition and mask whose aspect ratio differs from the image's: "stretch",
            "crop" (keep the center) or "pad" (keep all, on black for lines, else with the border pixels
            repeated). None raises an error.
        invert: whether to invert the condition. None inverts dark lines on white, with a warning.
        image_scales: an additional factor for each of several conditions: the strength of each image. (In
            contrast, a list for `scale` is a schedule.)

    Raises:
        InvalidArgument: names the argument, what was expected and what was received.
    """

    condition = Checked[Tensor](_read_condition, changes_features=True)
    scale = Checked[Scale](lambda _, value: check_scale(value))
    start = Checked[float](lambda control, value: check_start_end(value, control.__dict__.get("end", 1.0))[0])
    end = Checked[float](lambda control, value: check_start_end(control.start, value)[1])
    policy = Checked[str](_check_policy, changes_features=True)
    mask = Checked[Tensor | None](lambda _, value: as_mask(value), changes_features=True)
    level_scales = Checked[tuple[float, ...] | None](
        lambda control, value: check_level_scales(value, len(geometry_of(control.adapter).channels)),
        changes_features=True,
    )
    crop = Checked[Crop | None](_check_crop, changes_features=True)
    kind = Checked[MapKind | None](
        lambda _, value: _check_choice("kind", value, MAP_KINDS), changes_features=True, reads_again=True
    )
    resize_mode = Checked[ResizeMode | None](
        lambda _, value: _check_choice("resize_mode", value, RESIZE_MODES), changes_features=True
    )
    invert = Checked[bool | None](lambda _, value: _check_invert(value), reads_again=True)
    image_scales = Checked[tuple[float, ...] | None](
        lambda _, value: check_image_scales(value), changes_features=True
    )
    noise_exponent = Checked[float](
        lambda control, value: check_noise_exponent(_trained_exponent(control) if value is None else value)
    )

    def __init__(
        self,
        adapter: nn.Module | Any,
        condition: ConditionLike,
        scale: float | int | Callable[[float], float] | Sequence[float] | Any = 1.0,
        start: float | int = 0.0,
        end: float | int = 1.0,
        mask: ConditionLike | None = None,
        policy: str = DEFAULT_POLICY,
        level_scales: Sequence[float] | str | Any = None,
        crop: tuple[int, int, int, int] | Any = None,
        noise_exponent: float | Any = None,
        kind: MapKind | Any = None,
        resize_mode: ResizeMode | Any = None,
        invert: bool | Any = None,
        image_scales: Sequence[float] | Any = None,
    ) -> None:
        self.revision = 0  # counts changes that invalidate cached features
        geometry_of(adapter)  # raises unless it is an adapter
        self._adapter = adapter
        self.kind, self.resize_mode, self.invert = kind, resize_mode, invert
        self.condition = condition
        self.scale = scale
        check_start_end(start, end)
        self.start, self.end = start, end
        self.mask = mask
        self.policy = policy
        self.level_scales = level_scales
        self.crop = crop
        self.noise_exponent = noise_exponent
        self.image_scales = image_scales
        check_one_each("image_scales", self.image_scales, len(self.condition))

    def __setattr__(self, name: str, value: Any) -> None:
        """Reject unknown settings: a misspelled one would silently do nothing."""
        if name not in ("revision", "_adapter") and not hasattr(type(self), name):
            known = ", ".join(key for key, kind in vars(Control).items() if isinstance(kind, Checked))
            raise AttributeError(f"a control has no setting {name}; it has {known}")
        super().__setattr__(name, value)

    @property
    def adapter(self) -> nn.Module:
        """The adapter. It cannot be changed, since `attach` has checked that it fits the denoiser."""
        return self._adapter

    @property
    def acts_throughout(self) -> bool:
        """Whether the control acts in the whole schedule."""
        return self.start == 0 and self.end == 1

    @property
    def reads_position(self) -> bool:
        """Whether the control's effect depends on the position in the schedule."""
        return not self.acts_throughout or not isinstance(self.scale, float) or self.noise_exponent > 0

    def scale_at(self, position: float | None) -> float:
        """Return the scale at a position in the schedule, 0 (noise) to 1 (image).

        It is 0 before `start` and after `end`, and does not include `noise_exponent`, which needs a
        scheduler. `position` may be None if the scale does not depend on it.
        """
        if isinstance(self.scale, float) and self.acts_throughout:
            return self.scale
        assert position is not None
        is_inside = (self.start == 0 or position >= self.start) and (self.end == 1 or position <= self.end)
        return scale_at(self.scale, position) if is_inside else 0.0
