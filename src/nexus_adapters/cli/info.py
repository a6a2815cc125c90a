"""`nexus info`: describe a saved adapter."""

import argparse
from typing import TYPE_CHECKING

from nexus_adapters.cli.options import ADAPTER_SOURCES, add_options
from nexus_adapters.errors import shown

if TYPE_CHECKING:
    from nexus_adapters.adapter.saved import Saved

EXAMPLES = (
    "nexus info prime",
    "nexus info path/to/adapter",
)
TYPED = {"adapter": "PATH"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus info`."""
    parser.add_argument("path", metavar="PATH", help=ADAPTER_SOURCES)
    add_options(parser, "--condition", help="condition of an embedded adapter given by name (default: canny)")


def run(args: argparse.Namespace) -> int:
    """Print the adapter's kind, parameters, base, and the hash of its weights.

    An adapter that cannot be loaded raises the same error as loading it.
    """
    from nexus_adapters.adapter.saved import find_saved
    from nexus_adapters.adapter.weights import check_hash

    saved = find_saved(args.path, args.condition)
    stored = check_hash(saved.files) if saved.tensors else None
    note = "" if stored else " (computed; the files do not record one)"
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
    """Check the adapter as far as possible, and return its method's description."""
    from nexus_adapters.adapter.arguments import describe_adapter
    from nexus_adapters.adapter.saved import check_nexus
    from nexus_adapters.adapter.weights import check_finite, check_types

    # Same result as from its method, without the seconds that importing all methods takes.
    if saved.is_nexus and saved.tensors:
        config = check_nexus(saved)
        check_types(saved.tensors, "adapter")
        check_finite(saved.tensors, "adapter")
        described = describe_adapter(config)
        if config["block"] != "paper":
            described["block"] += _loaded_block(saved, str(config["block"]))
        return described
    from nexus_adapters.methods import known_methods, load_saved, method_for

    is_known = any(method.recognizes(saved) for method in known_methods())
    if saved.class_name and not is_known:
        return {"kind": f"{saved.class_name}, which no known method loads"}
    method = method_for(saved)
    if not saved.run:  # loading a run needs its base
        load_saved(saved)
    return method.describe(saved)


def _loaded_block(saved: "Saved", name: str) -> str:
    """Return a note on a custom block; "" if it is registered and the adapter loads."""
    from nexus_adapters.adapter.blocks import find_block
    from nexus_adapters.errors import InvalidArgument
    from nexus_adapters.methods import load_saved

    try:
        find_block(name)
    except InvalidArgument:
        return " (not registered; import its module with --import MODULE)"
    load_saved(saved)
    return ""
