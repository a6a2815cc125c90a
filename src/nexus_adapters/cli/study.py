"""`nexus study`: train and evaluate all that a plan compares, and tell it in tables and plots."""

import argparse
import sys
from pathlib import Path

from nexus_adapters.cli.checks import expect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus study`."""
    parser.add_argument("plan", metavar="PLAN", help="a TOML file; benchmarks/plans has examples")
    parser.add_argument("--out", required=True, metavar="DIR", help="where tables and plots go")
    parser.add_argument("--report", action="store_true", help="only make them, of what is there")
    parser.add_argument(
        "--pictures",
        type=int,
        default=0,
        metavar="N",
        help="also draw N scenes each of the best, middle and worst for each condition, by the methods "
        "whose runs are here",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the plan and say what is done")


def run(args: argparse.Namespace) -> int:
    """Run what is left, then write. The status is 130 after Ctrl-C and 143 after SIGTERM in a training."""
    expect(Path(args.plan).is_file(), "PLAN", "a TOML file", f"'{args.plan}', which is none")
    out = Path(args.out)
    expect(not out.exists() or out.is_dir(), "--out", "a folder", f"'{out}', which is a file")
    expect(args.pictures >= 0, "--pictures", "a number of scenes, 0 for none", args.pictures)
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    with library_logs_as_warnings():
        try:
            from nexus_adapters.evaluation.study.cells import described, run_study
            from nexus_adapters.evaluation.study.plan import Study
            from nexus_adapters.evaluation.study.report import write_study
        except ImportError as error:
            raise ValueError(
                "study: expected what it needs, pip install 'nexus-adapters[eval]'; received an installation "
                f"without {error.name}"
            ) from error
        from nexus_adapters.training.signals import Stopped

        study = Study(Path(args.plan))
        is_drawn = args.pictures == 0 or study.views() != ()
        expect(is_drawn, "--pictures", "0 for a plan without [evaluate], which draws none", args.pictures)
        if args.dry_run:
            print(described(study))
            return 0
        if not args.report:
            try:
                left = run_study(study)
            except Stopped as stop:
                print(f"{args.prog}: {stop}; the same command goes on", file=sys.stderr)
                return stop.exit_status
            for cell in left:
                print(f"{args.prog}: {cell.name} is left to another process", file=sys.stderr)
        for path in write_study(study, out, args.pictures):
            print(path)
    return 0
