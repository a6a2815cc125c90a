"""The values of the page, and the request they stand for.

Pictures are saved first: the command line reads the same files in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from nexus_adapters.app.canvas import Drawn
from nexus_adapters.app.models import Models
from nexus_adapters.choices import CONDITION, DEFAULT_POLICY, STEPS, Policy, ResizeMode
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.generation.requests import ControlRequest, GenerateRequest, ImageSource, MapSource

# Argument -> its label on the page.
LABELS: Mapping[str, str] = {
    "adapters": "Compare adapters, with the same seed",
    "condition": "Follow",
    "end": "Stop",
    "guidance": "Guidance",
    "height": "Height",
    "image": "Picture",
    "is_map": "The canvas shows",
    "map": "Structure map",
    "mask": "Mask",
    "negative": "Negative prompt",
    "noise_exponent": "Noise exponent",
    "policy": "Which prompts the adapter reads",
    "prompt": "Prompt",
    "resize_mode": "If the shape differs",
    "scale": "Strength",
    "seed": "Seed",
    "start": "Start",
    "steps": "Steps",
    "width": "Width",
    "width and height": "Width and height",
}


def label_of(argument: str) -> str:
    """Return the page's label of an argument; names without one stay."""
    return LABELS.get(argument, argument)


@dataclass(frozen=True)
class ControlForm:
    """The values of one tab.

    Attributes:
        picture: what is on the canvas: a picture, or a structure map if `is_map`.
        map: the extracted map; it wins over the picture once the user edits it.
        mask: white where the control acts; empty for everywhere.
        condition: kind of structure map.
        is_map: whether `picture` is a structure map.
        scale, start, end, policy, noise_exponent: as in `ControlRequest`; None for an empty field.
    """

    picture: Drawn = field(default_factory=Drawn)
    map: Drawn = field(default_factory=Drawn)
    mask: Drawn = field(default_factory=Drawn)
    condition: str = CONDITION
    is_map: bool = False
    scale: float | None = 1.0
    start: float | None = 0.0
    end: float | None = 1.0
    policy: Policy = DEFAULT_POLICY
    noise_exponent: float | None = None

    @property
    def is_used(self) -> bool:
        """Whether there is anything on its canvases."""
        return self.picture.png is not None or (not self.is_map and self.map_wins)

    @property
    def map_wins(self) -> bool:
        """Whether the edited map replaces the picture."""
        return self.map.is_edited and self.map.png is not None


@dataclass(frozen=True)
class Form:
    """The values of the page, apart from the adapters to compare."""

    controls: tuple[ControlForm, ...]
    prompt: str = ""
    negative: str = ""
    seed: float | None = 0
    steps: float | None = STEPS
    guidance: float | None = None
    width: float | None = None
    height: float | None = None
    resize_mode: ResizeMode | None = None

    def request(self, models: Models, folder: Path) -> GenerateRequest:
        """Save the pictures to `folder`, and return the request, with any adapter.

        Raises:
            InvalidArgument: named after an argument.
        """
        used = [(place, control) for place, control in enumerate(self.controls, 1) if control.is_used]
        if not used:
            raise InvalidArgument("Control 1", "a drawing, a picture or a structure map", "an empty canvas")
        has_exponent = [control.noise_exponent is not None for _, control in used]
        expect(
            all(has_exponent) or not any(has_exponent),
            "noise_exponent",
            "a value for all controls or none",
            "both",
        )
        sizes = [_save_all(control, place, folder) for place, control in used]
        if any(each.mask for each in sizes):
            sizes = [each if each.mask else each.with_white_mask() for each in sizes]
        all_default = all(control.policy == DEFAULT_POLICY for _, control in used)
        controls = tuple(
            ControlRequest(
                MapSource(str(files.source)) if files.is_map else ImageSource(str(files.source)),
                condition_name=control.condition,
                adapter=next(iter(models.adapters[control.condition].values())),
                scale=number("scale", control.scale),
                start=number("start", control.start),
                end=number("end", control.end),
                policy=None if all_default else control.policy,
                noise_exponent=control.noise_exponent,
                mask=None if files.mask is None else str(files.mask),
                resize_mode=self.resize_mode,
            )
            for (_, control), files in zip(used, sizes, strict=True)
        )
        return GenerateRequest(
            prompt=self.prompt,
            negative=self.negative,
            controls=controls,
            base=models.base,
            device=models.device,
            dtype=models.dtype,
            steps=whole("steps", self.steps),
            guidance=models.guidance if self.guidance is None else number("guidance", self.guidance),
            seed=whole("seed", self.seed),
            width=None if self.width is None else whole("width", self.width),
            height=None if self.height is None else whole("height", self.height),
        )


@dataclass(frozen=True)
class _Files:
    """The files of one control."""

    source: Path
    is_map: bool
    mask: Path | None
    place: int
    size: tuple[int, int]

    def with_white_mask(self) -> _Files:
        """Return the same with a mask that is white everywhere; the command needs one for each."""
        mask = self.source.with_name(_name("mask", self.place))
        Image.new("L", self.size, 255).save(mask)
        return _Files(self.source, self.is_map, mask, self.place, self.size)


def _save_all(control: ControlForm, place: int, folder: Path) -> _Files:
    is_map = control.is_map or control.map_wins
    drawn = control.picture if control.is_map or not control.map_wins else control.map
    source = folder / _name("map" if is_map else "picture", place)
    size = save(drawn, source, "map" if is_map else "image")
    mask = None
    if control.mask.png is not None:
        mask = folder / _name("mask", place)
        save(control.mask, mask, "mask")
    return _Files(source, is_map, mask, place, size)


def _name(what: str, place: int) -> str:
    return f"{what}.png" if place == 1 else f"{what}-{place}.png"


def save(drawn: Drawn, file: Path, argument: str) -> tuple[int, int]:
    """Write the pixels as an RGB file, without anything else that the browser sent, and return the size."""
    image = drawn.rgb(argument)
    image.save(file, format="PNG", compress_level=1)
    return image.size


def number(argument: str, value: Any) -> float:
    """Return a number, or raise `InvalidArgument` where a field is empty."""
    expect(isinstance(value, float | int), argument, "a number", "nothing" if value is None else repr(value))
    return float(value)


def optional(argument: str, text: str | None) -> float | None:
    """Return the number in a text field; None for an empty one."""
    if not (text or "").strip():
        return None
    try:
        return float(str(text))
    except ValueError as error:
        raise InvalidArgument(argument, "a number or nothing", repr(text)) from error


def whole(argument: str, value: Any) -> int:
    """Return a whole number, or raise `InvalidArgument`."""
    is_whole = isinstance(value, float | int) and float(value).is_integer()
    expect(is_whole, argument, "a whole number", "nothing" if value is None else repr(value))
    return int(value)


def chosen(names: Sequence[str], models: Models, conditions: Sequence[str]) -> list[str]:
    """Return the columns to generate: those of `names` that these conditions have.

    Raises:
        InvalidArgument: named "adapters", if none is left.
    """
    columns = models.columns(conditions)
    found = [name for name in columns if name in names]
    expect(bool(found), "adapters", f"at least one of {', '.join(columns)}", ", ".join(names) or "none")
    return found
