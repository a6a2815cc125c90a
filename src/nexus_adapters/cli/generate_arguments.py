"""The arguments of `nexus generate`: what they are, and what their numbers must be."""

import argparse

from nexus_adapters.cli.checks import (
    BASE_CONFIG_HELP,
    PREDICTION_TYPE_HELP,
    PREDICTION_TYPES,
    expect_between,
    expect_finite,
    expect_side,
)
from nexus_adapters.cli.control_arguments import declare_controls
from nexus_adapters.cli.devices import DEVICES, DTYPES
from nexus_adapters.cli.extractor_options import declare_extractor_options
from nexus_adapters.cli.schedulers import SCHEDULERS
from nexus_adapters.errors import expect

_MAX_STEPS = 1000  # of training: no scheduler takes more
_MAX_NUM = 9999  # of four digits in the files' names
_MAX_SEED = 2**63 - 1


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the image shows")
    parser.add_argument("--out", required=True, metavar="FILE", help="the image to write, a .png")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    declare_controls(parser)
    _add_structure(parser)
    _add_model(parser)
    _add_sampling(parser)


def _add_structure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("maps")
    declare_extractor_options(group)
    group.add_argument("--invert", action="store_true", help="exchange light and dark in the map")
    group.add_argument(
        "--max-megapixels", type=float, default=64, metavar="N", help="refuse larger files (default: 64)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--base",
        default="embedded",
        metavar="PATH",
        help="Stable Diffusion 1.x, 2.x or XL: a folder, Hub id or .safetensors file; needs an --adapter "
        "that was trained for it (default: embedded)",
    )
    group.add_argument("--base-config", metavar="PATH", help=BASE_CONFIG_HELP)
    group.add_argument("--prediction-type", choices=PREDICTION_TYPES, help=PREDICTION_TYPE_HELP)
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
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="default: cuda if available, else mps, else cpu",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: float16 on cuda, else float32"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative", default="", metavar="TEXT", help="what to avoid")
    group.add_argument(
        "--scheduler", choices=sorted(SCHEDULERS), help="the sampler (default: the base's own)"
    )
    group.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    group.add_argument("--guidance", type=float, help="guidance scale (default: 7.5; embedded base: 2)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first image; each further image has the next seed (default: 0)",
    )
    group.add_argument(
        "--num", type=int, default=1, help="number of images: FILE-0001.png and so on (default: 1)"
    )
    size = "in pixels (default: the map's, reduced if far above what the base was trained on)"
    group.add_argument("--width", type=int, help=size)
    group.add_argument("--height", type=int, help=size)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` unless each number is in its range."""
    scales = args.lora_scale or [1.0]
    for scale in scales:
        expect_finite("--lora-scale", scale)
    fits = len(scales) in (1, len(args.lora))
    has_lora = args.lora_scale is None or bool(args.lora)
    expect(has_lora, "--lora-scale", "a --lora that it applies to", f"{scales[0]} and no --lora")
    expect(fits, "--lora-scale", f"one for all, or one for each of {len(args.lora)} --lora", len(scales))
    if args.guidance is not None:
        expect_finite("--guidance", args.guidance)
    expect_between("--steps", args.steps, 1, _MAX_STEPS)
    expect_between("--num", args.num, 1, _MAX_NUM)
    expect_between("--seed", args.seed, 0, _MAX_SEED - args.num)
    expect_side("--width", args.width)
    expect_side("--height", args.height)
