"""Find a saved adapter by what users call it, and read its files without building the model.

Nothing here imports torch: commands that only look at files start fast.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nexus_adapters.adapter.arguments import FORMAT, check_format_version, check_saved_config, shown
from nexus_adapters.adapter.layout import check_layout
from nexus_adapters.adapter.weights import HASH, TensorEntry, hash_tensors, read_header, variant_in_name
from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.choices import CONDITION
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import WEIGHTS, file_sha256, read_regular

CONFIG, INDEX = "config.json", "model_index.json"
CONFIG_KEY = "nexus_adapters.config"  # in a single file's metadata
RUN_CONFIG, RUN_ADAPTER, RUN_CHECKPOINTS = "config.toml", "adapter", "checkpoints"
RUN_RECORD = "training.json"  # in RUN_ADAPTER of a finished run
CHECKPOINT_MANIFEST, CHECKPOINT_STATE = "manifest.json", "state.json"
CHECKPOINT_TENSORS = ("average", "module")  # in order of preference
CHECKPOINT_FORMAT = 2  # of a checkpoint's state; format 1 had neither a version nor the adapter's config
SINGLE_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_HUB_FILES = [CONFIG, INDEX, f"{WEIGHTS}*", "adapter/*"]
_EXPECTED = "a saved adapter: a folder, Hub id, file, training run, checkpoint or saved pipeline"
_DEEPEST, _LARGEST = 16, 2**63  # deepest nesting and largest integer accepted in JSON
_MOST_LAYERS = 1000  # if the file's tensors are not known
_LONGEST_NAME = 100  # of a class
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHARD = re.compile(r"-\d+-of-\d+$", re.ASCII)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]*\w")


@dataclass(frozen=True)
class Saved:
    """A saved adapter.

    Attributes:
        source: the name, path or Hub id that the user gave.
        path: the folder or file; for a weights file with config.json next to it, their folder.
        config: the adapter's config, with its `_class_name`; empty if the files have none.
        files: the weights: the safetensors files of one save, or one file of another kind.
        run: the run's recipe, if this is a training checkpoint without a config; else empty.
    """

    source: str
    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """The adapter's class in its config; "" if there is none."""
        return str(self.config.get("_class_name", ""))[:_LONGEST_NAME]

    @property
    def is_nexus(self) -> bool:
        """Whether its config is a `NexusAdapter`'s; the public release's config does not count."""
        if self.class_name:
            return self.class_name == "NexusAdapter" and "downscale_factor" not in self.config
        return "unshuffle" in self.config

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a training checkpoint."""
        return (self.path / CHECKPOINT_MANIFEST).is_file()

    @property
    def is_folder(self) -> bool:
        """Whether `from_pretrained` would load these files from the folder."""
        is_save = self.path.is_dir() and not self.is_checkpoint and bool(self.config)
        return is_save and self.files == standard_weights(self.path)

    @property
    def has_hash(self) -> bool:
        """Whether the weights were written by this package, which adds a hash."""
        files = (file for file in self.files if file.suffix == ".safetensors")
        return any(HASH in read_header(file, "adapter").metadata for file in files)

    @property
    def file_variant(self) -> str | None:
        """The `variant_in_name` of a folder's weights, such as "fp16"; None if there is none."""
        return variant_in_name(self.files[0]) if self.path.is_dir() and not self.is_checkpoint else None

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Tensor name -> its place in the files; empty if they are not safetensors."""
        found: dict[str, TensorEntry] = {}
        for file in self.files:
            if file.suffix == ".safetensors":
                found.update(read_header(file, "adapter").tensors)
        return found

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The tensors' data types, such as ("F16",)."""
        return tuple(sorted({tensor.dtype for tensor in self.tensors.values()}))

    def sha256(self) -> str:
        """Return the `hash_tensors` of the tensors, or for a pickle the SHA-256 of the file."""
        return hash_tensors(self.tensors) if self.tensors else file_sha256(self.files[0])


