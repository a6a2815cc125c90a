"""`nexus study`: train and evaluate everything that a plan compares; report it in tables and plots."""

import argparse
import sys
from pathlib import Path

from nexus_adapters.cli.options import add_options, check_toml
from nexus_adapters.errors import expect, renamed
from nexus_adapters.library_logs import library_logs_as_warnings
from nexus_adapters.packages import missing_package

EXAMPLES = ("nexus study benchmarks/plans/miniature.toml --out study",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus study`."""
    parser.add_argument(
        "plan", metavar="PLAN", help="a TOML file; benchmarks/plans in the repository has examples"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tables and plots")
    parser.add_argument(
        "--report", action="store_true", help="only report the results that exist; train nothing"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="also show images: for each condition, the N best, median and worst samples, for the "
        "methods whose runs exist on this machine",
    )
    add_options(parser, "--dry-run")


def run(args: argparse.Namespace) -> int:
    """Run the cells that are left, then report. The exit status is 130 after Ctrl-C and 143 after SIGTERM."""
    check_toml(args.plan, "PLAN")
    out = Path(args.out)
    expect(not out.exists() or out.is_dir(), "--out", "a folder", f"'{out}', which is a file")
    expect(args.images >= 0, "--images", "a number of samples, or 0 for none", args.images)
    with library_logs_as_warnings():
        try:
            from nexus_adapters.study.cells import described, run_study
            from nexus_adapters.study.plan import Study
            from nexus_adapters.study.report import write_study
        except ImportError as error:
            raise missing_package("eval", error.name) from error
        from nexus_adapters.training.loop import Stopped

        study = Study(Path(args.plan))
        fits = args.images == 0 or study.views() != ()
        expect(fits, "--images", "0: a plan without [evaluate] generates no images", args.images)
        if args.dry_run:
            print(described(study))
            return 0
        if not args.report:
            try:
                left = run_study(study)
            except Stopped as stop:
                print(f"{args.prog}: {stop}; run the same command to resume", file=sys.stderr)
                return stop.exit_status
            for cell in left:
                print(f"{args.prog}: {cell.name} is being run by another process", file=sys.stderr)
        with renamed({"images": "--images"}):
            written = write_study(study, out, args.images)
        for path in written:
            print(path)
    return 0
