"""What to generate, as frozen dataclasses that check their values.

An `InvalidArgument` names the argument, such as "scale" or, for an option of an extractor, "option sigma".
Each surface replaces the names by its own: `--scale`, or the label of a slider.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nexus_adapters.bundled import EMBEDDED
from nexus_adapters.choices import (
    BALANCE_NAMES,
    CONDITION,
    DEFAULT_POLICY,
    DEVICES,
    DTYPES,
    MAX_MEGAPIXELS,
    MAX_SEED,
    MAX_STEPS,
    POLICIES,
    RESIZE_MODES,
    STEPS,
    Balance,
    Device,
    Dtype,
    Policy,
    ResizeMode,
)
from nexus_adapters.errors import InvalidArgument, expect, expect_between, expect_finite

if TYPE_CHECKING:
    from nexus_adapters.bases.loading import BaseSource

ADAPTER = "prime"
"""The default adapter for an embedded base."""

# Name -> diffusers class, and changes to the base's own scheduler config.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


# Structure maps.


@dataclass(frozen=True)
class ExtractorOptions:
    """Options of an extractor: canny's thresholds, and texts KEY=VALUE. The extractor decides their types."""

    low: float | None = None
    high: float | None = None
    pairs: tuple[str, ...] = ()

    def values(self, condition_name: str) -> dict[str, Any]:
        """Return the options for the extractor of this name. `InvalidArgument` is named "option"."""
        given = {"low": self.low, "high": self.high}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for key, value in (read_pairs(self.pairs, "option", condition_name) if self.pairs else {}).items():
            expect(key not in options, "option", f"{key} once", f"{key}={value} and `{key}`")
            options[key] = value
        return options


def read_pairs(pairs: Sequence[str], argument: str, condition_name: str) -> dict[str, Any]:
    """Parse KEY=VALUE pairs: values stay text if the extractor's option is text, else they are TOML."""
    from nexus_adapters.conditions import EXTRACTORS

    defaults = EXTRACTORS[condition_name].defaults() if condition_name in EXTRACTORS else {}
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        expect(bool(equals and key), argument, "KEY=VALUE", f"'{pair}'")
        expect(key not in found, argument, f"{key} once", f"{key} twice, the second as '{pair}'")
        found[key] = text if isinstance(defaults.get(key), str) else _by_toml(text)
    return found


def _by_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@dataclass(frozen=True)
class ImageSource:
    """A photo to extract the structure map from."""

    file: str
    extractor: ExtractorOptions = field(default_factory=ExtractorOptions)
    argument: ClassVar[str] = "image"


@dataclass(frozen=True)
class MapSource:
    """A structure map, and the options for reading it, such as `unit=mm` for depth."""

    file: str
    reading: ExtractorOptions = field(default_factory=ExtractorOptions)
    argument: ClassVar[str] = "map"


# Controls.