def find_saved(source: str | Path, condition: str = CONDITION, base: str = EMBEDDED) -> Saved:
    """Find a saved adapter.

    Args:
        source: the name of an adapter included with `base`, a folder, a Hub id, a single file, a training
            run's folder, one of its checkpoints, or a saved pipeline with an adapter. Names take precedence;
            "./prime", like any `Path`, is a folder.
        condition: the condition of an embedded adapter; used only with a name.
        base: the base whose adapter names are known.

    Raises:
        InvalidArgument: named "adapter" (or "condition"), if there is no such adapter.
    """
    given: Any = source
    is_path = isinstance(given, (str, os.PathLike)) and given != ""
    expect(is_path, "adapter", _EXPECTED, f"{given!r} of type {type(given).__name__}")
    name, path = str(source), Path(source)
    is_name = isinstance(source, str) and path.name == source and not path.suffix
    if is_name and base in BUNDLED and BUNDLED[base].has_adapter(name):
        return _of_folder(name, BUNDLED[base].adapter(name, condition))
    if path.is_file():
        expect(path.suffix in SINGLE_FILES, "adapter", f"a file of {', '.join(SINGLE_FILES)}", f"'{source}'")
        return _of_file(name, path)
    if not path.exists():
        is_hub_id = _HUB_ID.fullmatch(name) and path.suffix not in SINGLE_FILES
        hint = _names_hint(name, base) if is_name else ""
        expect(bool(is_hub_id), "adapter", _EXPECTED, f"'{source}', which does not exist", hint)
        path = _fetched(name)
    if (path / CHECKPOINT_MANIFEST).is_file():
        return _of_checkpoint(name, path)
    if (path / RUN_CONFIG).is_file():
        return _of_run(name, path)
    if (path / INDEX).is_file():
        part = path / "adapter"
        has_one = (part / CONFIG).is_file()
        expect(has_one, "adapter", _EXPECTED, f"'{source}', a pipeline without an adapter")
        return _of_folder(name, part)
    return _of_folder(name, path)


def _names_hint(name: str, base: str) -> str:
    """Return a hint with the known names, for a user who may have meant one of them."""
    if base in BUNDLED:
        return f"The names on the base '{base}' are {', '.join(BUNDLED[base].names)}"
    owner = next((bundle.name for bundle in BUNDLED.values() if bundle.has_adapter(name)), None)
    return f"{name!r} is an adapter for the base '{owner}' and does not fit '{base}'" if owner else ""


