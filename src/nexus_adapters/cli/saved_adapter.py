"""What a saved adapter's files say about it, without building the model."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_adapters.adapter.arguments import OPTIONAL_ARGUMENTS, check_arguments, variant_of
from nexus_adapters.adapter.file_names import WEIGHTS, variant_in_name
from nexus_adapters.adapter.stored import StoredTensor, hash_tensors, read_header

CONFIG = "config.json"


@dataclass(frozen=True)
class SavedAdapter:
    """A folder that `NexusAdapter.save_pretrained` wrote."""

    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def variant(self) -> str:
        """Either "prime" or "slim"."""
        return variant_of(self.config["groups"])

    @property
    def file_variant(self) -> str | None:
        """As `variant_in_name`."""
        return variant_in_name(self.files[0])

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The tensors' types, such as ("F16",)."""
        return tuple(sorted({tensor.dtype for tensor in self.tensors.values()}))

    def sha256(self) -> str:
        """Hash of the weights, by `hash_tensors`."""
        return hash_tensors(self.tensors)


def read_saved_adapter(folder: str | Path, argument: str = "PATH") -> SavedAdapter:
    """Read the config and the weights' headers.

    Where a folder holds several saves (diffusers' `variant`, such as fp16), the plain one is taken, else the
    first by name.

    Raises:
        ValueError: for anything that is not a saved adapter; it names `argument` and what came instead.
    """
    folder = Path(folder)
    config = _read_config(folder, argument)
    files = _weight_files(folder, argument)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file, argument).tensors)
    _check_variant(config, tensors, folder, argument)
    return SavedAdapter(config, files, tensors)


def _check_variant(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], folder: Path, argument: str
) -> None:
    """ValueError where the config tells another variant than the tensors, as the public release's does."""
    found = "slim" if any(".gwc." in name for name in tensors) else "prime"
    told = variant_of(config["groups"])
    if found != told:
        raise ValueError(
            f"{argument}: expected the tensors of a {told}, as groups {config['groups']} in {CONFIG} says; "
            f"received those of a {found} in '{folder}'"
        )


def _read_config(folder: Path, argument: str) -> Mapping[str, Any]:
    expected = f"{argument}: expected the folder of a saved NexusAdapter; received '{folder}'"
    if not folder.exists():
        raise ValueError(f"{expected}, which does not exist")
    if not folder.is_dir():
        raise ValueError(f"{expected}, which is a file")
    if (folder / "model_index.json").is_file():
        hint = f"; its adapter is '{folder / 'adapter'}'" if (folder / "adapter" / CONFIG).is_file() else ""
        raise ValueError(f"{expected}, which is a pipeline{hint}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{expected}, which has no {CONFIG}")
    config = _read_json(folder / CONFIG, argument)
    kind = config.get("_class_name", "no _class_name")
    if kind != "NexusAdapter":
        raise ValueError(f"{expected}, whose {CONFIG} says {kind}")
    config = {**OPTIONAL_ARGUMENTS, **config}
    try:
        check_arguments(config)
    except KeyError as error:
        raise ValueError(f"{expected}, whose {CONFIG} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{expected}, whose {CONFIG} is wrong: {error}") from error
    return config


def _read_json(file: Path, argument: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: expected JSON; received '{file}' ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: expected a JSON object; received '{file}', {type(content).__name__}")
    return content


def _weight_files(folder: Path, argument: str) -> tuple[Path, ...]:
    """Give the files of one save: a single one, or the shards that an index names."""
    whole = (file for file in folder.glob(f"{WEIGHTS}.*.safetensors") if "-of-" not in file.name)
    candidates = (
        folder / f"{WEIGHTS}.safetensors",
        folder / f"{WEIGHTS}.safetensors.index.json",
        *sorted(whole),
        *sorted(folder.glob(f"{WEIGHTS}.safetensors.index.*.json")),
    )
    for file in candidates:
        if file.is_file():
            return (file,) if file.suffix == ".safetensors" else _shards(file, argument)
    raise ValueError(f"{argument}: expected {WEIGHTS}.safetensors; received '{folder}' without it")


def _shards(index: Path, argument: str) -> tuple[Path, ...]:
    weight_map = _read_json(index, argument).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{argument}: expected a weight_map; received '{index}' without it")
    files = tuple(index.with_name(str(name)) for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise ValueError(f"{argument}: expected the shard '{file}', which the index names; received none")
    return files
