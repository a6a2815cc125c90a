"""`nexus convert`: read an adapter in any known format, and write it in one of ours."""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from nexus_adapters import __version__
from nexus_adapters.adapter.arguments import VARIANTS
from nexus_adapters.cli.checks import expect

FORMATS = ("folder", "single-file")
_RECORD = "training.json"  # of a run, beside its adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or file of a Nexus adapter (ours or the public release's) or of a T2I-Adapter",
    )
    parser.add_argument(
        "dest", metavar="DEST", help="a new folder, or with single-file a new .safetensors file"
    )
    parser.add_argument(
        "--to", choices=FORMATS, default=FORMATS[0], help="what DEST becomes (default folder)"
    )
    start = parser.add_argument_group("from a T2I-Adapter, whose trunk starts a Nexus adapter")
    start.add_argument("--variant", choices=sorted(VARIANTS), help="default prime")
    start.add_argument(
        "--text-width", type=int, metavar="N", help="of the prompt embeddings (default 768, XL 2048)"
    )
    start.add_argument("--residual", action="store_true", help="a skip around the attention")
    start.add_argument(
        "--zero-init", action="store_true", help="start the attention at zero; needs --residual"
    )
    start.add_argument("--seed", type=int, default=0, help="of what is new (default 0)")


def run(args: argparse.Namespace) -> int:
    """Read all of SOURCE, check it, and write DEST whole or not at all."""
    source, dest = Path(args.source), Path(args.dest)
    expect(source.exists(), "SOURCE", "a folder or a file", f"'{source}', which does not exist")
    _check_dest(dest, args.to)
    text_width = args.text_width
    expect(text_width is None or text_width > 0, "--text-width", "a positive integer", text_width)
    expect(args.residual or not args.zero_init, "--zero-init", "--residual beside it", "it alone")
    from nexus_adapters.adapter.formats import export_file, import_adapter
    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    try:
        with library_logs_as_warnings():
            found = import_adapter(
                source,
                args.variant or "prime",
                text_width=text_width,
                residual=args.residual,
                zero_init=args.zero_init,
                seed=args.seed,
            )
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise ValueError(f"SOURCE:{rest}" if colon and name == "source" else f"SOURCE: {error}") from error
    if args.to == "single-file":
        export_file(found.adapter, dest, _metadata(source, found.adapter.config))
    else:
        _save_folder(found.adapter, dest)
    config = found.adapter.config
    print(f"{dest}: {found.adapter.variant}, from {found.kind}, residual={bool(config['residual'])}")
    for note in found.notes:
        print(f"{args.prog}: note: {note}", file=sys.stderr)
    return 0


def _check_dest(dest: Path, format_name: str) -> None:
    """Refuse what would lose something, before anything is read."""
    expect(dest.parent.is_dir(), "DEST", "a place in an existing folder", f"'{dest}'")
    if format_name == "single-file":
        expect(dest.suffix == ".safetensors", "DEST", "a file name that ends in .safetensors", f"'{dest}'")
        expect(not dest.exists(), "DEST", "a new file", f"'{dest}', which exists")
    else:
        is_hint = dest.suffix == ".safetensors"
        hint = "; --to single-file makes a file" if is_hint else ""
        expect(not is_hint, "DEST", "a folder's name", f"'{dest}'{hint}")
        is_free = not dest.exists() or (dest.is_dir() and not any(dest.iterdir()))
        expect(is_free, "DEST", "a new or empty folder", f"'{dest}', which has something in it")


def _save_folder(adapter: Any, dest: Path) -> None:
    """Under another name first: a folder that is there is whole."""
    partial = dest.with_name(f".{dest.name}.unfinished")
    try:
        adapter.save_pretrained(partial)
        if dest.is_dir():
            dest.rmdir()  # it is empty
        partial.rename(dest)
    finally:
        if partial.is_dir():
            for file in partial.iterdir():
                file.unlink()
            partial.rmdir()


def _metadata(source: Path, config: Any) -> dict[str, str]:
    """What a single file tells beside its config: the base it fits, and of which training it is."""
    from nexus_adapters.adapter.bases import describe_base

    told = {"base": describe_base(config), "nexus_adapters.version": __version__}
    record = source / _RECORD
    if record.is_file():
        content = json.loads(record.read_bytes())
        told["training"] = hashlib.sha256(record.read_bytes()).hexdigest()
        told["training.base"] = str(content.get("config", {}).get("base.path", ""))
    return told
