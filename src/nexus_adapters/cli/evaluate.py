"""`nexus evaluate`: generate the same samples from the same noise with several adapters and score them."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.choices import CONDITION, DATA_KINDS, PROMPTS
from nexus_adapters.cli.options import ADAPTER_SOURCES, add_options
from nexus_adapters.cli.recipe_options import add_recipe_options
from nexus_adapters.errors import expect, renamed
from nexus_adapters.generation.requests import read_pairs
from nexus_adapters.library_logs import library_logs_as_warnings
from nexus_adapters.packages import missing_package
from nexus_adapters.recipes import recipe_file

if TYPE_CHECKING:
    from nexus_adapters.evaluation.config import EvaluationRecipe

EXAMPLES = (
    "nexus evaluate --adapter prime --adapter t2i --count 100 --out compared",
    "nexus evaluate --base path/to/sd15 --adapter mine=runs/mine --data photos-512 \\\n"
    "    --condition canny --out compared",
)
_GIVEN = "given."  # prefix of the config's key in argparse's `dest` of an option
# Option -> the key of the config that it sets.
_KEYS = {
    "--base": "base.path",
    "--base-config": "base.config",
    "--prediction-type": "base.prediction_type",
    "--data": "data.path",
    "--kind": "data.kind",
    "--condition": "data.condition",
    "--split": "data.split",
    "--image-column": "data.image_column",
    "--condition-column": "data.condition_column",
    "--caption-column": "data.caption_column",
    "--count": "data.count",
    "--resolution": "data.resolution",
    "--option": "data.extractor",
    "--first": "first",
    "--prompts": "prompts",
    "--steps": "num_inference_steps",
    "--guidance": "guidance_scale",
    "--policy": "policy",
    "--scale": "scale",
    "--noise-exponent": "noise_exponent",
    "--seed": "seed",
    "--batch-size": "batch_size",
    "--dtype": "dtype",
    "--features": "features",
    "--clip": "clip",
    "--judge": "judge",
    "--adapter": "adapters",
    "--held-out-of": "held_out_of",
}
# Argument of a function that an evaluation calls -> the key of the config that it comes from.
_ARGUMENTS = {
    "adapter": "adapters",
    "base": "base.path",
    "base_config": "base.config",
    "prediction_type": "base.prediction_type",
    "condition": "data.condition",
    "folder": "data.path",
    "path": "data.path",
    "shards": "data.path",
    "data.shards": "data.path",
    "pipe_or_denoiser": "base.path",
    "scheduler.prediction_type": "base.path",
    "unet": "base.path",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus evaluate`."""
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a TOML file, or a name that --list shows; options override its values",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder, or the folder of an evaluation to resume"
    )
    add_options(parser, "--set")
    add_recipe_options(parser, "evaluate")
    _add(
        parser,
        "--adapter",
        action="append",
        metavar="[NAME=]PATH",
        help=f"a Nexus adapter, T2I-Adapter or ControlNet: {ADAPTER_SOURCES} (repeatable)",
    )
    _share(parser, "--base", "--base-config", "--prediction-type")
    _add_data(parser.add_argument_group("data"))
    _add_generation(parser.add_argument_group("generation"))
    _add_metrics(
        parser.add_argument_group(
            "metrics", "Structure is always scored; attribute binding is scored for scenes."
        )
    )


def _add(group: Any, option: str, **settings: Any) -> None:
    """Declare an option that sets a key of the config. An option that is not given overrides nothing."""
    group.add_argument(option, dest=f"{_GIVEN}{_KEYS[option]}", default=None, **settings)


def _share(group: Any, *options: str, **changes: Any) -> None:
    """Declare shared options in the same way; their help states the config's defaults."""
    for option in options:
        add_options(group, option, dest=f"{_GIVEN}{_KEYS[option]}", default=None, **changes)


def _add_data(group: Any) -> None:
    _add(group, "--data", metavar="PATH", help="an image folder, prepared set, WebDataset tars or dataset")
    _share(group, "--kind", choices=("auto", *DATA_KINDS))
    _share(group, "--condition")
    _add(
        group,
        "--split",
        metavar="NAME",
        help="split of a dataset (default: train), or of scenes: test or novel (default: test)",
    )
    _add(group, "--condition-column", metavar="NAME", help="column or tar member that holds the maps")
    _share(group, "--caption-column", "--image-column")
    _add(group, "--count", type=int, metavar="N", help="number of samples (default: all; for scenes: 500)")
    _add(group, "--first", type=int, metavar="N", help="skip the first N samples (default: 0)")
    _add(
        group,
        "--resolution",
        type=int,
        metavar="N",
        help="side of the images in pixels (default: that of a prepared set; scenes: 128; else 512)",
    )
    _share(group, "--option")
    _add(
        group,
        "--held-out-of",
        metavar="RUN",
        help="the folder of a training run; fail if it was trained on any of the samples (default: warn if "
        "an --adapter that is a training run was)",
    )


def _add_generation(group: Any) -> None:
    _add(
        group,
        "--prompts",
        choices=PROMPTS,
        help="prompts to use: the samples' own, empty, or contradicting the maps (default: own)",
    )
    _share(group, "--steps", "--guidance", "--policy", "--scale", "--noise-exponent", "--seed")
    _share(group, "--batch-size", help="images generated at once (default: 8)")
    _share(group, "--dtype")


