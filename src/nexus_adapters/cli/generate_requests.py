"""The arguments of `nexus generate`, and what they ask for: one frozen request, checked, nothing left out."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED, guidance_for
from nexus_adapters.choices import (
    BALANCE_NAMES,
    CONDITION,
    DEFAULT_POLICY,
    MAX_MEGAPIXELS,
    MAX_SEED,
    MAX_STEPS,
    Balance,
    Device,
    Dtype,
    Policy,
)
from nexus_adapters.cli.extract import ExtractorOptions
from nexus_adapters.cli.options import (
    ADAPTER,
    ADAPTER_SOURCES,
    add_options,
    check_output,
    expect_between,
    expect_finite,
    expect_side,
)
from nexus_adapters.errors import InvalidArgument, expect

if TYPE_CHECKING:
    from nexus_adapters.bases.loading import BaseSource

_MAX_COUNT = 9999  # of four digits in the files' names

# Name -> class of diffusers, and what differs from the base's own configuration.
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


@dataclass(frozen=True)
class ImageSource:
    """A photo, whose structure map is extracted."""

    file: str
    extractor: ExtractorOptions
    option = "--image"


@dataclass(frozen=True)
class MapSource:
    """A structure map."""

    file: str
    option = "--map"


@dataclass(frozen=True)
class ControlRequest:
    """One control: what its structure map is made of, and how it acts.

    Attributes:
        given: the map, or the photo that it is made of.
        condition_name: the extractor's name, which is also the kind of the map.
        adapter: as the user names it.
        scale, start, end, level_scales, noise_exponent: as in `Control`.
        policy: None where `balance` decides it, or for the default.
        balance: sets policy and level scales.
        mask: a file.
        invert: exchange light and dark in the map.
        max_megapixels: refuse larger files.
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
    invert: bool = False
    max_megapixels: float = MAX_MEGAPIXELS

    def settings(self) -> dict[str, Any]:
        """What its `Control` takes in addition to adapter, condition and mask."""
        settings: dict[str, Any] = {
            "scale": self.scale,
            "start": self.start,
            "end": self.end,
            "noise_exponent": self.noise_exponent,
        }
        if self.balance is not None:
            from nexus_adapters.injection import balance

            return settings | balance(self.balance)
        return settings | {"policy": self.policy or DEFAULT_POLICY, "level_scales": self.level_scales}


# Options of a control, given once for all or once for each. The first ones say how it acts.
ACTING = ("scale", "start", "end", "policy", "balance", "level_scales", "noise_exponent", "mask")
_PER_CONTROL = (*ACTING, "condition", "adapter")


@dataclass(frozen=True)
class BaseRequest:
    """The base, as --base, --base-config and --prediction-type name it."""

    path: str
    config: str | None
    prediction_type: str | None

    @property
    def source(self) -> "BaseSource":
        """As `load_base` takes it."""
        from nexus_adapters.bases.loading import BaseSource

        return BaseSource(self.path, config=self.config or "", prediction_type=self.prediction_type or "")


@dataclass(frozen=True)
class LoraRequest:
    """LoRA weights: a file, folder or Hub id; and their strength."""

    path: str
    scale: float


