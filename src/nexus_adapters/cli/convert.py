"""`nexus convert`: read an adapter in any known format and write it in one of this package's formats."""

import argparse
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters import __version__
from nexus_adapters.adapter.arguments import VARIANTS, variant_arguments, variant_of
from nexus_adapters.choices import MAX_SEED
from nexus_adapters.cli.options import ADAPTER_SOURCES, add_options
from nexus_adapters.errors import expect, one_line
from nexus_adapters.files import file_sha256, replacing_folder
from nexus_adapters.generation.requests import ADAPTER
from nexus_adapters.library_logs import library_logs_as_warnings

if TYPE_CHECKING:
    from nexus_adapters.adapter.formats import Imported
    from nexus_adapters.adapter.saved import Saved

EXAMPLES = (
    "nexus convert t2iadapter_canny_sd15v2.pth canny",
    "nexus convert canny canny.safetensors --to single-file",
)
FORMATS = ("folder", "single-file")
TYPED = {"adapter": "SOURCE"}


@dataclass(frozen=True)
class Choices:
    """Options for properties that some sources do not determine; None selects the default."""

    variant: str | None = None
    text_width: int | None = None
    residual: bool | None = None
    zero_init: bool | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise `InvalidArgument` for values that are out of range or contradict each other."""
        width = self.text_width
        expect(width is None or width > 0, "text_width", "a positive integer", width)
        expect(0 <= self.seed <= MAX_SEED, "seed", f"an integer from 0 to {MAX_SEED}", self.seed)
        overrides = {} if self.residual is None else {"residual": self.residual}
        form = variant_arguments(self.variant or ADAPTER, overrides)
        needs = "a variant with the residual connection"
        expect(form["residual"] or not self.zero_init, "zero_init", needs, variant_of(**form))

    def expect_unused(self, kind: str, but_for: Collection[str]) -> None:
        """Raise `InvalidArgument` for an option that was given although the source determines it."""
        for option in fields(self):
            value = getattr(self, option.name)
            is_open = option.name in but_for or value == option.default
            expect(is_open, option.name, f"no value for {kind}, which determines it", value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus convert`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a Nexus adapter (of this package or the paper's public release) or a T2I-Adapter: "
        f"{ADAPTER_SOURCES}",
    )
    parser.add_argument(
        "dest", metavar="DEST", help="a new folder, or a new .safetensors file with --to single-file"
    )
    parser.add_argument("--to", choices=FORMATS, default=FORMATS[0], help="format of DEST (default: folder)")
    add_options(parser, "--condition")
    start = parser.add_argument_group("initialize a Nexus adapter from the trunk of a T2I-Adapter")
    start.add_argument(
        "--variant",
        choices=list(VARIANTS),
        help="the configuration (default: prime); required for public-release weights without a config",
    )
    start.add_argument(
        "--text-width",
        type=int,
        metavar="N",
        help="width of the prompt embeddings (default: 768; SDXL: 2048)",
    )
    start.add_argument(
        "--residual",
        action=argparse.BooleanOptionalAction,
        help="add a residual connection around the attention (default: as in --variant)",
    )
    start.add_argument(
        "--zero-init",
        action=argparse.BooleanOptionalAction,
        help="initialize the attention's output to zero, so that an untrained Prime gives the same output as "
        "the T2I-Adapter (default: yes if there is a residual connection)",
    )
    add_options(start, "--seed")


def run(args: argparse.Namespace) -> int:
    """Read and check SOURCE, then write DEST completely or not at all."""
    expect(args.dest != "", "DEST", f"the name of a new {args.to.removeprefix('single-')}", "an empty string")
    dest = Path(args.dest)
    choices = Choices(args.variant, args.text_width, args.residual, args.zero_init, args.seed)
    _check_dest(dest, args.to)
    choices.check()
    from nexus_adapters.adapter.saved import find_saved

    saved = find_saved(args.source, args.condition)
    from nexus_adapters.adapter.formats import export_file

    with library_logs_as_warnings():
        found = _read(saved, choices)
    choices.expect_unused(found.kind, found.options)
    try:
        if args.to == "single-file":
            export_file(found.adapter, dest, _metadata(saved.path, found.adapter.config))
        else:
            with replacing_folder(dest) as folder:
                found.adapter.save_pretrained(folder)
    except OSError as error:
        raise OSError(f"cannot write '{dest}': {error.strerror or one_line(error)}") from error
    print(f"{dest}: {found.adapter.variant}, from {found.kind}")
    for note in found.notes:
        print(f"{args.prog}: note: {note}", file=sys.stderr)
    return 0


def _read(saved: "Saved", choices: Choices) -> "Imported":
    """Load the adapter in SOURCE; checkpoints are loaded by their method."""
    from nexus_adapters.adapter.formats import Imported, import_adapter
    from nexus_adapters.adapter.model import NexusAdapter
    from nexus_adapters.methods import load_saved

    if saved.is_checkpoint:
        adapter = load_saved(saved)
        if isinstance(adapter, NexusAdapter):
            return Imported(adapter, "a NexusAdapter")
    return import_adapter(saved, **asdict(choices))


def _check_dest(dest: Path, format_name: str) -> None:
    """Raise `InvalidArgument`, before anything is read, if DEST would overwrite something."""
    expect(dest.parent.is_dir(), "DEST", "a path in an existing folder", f"'{dest}'")
    if format_name == "single-file":
        expect(dest.suffix == ".safetensors", "DEST", "a file name that ends in .safetensors", f"'{dest}'")
        expect(not dest.exists(), "DEST", "a new file", f"'{dest}', which already exists")
    else:
        is_file = dest.suffix == ".safetensors"
        expect(not is_file, "DEST", "the name of a folder", f"'{dest}'", "--to single-file writes a file")
        is_free = not dest.exists() or (dest.is_dir() and not any(dest.iterdir()))
        expect(is_free, "DEST", "a new or empty folder", f"'{dest}', which is not empty")


def _metadata(path: Path, config: Any) -> dict[str, str]:
    """Return the metadata of a single file in addition to its config: the base it fits and its training."""
    from nexus_adapters.adapter.arguments import describe_base
    from nexus_adapters.adapter.saved import RUN_RECORD, read_json

    metadata = {"base": describe_base(config), "nexus_adapters.version": __version__}
    record = path / RUN_RECORD
    if record.is_file():
        recipe = read_json(record).get("config", {})
        expect(isinstance(recipe, dict), "adapter", "the record of a training run", f"'{record}'")
        metadata["training"] = file_sha256(record)
        metadata["training.base"] = str(recipe.get("base.path", ""))
    return metadata
