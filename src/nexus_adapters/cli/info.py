"""`nexus info`: describe a saved adapter."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus info`."""
    parser.add_argument("path", metavar="PATH", help="the folder of a saved adapter")


def run(args: argparse.Namespace) -> int:
    """Print the variant, the parameters, the base it fits, and the hash of the weights."""
    from nexus_adapters.adapter.bases import describe_base
    from nexus_adapters.adapter.stored import check_hash
    from nexus_adapters.cli.saved_adapter import read_saved_adapter

    adapter = read_saved_adapter(args.path)
    sha256 = check_hash(adapter.files, "PATH") or f"{adapter.sha256()} (its files tell none)"
    config = adapter.config
    form = "residual" if config["residual"] else "without residual, as in the paper"
    fades = (
        f", fades with the noise (exponent {config['noise_exponent']:g})" if config["noise_exponent"] else ""
    )
    rows = {
        "variant": f"{adapter.variant} (groups {config['groups']}), {form}{fades}",
        "parameters": f"{adapter.parameters:,} ({', '.join(adapter.dtypes)})",
        "base": describe_base(config),
        "files": ", ".join(file.name for file in adapter.files),
        "sha256": sha256,
    }
    for label, value in rows.items():
        print(f"{label:12}{value}")
    return 0