@dataclass(frozen=True)
class GenerateRequest:
    """What `nexus generate` was asked to do.

    Attributes:
        controls: at least one.
        scheduler: a name in `SCHEDULERS`; None for the base's own.
        seed: of the first image; each further one has the next.
        width, height: None for what follows from the first control's image.
        files: one for each image.
    """

    prompt: str
    negative: str
    controls: tuple[ControlRequest, ...]
    base: BaseRequest
    loras: tuple[LoraRequest, ...]
    device: Device
    dtype: Dtype
    scheduler: str | None
    steps: int
    guidance: float
    seed: int
    width: int | None
    height: int | None
    files: tuple[Path, ...]
    force: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus generate`."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the image shows")
    parser.add_argument("--out", required=True, metavar="FILE", help="the image to write, a .png")
    add_options(parser, "--force")
    _add_controls(parser)
    maps = parser.add_argument_group("maps")
    add_options(maps, "--low", "--high", "--option", "--invert", "--max-megapixels")
    _add_model(parser)
    _add_sampling(parser)


class _AppendSource(argparse.Action):
    """Keeps the order of --image and --map, as pairs of option and file."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        namespace.sources = [*(namespace.sources or []), (option, values)]


def _add_controls(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(sources=None)
    group = parser.add_argument_group(
        "controls",
        "Each --image or --map is one control. Give the other options once for all controls, or once for "
        "each in the same order.",
    )
    for option, text in (
        (ImageSource.option, "a photo to extract the structure map from"),
        (MapSource.option, "a structure map"),
    ):
        group.add_argument(option, metavar="FILE", action=_AppendSource, default=argparse.SUPPRESS, help=text)
    # Without a default, so that an option that is missing differs from one that holds for all controls.
    add_options(group, "--condition", action="append", default=None)
    group.add_argument(
        "--adapter",
        action="append",
        metavar="PATH",
        help=f"{ADAPTER_SOURCES} (default: {ADAPTER}; required with a --base of your own)",
    )
    add_options(group, "--scale", action="append", default=None)
    start = "where in the schedule the adapter starts to act, 0 to 1 (default: 0)"
    group.add_argument("--start", action="append", type=float, metavar="N", help=start)
    end = "where in the schedule it stops (default: 1)"
    group.add_argument("--end", action="append", type=float, metavar="N", help=end)
    add_options(group, "--policy", "--noise-exponent", action="append", default=None)
    group.add_argument(
        "--balance",
        action="append",
        choices=BALANCE_NAMES,
        help="what takes precedence; sets --policy and --level-scales",
    )
    group.add_argument(
        "--level-scales",
        action="append",
        metavar="N,N,...",
        help="a factor for each feature of the adapter, finest first",
    )
    group.add_argument(
        "--mask", action="append", metavar="FILE", help="an image that is white where the control acts"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add_options(group, "--base", "--base-config", "--prediction-type")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH",
        help="LoRA weights: a file, folder or Hub id (repeatable)",
    )
    group.add_argument(
        "--lora-scale",
        action="append",
        type=float,
        metavar="N",
        help="strength of each --lora, or of all (default: 1)",
    )
    add_options(group, "--device", "--dtype")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="TEXT", help="what to avoid")
    group.add_argument(
        "--scheduler", choices=sorted(SCHEDULERS), help="the sampler (default: the base's own)"
    )
    add_options(group, "--steps", "--guidance", "--seed")
    group.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="number of images: FILE-0001.png and so on, each with the next seed (default: 1)",
    )
    size = "in pixels (default: the map's; the base's own if the map is more than 1.5 times as large)"
    group.add_argument("--width", type=int, metavar="N", help=size)
    group.add_argument("--height", type=int, metavar="N", help=size)


def parse(args: argparse.Namespace) -> GenerateRequest:
    """The arguments as one request. `InvalidArgument` names the option; nothing slow is imported for it."""
    if args.guidance is not None:
        expect_finite("--guidance", args.guidance)
    expect_between("--steps", args.steps, 1, MAX_STEPS)
    expect_between("--count", args.count, 1, _MAX_COUNT)
    expect_between("--seed", args.seed, 0, MAX_SEED + 1 - args.count)
    expect_side("--width", args.width)
    expect_side("--height", args.height)
    return GenerateRequest(
        loras=_loras(args.lora, args.lora_scale),
        prompt=args.prompt,
        negative=args.negative,
        controls=_controls(args),
        base=BaseRequest(args.base, args.base_config, args.prediction_type),
        device=args.device,
        dtype=args.dtype,
        scheduler=args.scheduler,
        steps=args.steps,
        guidance=guidance_for(args.base) if args.guidance is None else args.guidance,
        seed=args.seed,
        width=args.width,
        height=args.height,
        files=_output_files(args.out, args.count, args.force),
        force=args.force,
    )


def _loras(paths: Sequence[str], scales: Sequence[float] | None) -> tuple[LoraRequest, ...]:
    """Each with its scale."""
    given = list(scales or [1.0])
    for scale in given:
        expect_finite("--lora-scale", scale)
    has_lora = scales is None or bool(paths)
    expect(has_lora, "--lora-scale", "a --lora that it applies to", f"{given[0]} and no --lora")
    fits = len(given) in (1, len(paths))
    expect(fits, "--lora-scale", f"one for all, or one for each of {len(paths)} --lora", len(given))
    each = given * len(paths) if len(given) == 1 else given
    return tuple(LoraRequest(path, scale) for path, scale in zip(paths, each, strict=True))


def _controls(args: argparse.Namespace) -> tuple[ControlRequest, ...]:
    """Each control with its own value of each option."""
    sources: list[tuple[str, str]] = args.sources or []
    if not sources:
        raise InvalidArgument("--image or --map")
    given: list[dict[str, Any]] = [{} for _ in sources]
    for name in _PER_CONTROL:
        values = getattr(args, name)
        fits = values is None or len(values) in (1, len(sources))
        count = f"once or {len(sources)} times" if len(sources) > 1 else "once, for one map"
        expect(fits, _option(name), f"to be given {count}", f"{len(values or [])} values")
        for place, own in enumerate(given if values else []):
            own[name] = values[place if len(values) > 1 else 0]
    is_bundled = args.base in BUNDLED
    for own in given:
        if not is_bundled and "adapter" not in own:
            hint = f"Give an adapter that was trained for the base '{args.base}'"
            raise InvalidArgument("--adapter", hint=hint)
    extractor = ExtractorOptions(args.low, args.high, tuple(args.option))
    shared = {"invert": args.invert, "max_megapixels": args.max_megapixels}
    return tuple(
        _control(option, file, extractor, {**own, **shared})
        for (option, file), own in zip(sources, given, strict=True)
    )


def _control(option: str, file: str, extractor: ExtractorOptions, values: dict[str, Any]) -> ControlRequest:
    """One control of the values that its options have. `InvalidArgument` names the option."""
    condition_name = values.pop("condition", CONDITION)
    level_scales = values.pop("level_scales", None)
    if level_scales is not None:
        values["level_scales"] = _numbers(level_scales)
    given: ImageSource | MapSource = MapSource(file)
    if option == ImageSource.option:
        given = ImageSource(file, extractor)
    else:
        _expect_no_options(extractor.values(condition_name))
    control = ControlRequest(given, condition_name, **values)
    for name in ("scale", "start", "end"):
        expect_finite(_option(name), getattr(control, name))
    expect(0 <= control.start <= 1, "--start", "a number from 0 to 1", control.start)
    is_interval = control.start <= control.end <= 1
    expect(is_interval, "--end", f"a number from --start, {control.start}, to 1", control.end)
    if control.noise_exponent is not None:
        expect_finite("--noise-exponent", control.noise_exponent)
        expect(control.noise_exponent >= 0, "--noise-exponent", "at least 0", control.noise_exponent)
    for name in ("policy", "level_scales"):
        is_alone = control.balance is None or getattr(control, name) is None
        together = f"'{control.balance}' and {_option(name)}"
        expect(is_alone, "--balance", f"no {_option(name)} together with it", together)
    return control


def _expect_no_options(extractor: dict[str, Any]) -> None:
    for name, value in extractor.items():
        option = f"--{name}" if name in ("low", "high") else f"--option {name}"
        hint = "It is an option of the extractor, for --image"
        raise InvalidArgument(option, "no value with --map", repr(value), hint)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "numbers separated by commas, as in 0.5,1,1,1"
        raise InvalidArgument("--level-scales", expected, f"'{text}'") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _output_files(out: str, count: int, force: bool) -> tuple[Path, ...]:
    """`out`, or for several images FILE-0001.png and so on; each checked."""
    file = check_output(out, ".png", force or count > 1)
    if count == 1:
        return (file,)
    files = (file.with_name(f"{file.stem}-{index:04d}{file.suffix}") for index in range(1, count + 1))
    return tuple(check_output(each, ".png", force) for each in files)
