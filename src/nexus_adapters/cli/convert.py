"""`nexus convert`: read an adapter in any known format, and write it in one of ours."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters import __version__
from nexus_adapters.adapter.arguments import VARIANTS, variant_arguments, variant_of
from nexus_adapters.cli.options import ADAPTER_HELP
from nexus_adapters.errors import expect
from nexus_adapters.files import file_sha256, replacing_folder

if TYPE_CHECKING:
    from nexus_adapters.adapter.formats import Imported
    from nexus_adapters.adapter.saved import Saved

FORMATS = ("folder", "single-file")
_RECORD = "training.json"  # of a run, next to its adapter
TYPED = {"adapter": "SOURCE"}
_VARIANT = "prime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"a Nexus adapter (ours or the public release's) or a T2I-Adapter: {ADAPTER_HELP}",
    )
    parser.add_argument(
        "dest", metavar="DEST", help="a new folder, or with single-file a new .safetensors file"
    )
    parser.add_argument(
        "--to", choices=FORMATS, default=FORMATS[0], help="what DEST becomes (default: folder)"
    )
    parser.add_argument(
        "--condition",
        default="canny",
        metavar="NAME",
        help="which maps a named adapter reads (default: canny)",
    )
    start = parser.add_argument_group("from a T2I-Adapter, whose trunk starts a Nexus adapter")
    start.add_argument("--variant", choices=list(VARIANTS), help="the configuration (default: prime)")
    start.add_argument(
        "--text-width", type=int, metavar="N", help="of the prompt embeddings (default: 768, XL 2048)"
    )
    start.add_argument(
        "--residual",
        action=argparse.BooleanOptionalAction,
        help="a residual connection around the attention (default: what --variant says)",
    )
    start.add_argument(
        "--zero-init", action="store_true", help="start the attention at zero; needs the residual connection"
    )
    start.add_argument("--seed", type=int, help="for the new weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Read all of SOURCE, check it, and write DEST whole or not at all."""
    dest = Path(args.dest)
    _check_dest(dest, args.to)
    text_width = args.text_width
    expect(text_width is None or text_width > 0, "text_width", "a positive integer", text_width)
    form = variant_arguments(
        args.variant or _VARIANT, {} if args.residual is None else {"residual": args.residual}
    )
    needs = "a variant with the residual connection"
    expect(form["residual"] or not args.zero_init, "zero_init", needs, variant_of(**form))
    from nexus_adapters.adapter.saved import find_saved

    saved = find_saved(args.source, args.condition)
    from nexus_adapters.adapter.formats import FROM_T2I, export_file
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    with library_logs_as_warnings():
        found = _read(saved, args)
    if found.kind != FROM_T2I:
        for name in ("variant", "text_width", "residual", "zero_init", "seed"):
            value = getattr(args, name)
            what = f"no value for {found.kind}, which has its own"
            expect(value is None or (value is False and name == "zero_init"), name, what, value)
    if args.to == "single-file":
        export_file(found.adapter, dest, _metadata(saved.path, found.adapter.config))
    else:
        with replacing_folder(dest) as folder:
            found.adapter.save_pretrained(folder)
    print(f"{dest}: {found.adapter.variant}, from {found.kind}")
    for note in found.notes:
        print(f"{args.prog}: note: {note}", file=sys.stderr)
    return 0


def _read(saved: "Saved", args: argparse.Namespace) -> "Imported":
    """The adapter in SOURCE. Of checkpoints it is the methods that know how they are built."""
    from nexus_adapters.adapter.formats import Imported, import_adapter
    from nexus_adapters.adapter.model import NexusAdapter
    from nexus_adapters.methods import load_saved

    if saved.is_checkpoint:
        adapter = load_saved(saved)
        if isinstance(adapter, NexusAdapter):
            return Imported(adapter, "a NexusAdapter")
    return import_adapter(
        saved,
        args.variant or _VARIANT,
        text_width=args.text_width,
        residual=args.residual,
        zero_init=args.zero_init,
        seed=args.seed or 0,
    )


def _check_dest(dest: Path, format_name: str) -> None:
    """Refuse what would lose something, before anything is read."""
    expect(dest.parent.is_dir(), "DEST", "a place in an existing folder", f"'{dest}'")
    if format_name == "single-file":
        expect(dest.suffix == ".safetensors", "DEST", "a file name that ends in .safetensors", f"'{dest}'")
        expect(not dest.exists(), "DEST", "a new file", f"'{dest}', which exists")
    else:
        is_file = dest.suffix == ".safetensors"
        expect(not is_file, "DEST", "the name of a folder", f"'{dest}'", "--to single-file writes a file")
        is_free = not dest.exists() or (dest.is_dir() and not any(dest.iterdir()))
        expect(is_free, "DEST", "a new or empty folder", f"'{dest}', which is not empty")


def _metadata(path: Path, config: Any) -> dict[str, str]:
    """What a single file records in addition to its config: the base it fits, and its training."""
    from nexus_adapters.adapter.arguments import describe_base

    metadata = {"base": describe_base(config), "nexus_adapters.version": __version__}
    record = path / _RECORD
    if record.is_file():
        content = json.loads(record.read_bytes())
        metadata["training"] = file_sha256(record)
        metadata["training.base"] = str(content.get("config", {}).get("base.path", ""))
    return metadata