def _add_metrics(group: Any) -> None:
    _add(
        group,
        "--features",
        metavar="PATH",
        help="vision model for Fréchet and MMD distances (default: embedded for 40 or more scenes)",
    )
    _add(
        group,
        "--clip",
        metavar="PATH",
        help="CLIP model for CLIP scores (default: embedded for scenes, else none)",
    )
    _add(
        group,
        "--judge",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the extractor that is applied to the generated images, such as model=FOLDER "
        "(repeatable; default: as --option)",
    )


@dataclass(frozen=True)
class EvaluateRequest:
    """What `nexus evaluate` was asked to do.

    Attributes:
        file: the TOML file, if any.
        given: key of the config, such as "data.count" -> the value of its option.
        settings: the KEY=VALUE of each --set.
        out: the output folder.
    """

    file: Path | None
    given: Mapping[str, Any]
    settings: tuple[str, ...]
    out: Path

    def as_typed(self, name: str) -> str:
        """Return what the user wrote for a key or argument: an option, or a key in the file or in --set."""
        if name == "data" and self.file is None:  # in a file, it may also be the table of this name
            return "--data"
        key = _ARGUMENTS.get(name, name)
        table = next((key for key in ("data.extractor", "judge") if name.startswith(f"{key}.")), key)
        option = next((option for option, own in _KEYS.items() if own == table), None)
        is_set = any(setting.partition("=")[0].strip() == key for setting in self.settings)
        if option is None or is_set or (self.file is not None and table not in self.given):
            return "data.shards" if name in ("shards", "data.shards") else key
        return option + (f" {name.removeprefix(table)[1:]}" if name.startswith(f"{table}.") else "")


def run(args: argparse.Namespace) -> int:
    """Generate, score and report. The same command resumes an interrupted evaluation."""
    request = EvaluateRequest(
        None if args.config is None else recipe_file(args.config, "evaluate", "CONFIG"),
        {
            name.removeprefix(_GIVEN): value
            for name, value in vars(args).items()
            if name.startswith(_GIVEN) and value is not None
        },
        tuple(args.set),
        Path(args.out),
    )
    # Check whatever does not need the slow imports below.
    read_adapters(request.given.get("adapters", []))
    with library_logs_as_warnings():
        try:
            from nexus_adapters.evaluation.report import PAGE, write_report
            from nexus_adapters.evaluation.run import evaluate
        except ImportError as error:
            raise missing_package("eval", error.name) from error
        with renamed(request.as_typed):
            recipe = read_recipe(request)
            found = evaluate(recipe.config, recipe.adapters, request.out, held_out_of=recipe.held_out_of)
        if found is not None:
            print(write_report(found), end="")
            print(f"{request.out / PAGE} shows the images", file=sys.stderr)
    return 0


def read_recipe(request: EvaluateRequest) -> "EvaluationRecipe":
    """Return what to evaluate: the defaults, overridden by the file, then the options, then each --set.

    Raises:
        InvalidArgument: for a value that cannot be used; it names the key.
    """
    from nexus_adapters.evaluation.config import EvaluationRecipe, with_defaults
    from nexus_adapters.registry import import_modules
    from nexus_adapters.training.parsing import field_types, validated
    from nexus_adapters.training.recipe import apply_setting, read_toml

    def types(sections: Sequence[str], name: str) -> set[Any]:
        return {str if list(sections) == ["adapters"] else field_types(EvaluationRecipe, sections).get(name)}

    content = {} if request.file is None else read_toml(request.file, "CONFIG")
    apply_options(content, request.given)
    for setting in request.settings:
        apply_setting(content, setting, types)
    if isinstance(content.get("imports"), list):
        import_modules(map(str, content["imports"]), "imports")
    return validated(EvaluationRecipe, with_defaults(content))


def apply_options(content: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Write the options' values into the nested tables of `content`. `InvalidArgument` names the option."""
    from nexus_adapters.evaluation.config import data_kind
    from nexus_adapters.prepare.source_kinds import tars_at

    rest = dict(given)
    pairs = {key: rest.pop(key) for key in ("data.extractor", "judge") if key in rest}
    path, adapters = rest.pop("data.path", None), rest.pop("adapters", [])
    if rest.get("data.kind") == "auto":
        del rest["data.kind"]
        _table(content, "data").pop("kind", None)  # then `with_defaults` chooses it
    for key, value in rest.items():
        _set(content, key, value)
    if path is not None:
        data = _table(content, "data")
        for key in ("path", "shards"):
            data.pop(key, None)
        is_tars = (data.get("kind") or data_kind(path)) == "tars"
        data |= {"shards": tars_at(path)} if is_tars else {"path": path}
    if adapters:
        _table(content, "adapters").update(read_adapters(adapters))
    condition_name = _table(content, "data").get("condition", CONDITION)
    for key, texts in pairs.items():
        option = "--judge" if key == "judge" else "--option"
        for name, value in read_pairs(texts, option, str(condition_name)).items():
            _set(content, f"{key}.{name}", value)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        content = _table(content, section)
    content[name] = value


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    table = content.setdefault(name, {})
    expect(isinstance(table, dict), name, "a table", repr(table))
    return table  # type: ignore[no-any-return]


def read_adapters(given: Sequence[str]) -> dict[str, str]:
    """Parse [NAME=]PATH texts into name -> adapter source. `InvalidArgument` if two have the same name."""
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or os.path.exists(text):
            name, source = Path(text).name, text
        expect(bool(name and source), "--adapter", "[NAME=]PATH", f"'{text}'")
        expect(name not in adapters, "--adapter", "unique names (NAME=PATH)", f"'{name}' twice")
        adapters[name] = source
    return adapters
