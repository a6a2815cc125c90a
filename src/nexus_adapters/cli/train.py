"""`nexus train`: train an adapter from a recipe, or resume an interrupted run."""

import argparse
import sys

from nexus_adapters.cli.options import add_options, check_preview
from nexus_adapters.cli.recipe_options import add_recipe_options
from nexus_adapters.library_logs import library_logs_as_warnings
from nexus_adapters.packages import missing_package
from nexus_adapters.recipes import recipe_file

EXAMPLES = (
    "nexus train embedded-canny",
    "nexus train sd15-canny-from-t2i --set data.path=photos-512 --measure",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or a name that --list shows")
    add_options(parser, "--set", "--dry-run", "--preview")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="as --dry-run, and time a training step with random weights, in one process, to estimate how "
        "long the run takes: seconds on a GPU, whose peak memory is shown, too; up to some minutes on a CPU. "
        "If the run already has a log, nothing is measured: the log has the times of its steps",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="upload the finished adapter; the token is read from the environment variable HF_TOKEN",
    )
    add_recipe_options(parser, "train")


def run(args: argparse.Namespace) -> int:
    """Train, and print the adapter's folder. The exit status is 130 after Ctrl-C and 143 after SIGTERM."""
    recipe_file(args.recipe, "train", "RECIPE")  # check this before the slow imports
    try:
        from nexus_adapters.training.recipe import load_recipe
    except ImportError as error:
        raise missing_package("train", error.name) from error
    settings = [*args.set, *([f"hub.repo_id={args.push_to_hub}"] if args.push_to_hub else [])]
    config = load_recipe(args.recipe, settings)
    page = None if args.preview is None else check_preview(args.preview)

    with library_logs_as_warnings():
        from nexus_adapters.training.distributed import is_main_process
        from nexus_adapters.training.loop import Stopped
        from nexus_adapters.training.run import dry_run, train_adapter

        if args.dry_run or args.measure or page is not None:
            print(dry_run(config, page, args.measure))
            return 0
        try:
            folder = train_adapter(config)
        except Stopped as stop:
            print(f"{args.prog}: {stop}; run the same command to resume", file=sys.stderr)
            return stop.exit_status
    if is_main_process():
        print(folder)
    return 0
