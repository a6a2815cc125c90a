"""`nexus train`: train an adapter as a recipe says, or go on where a run was stopped."""

import argparse
import os
import sys
from pathlib import Path

from nexus_adapters.cli.checks import expect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file; recipes/ has examples")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value in place of the recipe's, such as training.learning_rate=2e-5; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and say what it would do")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the finished adapter; the token is the Hub client's own"
    )


def run(args: argparse.Namespace) -> int:
    """Train, and say where the adapter is. The status is 130 after Ctrl-C and 143 after SIGTERM."""
    expect(Path(args.recipe).is_file(), "RECIPE", "a TOML file", f"'{args.recipe}', which is none")
    try:
        from nexus_adapters.training.recipe import load_recipe
    except ImportError as error:
        raise ValueError(
            "train: expected what training needs, pip install 'nexus-adapters[train]'; received an "
            "installation "
            f"without {error.name}"
        ) from error
    settings = [*args.set, *([f"hub.repo_id={args.push_to_hub}"] if args.push_to_hub else [])]
    config = load_recipe(args.recipe, settings)
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    with library_logs_as_warnings():
        from nexus_adapters.training.run import dry_run, train_adapter
        from nexus_adapters.training.signals import Stopped

        if args.dry_run:
            print(dry_run(config))
            return 0
        try:
            folder = train_adapter(config)
        except Stopped as stop:
            print(f"{args.prog}: {stop}; the same command goes on", file=sys.stderr)
            return stop.exit_status
    if os.environ.get("RANK", "0") == "0":  # several processes say it once
        print(folder)
    return 0
