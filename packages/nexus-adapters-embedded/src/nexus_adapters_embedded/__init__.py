"""The weights of the embedded models of nexus-adapters. Load them with `nexus_adapters.load_embedded`."""

from pathlib import Path

__version__ = "0.1.0.dev0"

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the base, its adapters and its CLIP."""
