"""`nexus evaluate`: generate the same samples from the same noise with several adapters, and score them."""

import argparse
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli.extract import read_pairs
from nexus_adapters.cli.options import ADAPTER_HELP, BASE_CONFIG_HELP, PREDICTION_TYPE_HELP, PREDICTION_TYPES
from nexus_adapters.errors import InvalidArgument, expect, renamed

if TYPE_CHECKING:
    from nexus_adapters.evaluation.config import EvaluationConfig

# Keys of the config, and arguments of functions, whose names differ from those of the options.
TYPED = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "base.path": "--base",
    "base.config": "--base-config",
    "base.prediction_type": "--prediction-type",
    "unet": "--base",
    "pipe_or_denoiser": "--base",
    "scheduler.prediction_type": "--base",
    "data.path": "--data",
    "data.shards": "--data",
    "folder": "--data",
    "path": "--data",
    "shards": "--data",
    "data.extractor": "--option",
}
_DEFAULT_GUIDANCE = 7.5
_LEAST_FOR_DISTANCES = 40  # as in evaluation.estimates, which is slow to import
_KINDS = ("folder", "prepared", "table", "tars", "scenes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus evaluate`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help=f"{ADAPTER_HELP}, of a Nexus adapter, T2I-Adapter or ControlNet (repeatable)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or one to resume")
    parser.add_argument(
        "--base",
        default="embedded",
        metavar="PATH",
        help="a folder, Hub id or .safetensors file (default: embedded)",
    )
    parser.add_argument("--base-config", default="", metavar="PATH", help=BASE_CONFIG_HELP)
    parser.add_argument("--prediction-type", default="", choices=PREDICTION_TYPES, help=PREDICTION_TYPE_HELP)
    _add_data(parser)
    _add_generation(parser)
    _add_metrics(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="", metavar="PATH", help="an image folder, prepared set, tars or data set"
    )
    group.add_argument(
        "--kind", choices=_KINDS, help="what --data is (default: prepared; without --data scenes)"
    )
    group.add_argument("--condition", default="canny", metavar="NAME", help="kind of map (default: canny)")
    group.add_argument(
        "--split", help="of a data set (default: train); of scenes test or novel (default: test)"
    )
    group.add_argument(
        "--condition-column", default="", metavar="NAME", help="column or tar member of the maps"
    )
    group.add_argument(
        "--caption-column", default="", metavar="NAME", help="column or tar member of the captions"
    )
    group.add_argument(
        "--image-column", default="", metavar="NAME", help="column or tar member of the images"
    )
    group.add_argument("--count", type=int, metavar="N", help="number of samples (default: all; 500 scenes)")
    group.add_argument("--first", type=int, default=0, metavar="N", help="skip N samples (default: 0)")
    group.add_argument(
        "--resolution", type=int, metavar="N", help="in pixels (default: 512; scenes have 128)"
    )
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the extractor, such as auto=true, sigma=2 or model=FOLDER (repeatable)",
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--prompts",
        choices=("own", "empty", "contradicting"),
        default="own",
        help="the samples' own, none, or prompts that contradict the maps (default: own)",
    )
    group.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    # Two names: the second was the only one before commands agreed on the first.
    group.add_argument(
        "--guidance",
        "--guidance-scale",
        type=float,
        metavar="GUIDANCE",
        help="guidance scale (default: 7.5; embedded base: 2)",
    )
    group.add_argument(
        "--policy",
        default="positive",
        help="which text adapters read: positive, per_branch or cond_only (default: positive)",
    )
    group.add_argument("--scale", type=float, default=1.0, help="strength of the adapters (default: 1)")
    group.add_argument(
        "--noise-exponent",
        type=float,
        metavar="P",
        help="of Nexus and T2I-Adapters: how features fade as the noise does (default: as the adapter was "
        "trained)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (default: 8)")
    group.add_argument(
        "--dtype",
        default="auto",
        help="float32, float16 or bfloat16 (default: float16 on cuda, else float32)",
    )


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "metrics", "Structure is always scored, and for scenes attribute binding."
    )
    group.add_argument(
        "--features",
        metavar="PATH",
        help="vision model for Fréchet and MMD distances (default: embedded for 40 or more scenes)",
    )
    group.add_argument(
        "--clip", metavar="PATH", help="CLIP model for CLIP scores (default: embedded for scenes, else none)"
    )
    group.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the extractor for the generated images, such as model=FOLDER (repeatable; "
        "default: those of --option)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate, score, report. The same command resumes an interrupted evaluation."""
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    adapters = read_adapters(args.adapter)
    with library_logs_as_warnings():
        try:
            config = read_config(args)
            from nexus_adapters.evaluation.report import PAGE, write_report
            from nexus_adapters.evaluation.run import evaluate
        except ImportError as error:
            raise InvalidArgument(
                "evaluate",
                "an installation with the extra [eval]",
                f"one without {error.name}",
                "Run pip install 'nexus-adapters[eval]'",
            ) from error
        with _names_arguments():
            found = evaluate(config, adapters, Path(args.out))
        if found is not None:
            print(write_report(found), end="")
            print(f"{Path(args.out) / PAGE} shows the images", file=sys.stderr)
    return 0


def read_adapters(given: list[str]) -> dict[str, str]:
    """Name -> folder, Hub id, or the name of an embedded one. `InvalidArgument` for two of one name."""
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or os.path.exists(text):
            name, source = Path(text).name, text
        expect(bool(name and source), "--adapter", "[NAME=]PATH", f"'{text}'")
        expect(name not in adapters, "--adapter", "names that differ: NAME=PATH", f"'{name}' twice")
        adapters[name] = source
    return adapters


def read_config(args: argparse.Namespace) -> "EvaluationConfig":
    """The config; `InvalidArgument` names the argument."""
    from nexus_adapters.evaluation.config import EvaluationConfig
    from nexus_adapters.training.parsing import validated

    kind = args.kind or ("prepared" if args.data else "scenes")
    expect(
        kind != "scenes" or not args.data,
        "--data",
        "no value for scenes, which are generated",
        repr(args.data),
    )
    is_scenes = kind == "scenes"
    if not is_scenes and not args.data:
        raise InvalidArgument("--data", hint=f"It is the path of the {kind} data")
    data = {
        "kind": kind,
        "condition": args.condition,
        "split": args.split or ("test" if is_scenes else "train"),
        "count": args.count if args.count is not None else (500 if is_scenes else 0),
        "resolution": args.resolution or (128 if is_scenes else 512),
        "condition_column": args.condition_column,
        "caption_column": args.caption_column,
        "image_column": args.image_column,
        "extractor": read_pairs(args.option, "--option", args.condition) if args.option else {},
    }
    data |= {"shards": [args.data]} if kind == "tars" else {"path": args.data}
    own, count = "embedded" if is_scenes else "", int(data["count"])
    guidance = args.guidance
    if guidance is None:
        bundle = BUNDLED.get(args.base)
        guidance = _DEFAULT_GUIDANCE if bundle is None else bundle.guidance_scale
    content = {
        "base": {
            "path": args.base,
            "config": args.base_config,
            "prediction_type": args.prediction_type,
        },
        "data": data,
        "first": args.first,
        "prompts": args.prompts,
        "num_inference_steps": args.steps,
        "guidance_scale": guidance,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "policy": args.policy,
        "scale": args.scale,
        "noise_exponent": args.noise_exponent,
        "dtype": args.dtype,
        "features": (own if count >= _LEAST_FOR_DISTANCES else "")
        if args.features is None
        else args.features,
        "clip": own if args.clip is None else args.clip,
        "judge": read_pairs(args.judge, "--judge", args.condition) if args.judge else {},
    }
    with _names_arguments():
        return validated(EvaluationConfig, content)


def _names_arguments() -> AbstractContextManager[None]:
    """Let an `InvalidArgument` name what the user typed: an extractor's option as `--option sigma`."""
    return renamed(_typed)


def _typed(name: str) -> str:
    for section, option in (("data.extractor.", "--option"), ("judge.", "--judge")):
        if name.startswith(section):
            return f"{option} {name.removeprefix(section)}"
    return name if name in TYPED else name.removeprefix("data.")
