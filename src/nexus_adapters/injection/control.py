"""A control: an adapter, its condition, and when, where and how strongly it acts."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Generic, TypeVar, overload

from torch import Tensor, nn

from nexus_adapters.injection.condition import ConditionLike, as_condition
from nexus_adapters.injection.fit import traits

POLICIES = ("positive", "per_branch", "cond_only")

T = TypeVar("T")


class Checked(Generic[T]):
    """An attribute that is checked and converted at every assignment, so that live changes are safe too.

    `changes_features` says that features computed before the assignment no longer hold.
    """

    def __init__(self, check: Callable[["Control", Any], T], changes_features: bool = False) -> None:
        self.check = check
        self.changes_features = changes_features

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, control: None, owner: type) -> "Checked[T]": ...
    @overload
    def __get__(self, control: "Control", owner: type) -> T: ...
    def __get__(self, control: Any, owner: type) -> Any:
        return self if control is None else control.__dict__[self.name]

    def __set__(self, control: "Control", value: Any) -> None:
        control.__dict__[self.name] = self.check(control, value)
        if self.changes_features:
            control.revision += 1


def check_number(value: object, name: str) -> float:
    """`value` as a float; ValueError unless it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number; received {value!r}")
    return float(value)


def check_window(
    start: object, end: object, names: tuple[str, str] = ("start", "end")
) -> tuple[float, float]:
    """(start, end) as floats; ValueError unless 0 <= start <= end <= 1."""
    first, last = check_number(start, names[0]), check_number(end, names[1])
    if not 0 <= first <= last <= 1:
        raise ValueError(f"{names[0]}, {names[1]}: expected 0 <= start <= end <= 1; received {first}, {last}")
    return first, last


def _check_policy(_: "Control", value: object) -> str:
    if value not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; received {value!r}")
    return str(value)


def _not_available(name: str) -> Callable[["Control", object], None]:
    def check(_: "Control", value: object) -> None:
        if value is not None:
            raise ValueError(
                f"{name}: not available in this version; expected None, received {type(value).__name__}"
            )

    return check


class Control:
    """An adapter with its condition and settings, for `attach`. All but the adapter may be changed live.

    Args:
        adapter: a `NexusAdapter` (or a diffusers `T2IAdapter`, which does not read the prompt).
        condition: structure maps: a PIL image, a tensor (K, C, H, W) in [0, 1], or a list of PIL images or of
            tensors (C, H, W) or (1, C, H, W). One serves any number of images; otherwise the number of images
            must be a multiple of K, and each map serves that many consecutive ones. It is copied: to change
            it, assign a new one. Reading gives the tensor (K, C, H, W).
        scale: factor of the features; any finite number, and 0 is exactly the base model.
        start, end: the part of the noise schedule in which the control acts, 0 <= start <= end <= 1. Position
            is 1 - t / num_train_timesteps, whichever steps a pipeline takes (image-to-image starts late;
            diffusers' ControlNet instead counts the steps taken). 0 and 1 always include the ends.
        policy: "positive": the adapter reads the prompt, and all guidance branches get its features, as in
            the paper's release. "per_branch": each row gets features of its own text. "cond_only": the
            negative branch gets none.
        mask, level_scales, crop: not available in this version.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """

    condition = Checked[Tensor](
        lambda control, value: as_condition(value, traits(control.adapter).in_channels), changes_features=True
    )
    scale = Checked[float](lambda _, value: check_number(value, "scale"))
    start = Checked[float](lambda control, value: check_window(value, control.__dict__.get("end", 1.0))[0])
    end = Checked[float](lambda control, value: check_window(control.start, value)[1])
    policy = Checked[str](_check_policy, changes_features=True)
    mask = Checked[None](_not_available("mask"))
    level_scales = Checked[None](_not_available("level_scales"))
    crop = Checked[None](_not_available("crop"))

    def __init__(
        self,
        adapter: nn.Module | Any,
        condition: ConditionLike,
        scale: float | int = 1.0,
        start: float | int = 0.0,
        end: float | int = 1.0,
        mask: object = None,
        policy: str = "positive",
        level_scales: object = None,
        crop: object = None,
    ) -> None:
        self.revision = 0  # counts changes after which features must be computed again
        traits(adapter)  # refuses what is no adapter
        self._adapter = adapter
        self.condition = condition
        self.scale = scale
        check_window(start, end)
        self.start, self.end = start, end
        self.mask = mask
        self.policy = policy
        self.level_scales = level_scales
        self.crop = crop

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse settings that do not exist: a misspelled one would do nothing, without a word."""
        if name not in ("revision", "_adapter") and not hasattr(type(self), name):
            known = ", ".join(key for key, kind in vars(Control).items() if isinstance(kind, Checked))
            raise AttributeError(f"expected one of {known}; received {name}")
        super().__setattr__(name, value)

    @property
    def adapter(self) -> nn.Module:
        """The adapter; fixed, since `attach` has checked that it fits the UNet."""
        return self._adapter

    @property
    def is_windowed(self) -> bool:
        """Whether the control acts in only a part of the schedule."""
        return self.start > 0 or self.end < 1

    def acts_at(self, position: float) -> bool:
        """Whether it acts at `position` in the schedule, 0 (noise) to 1 (image)."""
        return (self.start == 0 or position >= self.start) and (self.end == 1 or position <= self.end)
