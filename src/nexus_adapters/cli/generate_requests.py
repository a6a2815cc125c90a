"""The arguments of `nexus generate`, parsed into one request."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nexus_adapters.bundled import guidance_for
from nexus_adapters.choices import MAX_SEED
from nexus_adapters.cli.control_requests import add_controls, parse_controls
from nexus_adapters.cli.options import add_options, check_output
from nexus_adapters.errors import expect, expect_between, expect_finite
from nexus_adapters.generation.requests import SCHEDULERS, BaseRequest, GenerateRequest, LoraRequest

_MAX_COUNT = 9999  # file names have four digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus generate`."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the image should show")
    parser.add_argument("--out", required=True, metavar="FILE", help="the image to write, a .png file")
    add_options(parser, "--force")
    add_controls(parser)
    _add_model(parser)
    _add_sampling(parser)


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
        help="strength of each --lora; a single value applies to all (default: 1)",
    )
    add_options(group, "--device", "--dtype")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--negative", default="", metavar="TEXT", help="the negative prompt: what the image should not show"
    )
    group.add_argument(
        "--scheduler", choices=sorted(SCHEDULERS), help="the scheduler (default: the base's own)"
    )
    add_options(group, "--steps", "--guidance", "--seed")
    group.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="number of images: FILE-0001.png and so on, each with the next seed (default: 1)",
    )
    size = (
        "in pixels (default: as the map; the base's native size if the map is more than 1.5 times as large)"
    )
    group.add_argument("--width", type=int, metavar="N", help=f"width {size}")
    group.add_argument("--height", type=int, metavar="N", help=f"height {size}")


def parse(args: argparse.Namespace) -> GenerateRequest:
    """Parse the arguments into one request, without slow imports.

    `InvalidArgument` names the option or the request's argument.
    """
    expect_between("--count", args.count, 1, _MAX_COUNT)
    expect_between("--seed", args.seed, 0, MAX_SEED + 1 - args.count)
    return GenerateRequest(
        prompt=args.prompt,
        negative=args.negative,
        loras=_loras(args.lora, args.lora_scale),
        controls=parse_controls(args),
        base=BaseRequest(args.base, args.base_config, args.prediction_type),
        device=args.device,
        dtype=args.dtype,
        scheduler=args.scheduler,
        steps=args.steps,
        guidance=guidance_for(args.base) if args.guidance is None else args.guidance,
        seed=args.seed,
        width=args.width,
        height=args.height,
    )


def _loras(paths: Sequence[str], scales: Sequence[float] | None) -> tuple[LoraRequest, ...]:
    """Pair each LoRA with its scale."""
    given = list(scales or [1.0])
    for scale in given:
        expect_finite("--lora-scale", scale)
    has_lora = scales is None or bool(paths)
    expect(has_lora, "--lora-scale", "at least one --lora", f"{given[0]} and no --lora")
    fits = len(given) in (1, len(paths))
    expect(fits, "--lora-scale", f"one value, or one for each of {len(paths)} --lora", len(given))
    each = given * len(paths) if len(given) == 1 else given
    return tuple(LoraRequest(path, scale) for path, scale in zip(paths, each, strict=True))


def output_files(out: str, count: int, force: bool) -> tuple[Path, ...]:
    """Return the checked output paths: `out`, or for several images FILE-0001.png and so on."""
    file = check_output(out, ".png", force or count > 1)
    if count == 1:
        return (file,)
    files = (file.with_name(f"{file.stem}-{index:04d}{file.suffix}") for index in range(1, count + 1))
    return tuple(check_output(each, ".png", force) for each in files)
