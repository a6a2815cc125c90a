"""`nexus app`: a page in the browser to draw, type and see."""

import argparse
import threading
import webbrowser
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nexus_adapters.choices import CONDITION
from nexus_adapters.cli.options import ADAPTER_SOURCES, add_options, as_option
from nexus_adapters.errors import InvalidArgument, expect, expect_between, renamed
from nexus_adapters.generation.requests import BaseRequest
from nexus_adapters.library_logs import library_logs_as_warnings
from nexus_adapters.packages import check_packages

if TYPE_CHECKING:
    from nexus_adapters.app.models import AdapterSource, Models

EXAMPLES = (
    "nexus app",
    "nexus app --base path/to/sd15 --adapter path/to/adapter --condition depth --open",
)
_MAX_QUEUE = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus app`."""
    add_options(parser, "--base", "--base-config", "--prediction-type")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH",
        help=f"{ADAPTER_SOURCES} (repeatable; required with a --base of your own; default: all adapters of "
        "the embedded base)",
    )
    add_options(
        parser,
        "--condition",
        action="append",
        default=[],
        help=f"kind of structure map of the --adapter, given once or once for each (default: {CONDITION})",
    )
    add_options(parser, "--device", "--dtype")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; there is no login (default: 127.0.0.1, for this machine only)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="N",
        help="port to listen on; 0 for any free one (default: 7860)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=16,
        metavar="N",
        help="generations that may wait; more are refused (default: 16)",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further name that users reach the app by, such as that of a reverse proxy (repeatable)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in your browser")


def run(args: argparse.Namespace) -> int:
    """Load the models and serve the page until Ctrl-C."""
    check_packages("app", "gradio")
    expect_between("--port", args.port, 0, 65535)
    expect_between("--max-queue", args.max_queue, 1, _MAX_QUEUE)
    with renamed(as_option):
        models = models_of(args)
        with library_logs_as_warnings():
            models.load()
        from nexus_adapters.app.page import build
        from nexus_adapters.app.server import serve

        def ready(address: str) -> None:
            print(f"The app is ready at {address} (Ctrl-C ends it)", flush=True)
            if args.open:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        serve(
            lambda: build(models),
            host=args.host,
            port=args.port,
            max_queue=args.max_queue,
            on_ready=ready,
            allowed_hosts=args.allowed_host,
        )
    return 0


def models_of(args: argparse.Namespace) -> "Models":
    """Return the models that the arguments name. `InvalidArgument` names the option."""
    from nexus_adapters.app.models import Models, find_adapter

    base = BaseRequest(args.base, args.base_config, args.prediction_type)
    sources = adapter_sources(args.adapter, args.condition)
    for each in sources:
        find_adapter(each.source, each.condition, base.path)
    return Models(base, tuple(sources), args.device, args.dtype)


def adapter_sources(adapters: Sequence[str], conditions: Sequence[str]) -> "list[AdapterSource]":
    """Pair each adapter with its condition."""
    from nexus_adapters.app.models import AdapterSource
    from nexus_adapters.conditions import EXTRACTORS

    for name in conditions:
        expect(name in EXTRACTORS, "--condition", f"one of {', '.join(sorted(EXTRACTORS))}", repr(name))
    if not adapters:
        if conditions:
            raise InvalidArgument("--condition", "an --adapter that it belongs to", conditions[0])
        return []
    given = list(conditions or [CONDITION])
    count = f"one, or one for each of {len(adapters)} --adapter"
    expect(len(given) in (1, len(adapters)), "--condition", count, f"{len(given)} values")
    each = given * len(adapters) if len(given) == 1 else given
    return [AdapterSource(source, name) for source, name in zip(adapters, each, strict=True)]
