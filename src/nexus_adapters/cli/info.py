"""`nexus info`: describe a saved adapter."""

import argparse
from typing import TYPE_CHECKING

from nexus_adapters.cli.options import ADAPTER_SOURCES, add_options
from nexus_adapters.errors import shown

if TYPE_CHECKING:
    from nexus_adapters.adapter.saved import Saved

TYPED = {"adapter": "PATH"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus info`."""
    parser.add_argument("path", metavar="PATH", help=ADAPTER_SOURCES)
    add_options(parser, "--condition", help="of an embedded adapter that is given by name (default: canny)")


def run(args: argparse.Namespace) -> int:
    """Print what it is, its parameters, the base it fits, and the hash of the weights."""
    from nexus_adapters.adapter.saved import find_saved
    from nexus_adapters.adapter.weights import check_hash

    saved = find_saved(args.path, args.condition)
    stored = check_hash(saved.files) if saved.tensors else None
    note = "" if stored else " (computed; the files have none)"
    rows = {
        **_described(saved),
        "parameters": f"{saved.parameters:,} ({', '.join(saved.dtypes)})" if saved.tensors else "in a pickle",
        "files": ", ".join(file.name for file in saved.files),
        "sha256": f"{stored or saved.sha256()}{note}",
    }
    for label, value in rows.items():
        print(f"{label:12}{shown(value)}")
    return 0


def _described(saved: "Saved") -> dict[str, str]:
    """What its method says of it."""
    from nexus_adapters.adapter.arguments import describe_adapter
    from nexus_adapters.adapter.saved import check_nexus

    # The same as by its method, without the seconds that importing all of them takes.
    if saved.class_name in ("", "NexusAdapter") and "unshuffle" in saved.config:
        return describe_adapter(check_nexus(saved))
    from nexus_adapters.methods import known_methods

    method = next((method for method in known_methods() if method.recognizes(saved)), None)
    if method is not None:
        return method.describe(saved)
    known = f"{saved.class_name}, which no known method loads"
    return {"kind": known if saved.class_name else "weights without a config"}