def _fetched(source: str) -> Path:
    """Download an adapter's repository from the Hub and return the local folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:  # the client raises errors of many kinds
        reason = one_line(error)
        raise InvalidArgument(
            "adapter", _EXPECTED, f"'{source}' ({type(error).__name__}: {reason})"
        ) from error


def _of_file(source: str, file: Path) -> Saved:
    if all(file.with_name(name).is_file() for name in (CHECKPOINT_MANIFEST, CHECKPOINT_STATE)):
        return _of_checkpoint(source, file.parent, file)
    if _SHARD.search(file.stem):
        raise InvalidArgument(
            "adapter", "a complete adapter", f"'{source}', one of several parts", f"Use '{file.parent}'"
        )
    path, config = file, {}
    metadata = read_header(file, "adapter").metadata if file.suffix == ".safetensors" else {}
    is_weights = file.name.startswith(WEIGHTS) or HASH in metadata
    if CONFIG_KEY in metadata:
        config = {"_class_name": "NexusAdapter", **_parsed(metadata[CONFIG_KEY], file)}
    if not config and is_weights and file.with_name(CONFIG).is_file():  # one of a folder's files
        path, config = file.parent, read_json(file.with_name(CONFIG))
    _check_format(config, source)
    return Saved(source, path, config, (file,))


def _of_folder(source: str, folder: Path) -> Saved:
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    _check_format(config, source)
    return Saved(source, folder, config, weights_in(folder))


def _of_run(source: str, folder: Path) -> Saved:
    """Return the finished adapter, else the newest undamaged checkpoint; warn of each damaged one."""
    if (folder / RUN_ADAPTER).is_dir():  # written atomically, so a folder without a config is damaged
        return _of_folder(source, folder / RUN_ADAPTER)
    checkpoints = sorted((folder / RUN_CHECKPOINTS).glob("step-*"), reverse=True)
    expect(bool(checkpoints), "adapter", _EXPECTED, f"'{source}', a training run without a checkpoint")
    for path in checkpoints[:-1]:
        try:
            return _of_checkpoint(source, path)
        except InvalidArgument as error:
            warnings.warn(f"adapter: the checkpoint '{path}' is skipped ({one_line(error)})", stacklevel=2)
    return _of_checkpoint(source, checkpoints[-1])


def _of_checkpoint(source: str, folder: Path, given: Path | None = None) -> Saved:
    """Return a checkpoint with its config, or with its run's recipe if it is of an older format.

    `given` is one of its files; None selects the averaged weights, if there are any.
    """
    hashes = read_json(folder / CHECKPOINT_MANIFEST).get("sha256")
    state = read_json(folder / CHECKPOINT_STATE)
    check_checkpoint(state, folder)
    files = [folder / f"{name}.safetensors" for name in CHECKPOINT_TENSORS]
    names = " or ".join(file.name for file in files)
    expect(given is None or given in files, "adapter", f"a checkpoint's {names}", f"'{given}'")
    file = given or next((file for file in files if file.is_file()), None)
    config = state.get("adapter") or {}
    if file is None or not isinstance(hashes, dict) or not isinstance(config, dict):
        raise InvalidArgument("adapter", "a checkpoint with weights", f"'{folder}'")
    for part in (file, folder / CHECKPOINT_STATE):
        is_whole = file_sha256(part) == hashes.get(part.name)
        expect(is_whole, "adapter", "an unchanged checkpoint", f"'{part}', which was changed or damaged")
    run: dict[str, Any] = {}
    recipe = folder.parent.parent / RUN_CONFIG
    if not config:
        has_recipe = recipe.is_file()
        hint = "The checkpoint has no adapter config, so it must stay in its run's folder"
        expect(has_recipe, "adapter", "a checkpoint in its run's folder", f"'{folder}'", hint)
        try:
            run = tomllib.loads(read_regular(recipe).decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            reason = one_line(error)
            raise InvalidArgument("adapter", "a run with a valid recipe", f"'{recipe}' ({reason})") from error
        has_sections = all(isinstance(run.get(key, {}), dict) for key in ("adapter", "base", "data"))
        expect(has_sections, "adapter", "a run with a valid recipe", f"'{recipe}'")
    _check_format(config, source)
    return Saved(source, folder, config, (file,), run)


def check_checkpoint(state: Mapping[str, Any], folder: Path, argument: str = "adapter") -> None:
    """Raise `InvalidArgument`, named `argument`, for a checkpoint of a newer version of the package."""
    version = state.get(FORMAT, 1)
    expect(
        version in range(1, CHECKPOINT_FORMAT + 1),
        argument,
        f"a checkpoint with {FORMAT} {CHECKPOINT_FORMAT} or older",
        f"'{folder}' with {FORMAT} {shown(version)}",
        "Upgrade nexus-adapters: the checkpoint was saved by a newer version",
    )


def weights_in(folder: Path) -> tuple[Path, ...]:
    """Return the files of one save: those that diffusers would choose, else the only ones in the folder.

    Raises:
        InvalidArgument: named "adapter", if there are none, or several and no default.
    """
    if found := standard_weights(folder):
        return found
    variants = {variant_in_name(file) for file in folder.glob(f"{WEIGHTS}.*.safetensors")}
    named = [found for name in variants if name and (found := standard_weights(folder, name))]
    if len(named) == 1:
        return named[0]
    others = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    whole = [file for file in others if file.is_file() and "-of-" not in file.name]
    whole = [file for file in whole if file.suffix == whole[0].suffix]
    expected = f"a folder with an adapter's weights, such as {WEIGHTS}.safetensors"
    expect(len(whole) > 0, "adapter", expected, f"'{folder}', which has none")
    names = ", ".join(file.name for file in whole[:8])
    expect(len(whole) == 1, "adapter", expected, f"'{folder}' with {names}", "Name one of the files")
    return tuple(whole)


def standard_weights(folder: Path, variant: str | None = None) -> tuple[Path, ...]:
    """Return the files that diffusers' `from_pretrained` loads from a folder; () if there are none."""
    suffix = "" if variant is None else f".{variant}"
    for index in (f"{WEIGHTS}.safetensors.index{suffix}.json", f"{WEIGHTS}{suffix}.safetensors.index.json"):
        if (folder / index).is_file():
            return _shards(folder / index)
    plain = folder / f"{WEIGHTS}{suffix}.safetensors"
    return (plain,) if plain.is_file() else ()


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    expect(is_map and bool(weight_map), "adapter", "an index with a weight_map", f"'{index}'")
    assert isinstance(weight_map, dict)
    files = {file.name: file for file in index.parent.iterdir() if file.is_file()}
    for name in sorted(set(weight_map.values())):
        missing = f"'{index.parent}' without {shown(name)}"
        expect(name in files, "adapter", "a folder with all files that its index names", missing)
        expect(name.endswith(".safetensors"), "adapter", "an index of safetensors files", f"'{index}'")
    return tuple(files[name] for name in sorted(set(weight_map.values())))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. `InvalidArgument` named "adapter" for anything else."""
    try:
        text = read_regular(file).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("adapter", "readable JSON", f"'{file}' ({one_line(error)})") from error
    return _parsed(text, file)


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("adapter", "JSON", f"'{file}' ({one_line(error)})") from error
    expect(isinstance(content, dict), "adapter", "a JSON object", f"'{file}', a {type(content).__name__}")
    waiting = [(content, 1)]
    while waiting:
        value, depth = waiting.pop()
        is_huge = isinstance(value, int) and abs(value) > _LARGEST
        is_broken = isinstance(value, str) and not value.isascii() and bool(_SURROGATE.search(value))
        if depth > _DEEPEST or is_huge or is_broken:
            expected = f"JSON with at most {_DEEPEST} levels, 64-bit numbers and valid Unicode"
            raise InvalidArgument("adapter", expected, f"'{file}'")
        if isinstance(value, (dict, list)):
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            waiting += [(element, depth + 1) for element in inner]
    found: dict[str, Any] = content
    return found


def check_layers(saved: Saved) -> None:
    """Raise `InvalidArgument` named "adapter" if the config has more layers than the files have tensors.

    diffusers builds a model layer by layer before it compares it with the files.
    """
    most = sum(1 for _ in saved.tensors) or _MOST_LAYERS
    for name, value in saved.config.items():
        waiting = [value] if "layers" in name or "blocks" in name else []
        while waiting:
            count = waiting.pop()
            waiting += count if isinstance(count, list) else ()
            fits = not isinstance(count, int) or count <= most
            expected = f"at most {most} {name}, the number of tensors"
            expect(fits, "adapter", expected, f"{count} in '{saved.source}'")


def _check_format(config: Mapping[str, Any], source: str) -> None:
    """Raise `InvalidArgument` named "adapter" for the config of a newer version of the package."""
    try:
        check_format_version(config)
    except InvalidArgument as error:
        raise within("adapter", "a saved adapter of a known format", source, error) from error


def within(argument: str, expected: str, source: str | Path, error: InvalidArgument) -> InvalidArgument:
    """Return an error about a file's content as one about the argument that named the file."""
    reason = InvalidArgument(error.name, error.expected, error.received)
    return InvalidArgument(argument, expected, f"'{source}' ({reason})", error.hint)


def check_nexus(saved: Saved) -> dict[str, Any]:
    """Return the config of a saved Nexus adapter, with defaults filled in.

    `InvalidArgument` named "adapter" if it is not valid, or does not match the tensors in the files.
    """
    expected = "a saved NexusAdapter"
    try:
        config = check_saved_config(saved.config)
    except InvalidArgument as error:
        raise within("adapter", expected, saved.source, error) from error
    if config["block"] == "paper" and saved.tensors:
        found = "slim" if any(".gwc." in name for name in saved.tensors) else "prime"
        stated = "prime" if config["groups"] == 1 else "slim"
        expect(
            found == stated,
            "adapter",
            f"the tensors of a {stated} adapter, as groups {config['groups']} in its config implies",
            f"those of a {found} adapter in '{saved.source}'",
        )
    if saved.tensors:
        shapes = {name: tensor.shape for name, tensor in saved.tensors.items()}
        check_layout(config, shapes, saved.source, "adapter")
    return config
