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
    add_options(parser, "--condition", help="of an embedded adapter that is given by name (default: canny)")


def run(args: argparse.Namespace) -> int:
    """Print what it is, its parameters, the base it fits, and the hash of the weights.

    What loading would refuse is refused, with the same error.
    """
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
    """What its method says of it, once all that can be checked here has been."""
    from nexus_adapters.adapter.arguments import describe_adapter
    from nexus_adapters.adapter.saved import check_nexus
    from nexus_adapters.adapter.weights import check_finite, check_types

    # The same as by its method, without the seconds that importing all of them takes.
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
    if not saved.run:  # else its base is needed
        load_saved(saved)
    return method.describe(saved)


def _loaded_block(saved: "Saved", name: str) -> str:
    """What to add to a block that is not the paper's; "" where it is registered, and the adapter loads."""
    from nexus_adapters.adapter.blocks import find_block
    from nexus_adapters.errors import InvalidArgument
    from nexus_adapters.methods import load_saved

    try:
        find_block(name)
    except InvalidArgument:
        return " (not registered: import its module, by --import MODULE)"
    load_saved(saved)
    return ""