@dataclass(frozen=True)
class ControlRequest:
    """One control: the source of its structure map, and how it acts.

    Attributes:
        given: the map, or the photo to extract it from.
        condition_name: the extractor's name, which is also the map's condition.
        adapter: the adapter's source, as the user wrote it.
        scale, start, end, level_scales, noise_exponent: as in `Control`.
        policy: None for the default, or if `balance` decides it.
        balance: sets the policy and the level scales.
        mask: path of the mask's file.
        invert: whether to invert the map; None inverts a given map that has dark lines on white.
        resize_mode: how to fit a map or photo whose aspect ratio differs from the image's.
        max_megapixels: larger files are rejected.

    Raises:
        InvalidArgument: named after an attribute, or "option KEY".
    """

    given: ImageSource | MapSource
    condition_name: str = CONDITION
    adapter: str = ADAPTER
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    policy: Policy | None = None
    balance: Balance | None = None
    level_scales: tuple[float, ...] | None = None
    noise_exponent: float | None = None
    mask: str | None = None
    invert: bool | None = None
    resize_mode: ResizeMode | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    def __post_init__(self) -> None:
        if isinstance(self.given, MapSource):
            _check_map_options(self.given.reading.values(self.condition_name), self.condition_name)
        for name in ("scale", "start", "end"):
            expect_finite(name, getattr(self, name))
        expect(0 <= self.start <= 1, "start", "a number from 0 to 1", self.start)
        is_interval = self.start <= self.end <= 1
        expect(is_interval, "end", f"a number from `start`, {self.start}, to 1", self.end)
        if self.noise_exponent is not None:
            expect_finite("noise_exponent", self.noise_exponent)
            expect(self.noise_exponent >= 0, "noise_exponent", "at least 0", self.noise_exponent)
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("balance", self.balance, BALANCE_NAMES)
        _check_choice("resize_mode", self.resize_mode, RESIZE_MODES)
        for name in ("policy", "level_scales"):
            is_alone = self.balance is None or getattr(self, name) is None
            expect(is_alone, "balance", f"no `{name}` in addition", f"'{self.balance}' and `{name}`")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `Control` other than adapter, condition and mask."""
        settings: dict[str, Any] = {
            "scale": self.scale,
            "start": self.start,
            "end": self.end,
            "noise_exponent": self.noise_exponent,
            "resize_mode": self.resize_mode,
        }
        if self.balance is not None:
            from nexus_adapters.injection import balance

            return settings | balance(self.balance)
        return settings | {"policy": self.policy or DEFAULT_POLICY, "level_scales": self.level_scales}


ACTING = ("scale", "start", "end", "policy", "balance", "level_scales", "noise_exponent", "mask")
"""The attributes of a control that say how it acts."""


def _check_map_options(options: dict[str, Any], condition_name: str) -> None:
    """Raise `InvalidArgument` for options that do not describe a map's values, as `unit` does for depth."""
    if not options:
        return
    from nexus_adapters.conditions import EXTRACTORS
    from nexus_adapters.conditions.maps import MAP_OPTIONS

    if condition_name not in EXTRACTORS:  # rejected when the map is read
        return
    extractor = EXTRACTORS[condition_name]
    known = [name for name in MAP_OPTIONS[extractor.kind] if name != "invert"]
    for name, value in options.items():
        argument = name if name in ("low", "high") else f"option {name}"
        if name == "invert":
            raise InvalidArgument(argument, "`invert` or `no_invert`", repr(value))
        hint = "It is an option of the extractor; use it with `image`" if extractor.takes(name) else ""
        expected = f"an option for {condition_name} maps ({', '.join(known) or 'there are none'})"
        expect(name in known, argument, expected, repr(value), hint)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    expect(value is None or value in choices, name, f"one of {', '.join(choices)}", repr(value))


# The whole image.


@dataclass(frozen=True)
class BaseRequest:
    """The base; see `BaseSource`."""

    path: str = EMBEDDED
    config: str | None = None
    prediction_type: str | None = None

    @property
    def source(self) -> "BaseSource":
        """The argument of `load_base`."""
        from nexus_adapters.bases.loading import BaseSource

        return BaseSource(self.path, config=self.config or "", prediction_type=self.prediction_type or "")


@dataclass(frozen=True)
class LoraRequest:
    """LoRA weights (a file, folder or Hub id) and their strength."""

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        expect_finite("lora_scale", self.scale)


@dataclass(frozen=True)
class GenerateRequest:
    """An image to generate, or several that differ by their seeds.

    Attributes:
        controls: the controls, at least one.
        scheduler: a name in `SCHEDULERS`; None for the base's own scheduler.
        seed: the seed of the first image.
        width, height: in pixels; None to derive them from the first control's image.

    Raises:
        InvalidArgument: named after an attribute, or "width and height".
    """

    prompt: str
    controls: tuple[ControlRequest, ...]
    guidance: float
    negative: str = ""
    base: BaseRequest = field(default_factory=BaseRequest)
    loras: tuple[LoraRequest, ...] = ()
    device: Device = "auto"
    dtype: Dtype = "auto"
    scheduler: str | None = None
    steps: int = STEPS
    seed: int = 0
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        expect(bool(self.controls), "controls", "at least one", "none")
        expect_finite("guidance", self.guidance)
        expect_between("steps", self.steps, 1, MAX_STEPS)
        expect_between("seed", self.seed, 0, MAX_SEED)
        _check_choice("scheduler", self.scheduler, sorted(SCHEDULERS))
        _check_choice("device", self.device, DEVICES)
        _check_choice("dtype", self.dtype, DTYPES)
        expect_side("width", self.width)
        expect_side("height", self.height)
        if self.width is not None and self.height is not None:
            expect_area(self.width, self.height)


def expect_side(argument: str, value: int | None) -> None:
    """Raise `InvalidArgument` unless the side, in pixels, is a positive multiple of 8; None is accepted."""
    expect(value is None or (value > 0 and value % 8 == 0), argument, "a positive multiple of 8", value)


def expect_area(width: int, height: int) -> None:
    """Raise `InvalidArgument` for an image of more than `MAX_MEGAPIXELS`."""
    size = f"{width}x{height}"
    fits = width * height <= MAX_MEGAPIXELS * 1_000_000
    expect(fits, "width and height", f"an image of at most {MAX_MEGAPIXELS} megapixels", size)
