"""`nexus train`: train an adapter from a recipe, or resume an interrupted run."""

import argparse
import sys

from nexus_adapters.cli import library_logs_as_warnings
from nexus_adapters.cli.options import add_options, check_preview, check_toml
from nexus_adapters.errors import InvalidArgument

EXAMPLES = (
    "nexus train recipes/embedded-canny.toml",
    "nexus train recipes/sd15-canny.toml --set data.path=photos-512 --dry-run",
)
INSTALL_HINT = "Run pip install 'nexus-adapters[train]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file; recipes/ has examples")
    add_options(parser, "--set", "--dry-run", "--preview")
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="upload the finished adapter; the token is read from the environment variable HF_TOKEN",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print where the adapter is. The status is 130 after Ctrl-C and 143 after SIGTERM."""
    check_toml(args.recipe, "RECIPE")
    try:
        from nexus_adapters.training.recipe import load_recipe
    except ImportError as error:
        raise InvalidArgument(
            "train", "an installation with the extra [train]", f"one without {error.name}", INSTALL_HINT
        ) from error
    settings = [*args.set, *([f"hub.repo_id={args.push_to_hub}"] if args.push_to_hub else [])]
    config = load_recipe(args.recipe, settings)
    page = None if args.preview is None else check_preview(args.preview)

    with library_logs_as_warnings():
        from nexus_adapters.training.distributed import is_main_process
        from nexus_adapters.training.loop import Stopped
        from nexus_adapters.training.run import dry_run, train_adapter

        if args.dry_run or page is not None:
            print(dry_run(config, page))
            return 0
        try:
            folder = train_adapter(config)
        except Stopped as stop:
            print(f"{args.prog}: {stop}; run the same command to resume", file=sys.stderr)
            return stop.exit_status
    if is_main_process():
        print(folder)
    return 0
