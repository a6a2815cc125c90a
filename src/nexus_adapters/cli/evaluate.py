"""`nexus evaluate`: let adapters draw the same samples from the same noise, and measure what comes out."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_adapters.cli.checks import expect
from nexus_adapters.cli.extractor_options import read_pairs

if TYPE_CHECKING:
    from nexus_adapters.evaluation.config import EvaluationConfig

_OPTIONS = {"num_inference_steps": "steps", "base.path": "base", "data.path": "data", "out": "out"}
_OPTIONS |= {"data.extractor": "option", "data.shards": "data"}
_LEAST_FOR_DISTANCES = 40  # as in evaluation.estimates, which is slow to import
_KINDS = ("folder", "prepared", "table", "tars", "scenes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus evaluate`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a folder or Hub id of a Nexus adapter, T2I-Adapter or ControlNet, or one that comes with the "
        "package, such as prime or t2i; may be repeated",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, or one to go on with")
    parser.add_argument(
        "--base", default="embedded", metavar="PATH", help="folder or Hub id (default embedded)"
    )
    _add_data(parser)
    _add_drawing(parser)
    _add_metrics(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="", metavar="PATH", help="folder, prepared set, tars or data set")
    group.add_argument("--kind", choices=_KINDS, help="of --data (default scenes without it, else prepared)")
    group.add_argument("--condition", default="canny", metavar="NAME", help="which maps (default canny)")
    group.add_argument("--split", help="of a data set (default train); of scenes test (default) or novel")
    group.add_argument(
        "--condition-column", default="", metavar="NAME", help="column or tar member of the maps"
    )
    group.add_argument("--caption-column", default="", metavar="NAME", help="of the captions")
    group.add_argument("--image-column", default="", metavar="NAME", help="of the images")
    group.add_argument("--count", type=int, metavar="N", help="samples (default: all; of scenes 500)")
    group.add_argument("--first", type=int, default=0, metavar="N", help="leave out so many (default 0)")
    group.add_argument("--resolution", type=int, metavar="N", help="pixels (default 512; scenes have 128)")
    group.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the extractor; may be repeated"
    )


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drawing")
    group.add_argument(
        "--prompts",
        choices=("own", "empty", "contradicting"),
        default="own",
        help="the samples' own (default), none, or ones that do not fit the maps",
    )
    group.add_argument("--steps", type=int, default=20, metavar="N", help="of the sampler (default 20)")
    group.add_argument(
        "--guidance-scale", type=float, metavar="X", help="default 7.5; on the embedded base 2"
    )
    group.add_argument("--policy", default="positive", help="positive (default), per_branch or cond_only")
    group.add_argument("--scale", type=float, default=1.0, metavar="X", help="of the control (default 1)")
    group.add_argument(
        "--noise-exponent",
        type=float,
        metavar="P",
        help="of Nexus and T2I-Adapters: how features fade with the noise (default: the adapter's)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at once (default 8)")
    group.add_argument("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16")


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics", "Structure is always scored; of scenes, binding too.")
    group.add_argument(
        "--features",
        metavar="PATH",
        help="vision model for Fréchet and MMD distances (default: of 40 scenes or more embedded)",
    )
    group.add_argument(
        "--clip", metavar="PATH", help="CLIP model for CLIP scores (default: of scenes embedded)"
    )
    group.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the extractor that draws the pictures' maps again, such as model=FOLDER; may be "
        "repeated (default: those of --option)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw, score, report. The same command goes on after a stop."""
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    adapters = read_adapters(args.adapter)
    with library_logs_as_warnings():
        try:
            config = read_config(args)
            from nexus_adapters.evaluation.report import PAGE, write_report
            from nexus_adapters.evaluation.run import evaluate
        except ImportError as error:
            raise ValueError(
                "evaluate: expected what it needs, pip install 'nexus-adapters[eval]'; received "
                f"an installation without {error.name}"
            ) from error
        with _names_arguments():
            found = evaluate(config, adapters, Path(args.out))
        if found is not None:
            print(write_report(found), end="")
            print(f"{Path(args.out) / PAGE} shows the pictures", file=sys.stderr)
    return 0


def read_adapters(given: list[str]) -> dict[str, str]:
    """Name -> folder, Hub id, or name of one that comes along. ValueError for two of one name."""
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
    """The config; ValueError names the argument."""
    from nexus_adapters.evaluation.config import EvaluationConfig
    from nexus_adapters.training.recipe import validated

    kind = args.kind or ("prepared" if args.data else "scenes")
    is_scenes = kind == "scenes"
    expect(is_scenes or bool(args.data), "--data", f"a path, for kind {kind}", "none")
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
    guidance = args.guidance_scale
    if guidance is None:
        guidance = 2.0 if args.base == "embedded" else 7.5
    content = {
        "base": {"path": args.base},
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


@contextmanager
def _names_arguments() -> Iterator[None]:
    """Let a ValueError name a field as users wrote it: `data.count` as `--count`."""
    try:
        yield
    except ValueError as error:
        key, _, rest = str(error).partition(":")
        option = _OPTIONS.get(key, key.removeprefix("data.").replace("_", "-"))
        raise ValueError(f"--{option}:{rest}") from error
