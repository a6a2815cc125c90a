"""Starting from weights that are there: the same adapter's, or a T2I-Adapter's trunk for Prime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from torch import Tensor

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.training.controlnet_xs import ReshapedControlNetXS


def starting_tensors(adapter: NexusAdapter | T2IAdapter | Any, start_from: str) -> dict[str, Tensor]:
    """What an adapter takes of a saved one, a folder or Hub id; `adapter` stays as it is.

    A T2I-Adapter gives a Prime its trunk; norms and attention keep their own start.

    Raises ValueError where there is no adapter, or where its tensors do not fit; the first that does not is
    named.
    """
    where = {"local_files_only": True} if Path(start_from).is_dir() else {}
    try:
        kind = NexusAdapter.load_config(start_from, **where).get("_class_name")
    except (OSError, ValueError) as error:  # each with a page of hints
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"adapter.start_from: expected a saved adapter; received '{start_from}' ({reason})"
        ) from error
    classes: dict[str, Any] = {
        "NexusAdapter": NexusAdapter,
        "T2IAdapter": T2IAdapter,
        "ControlNetModel": ControlNetModel,
        "ControlNetXSAdapter": ControlNetXSAdapter,
        "ReshapedControlNetXS": ReshapedControlNetXS,
    }
    if kind not in classes:
        raise ValueError(
            f"adapter.start_from: expected one of {', '.join(classes)}; received '{start_from}', a {kind}"
        )
    start = classes[kind].from_pretrained(start_from, **where)
    if kind == "NexusAdapter" and isinstance(adapter, NexusAdapter):
        skips = bool(start.config["residual"]), bool(adapter.config["residual"])
        if skips[0] != skips[1]:
            raise ValueError(
                f"adapter.start_from: expected one with residual={skips[1]}, as adapter.residual is; "
                "received "
                f"'{start_from}' with {skips[0]}"
            )
    ours, theirs = adapter.state_dict(), start.state_dict()
    only_trunk = isinstance(start, T2IAdapter) and isinstance(adapter, NexusAdapter)
    needed = {
        name for name in ours if not (only_trunk and (".norm1." in name or ".cross_attention." in name))
    }
    for name in sorted(needed | set(theirs)):
        expected = tuple(ours[name].shape) if name in needed else "none"
        received = tuple(theirs[name].shape) if name in theirs else "none"
        if expected != received:
            raise ValueError(
                f"adapter.start_from: expected {name} of shape {expected}; received {received}, in "
                f"'{start_from}'"
            )
    return dict(theirs)
