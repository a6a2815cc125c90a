"""Set up before any test module is imported."""

import os
from importlib import import_module

# No test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from jaxtyping import install_import_hook

# Checks the types and shapes in the package's signatures, in tests only; it must come before the package is
# imported. The hook wants an expression as text. An int is a float here, as type checkers have it, and Self
# stands for anything, since beartype sees methods one by one and not their class.
import_module("beartype.typing")  # named in the expression
install_import_hook(
    "nexus_adapters",
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True,"
    " hint_overrides=beartype.FrozenDict({beartype.typing.Self: beartype.typing.Any})))",
)

import torch

torch.set_num_threads(1)  # tiny tensors: more threads get into each other's way; results do not vary
