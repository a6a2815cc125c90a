"""Finding saved adapters by what users call them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import T2IAdapter
from jaxtyping import config
from safetensors.torch import load_file, save_file
from tests.refusals import refused
from tests.weights import use_weights

from nexus_adapters.adapter.formats import export_file
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.saved import check_nexus, find_saved
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.files import file_sha256
from nexus_adapters.methods import load_adapter
from nexus_adapters.training.checkpoint import save_checkpoint

Build = Callable[..., NexusAdapter]
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = [(condition, name) for condition, names in BUNDLED["embedded"].adapters.items() for name in names]


def config_of(adapter: NexusAdapter) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(adapter.to_json_string())
    return found


def write_run(folder: Path, adapter: NexusAdapter, steps: tuple[int, ...], own_config: bool = True) -> Path:
    """A training run with checkpoints, whose averages are half of the weights."""
    folder.mkdir()
    (folder / "config.toml").write_text('[base]\npath = "base"\n\n[adapter]\nmethod = "slim"\n')
    weights = adapter.state_dict()
    for step in steps:
        tensors = {"module": {name: step * tensor for name, tensor in weights.items()}}
        tensors["average"] = {name: step * tensor / 2 for name, tensor in weights.items()}
        state = {"adapter": config_of(adapter) if own_config else {}}
        save_checkpoint(folder / "checkpoints", step, tensors, state)
    return folder


# Every kind of source


@pytest.mark.parametrize(("condition", "name"), NAMES)
def test_names_of_the_package(condition: str, name: str) -> None:
    saved = find_saved(name, condition)
    assert (saved.source, saved.path) == (name, BUNDLED["embedded"].adapter(name, condition))
    assert saved.class_name == ("T2IAdapter" if name == "t2i" else "NexusAdapter")
    if name != "t2i":
        config = check_nexus(saved)
        assert (config["groups"] > 1, config["residual"]) == ("slim" in name, "paper" not in name)


def test_canny_is_what_a_name_reads() -> None:
    assert find_saved("slim") == find_saved("slim", "canny") != find_saved("slim", "depth")


def test_a_folder(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny().half()
    adapter.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        saved = find_saved(source)
        assert (saved.source, saved.path, saved.run) == (str(tmp_path), tmp_path, {})
        assert saved.files == (tmp_path / WEIGHTS,)
        assert (saved.class_name, saved.file_variant, saved.is_checkpoint) == ("NexusAdapter", None, False)
        assert saved.parameters == sum(p.numel() for p in adapter.parameters())
        assert saved.dtypes == ("F16",)
        assert saved.config["text_width"] == 12


def test_a_folder_without_a_config(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    saved = find_saved(tmp_path)
    assert (saved.config, saved.class_name, len(saved.files)) == ({}, "", 1)


def test_a_t2i_adapter(tmp_path: Path) -> None:
    t2i = T2IAdapter(channels=[8, 8], downscale_factor=2)
    t2i.save_pretrained(tmp_path / "t2i")
    assert find_saved(tmp_path / "t2i").class_name == "T2IAdapter"
    torch.save(t2i.state_dict(), tmp_path / "t2i.pth")
    saved = find_saved(tmp_path / "t2i.pth")
    assert (saved.files, saved.config, saved.tensors) == ((tmp_path / "t2i.pth",), {}, {})
    assert saved.sha256() == file_sha256(tmp_path / "t2i.pth")


def test_a_single_file_has_its_config(tiny: Build, tmp_path: Path) -> None:
    adapter, file = tiny(groups=2), tmp_path / "one.safetensors"
    export_file(adapter, file)
    saved = find_saved(file)
    assert (saved.class_name, saved.files, saved.file_variant) == ("NexusAdapter", (file,), None)
    assert check_nexus(saved)["groups"] == 2
    save_file(adapter.state_dict(), file)
    assert find_saved(file).config == {}


def test_a_weights_file_is_its_folders_adapter(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    tiny().half().save_pretrained(tmp_path, variant="fp16")
    half = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    for file, is_folder in ((tmp_path / WEIGHTS, True), (half, False)):  # the plain one is what a folder is
        saved = find_saved(file)
        assert (saved.source, saved.path, saved.files) == (str(file), tmp_path, (file,))
        assert (saved.config, saved.is_folder) == (find_saved(tmp_path).config, is_folder)
    renamed = half.rename(tmp_path / "mine.safetensors")  # ours by the hash in its metadata
    assert find_saved(renamed).config == find_saved(tmp_path).config
    other = tmp_path / "other.safetensors"
    save_file(tiny().state_dict(), other)  # anyone's
    assert (find_saved(other).config, find_saved(other).path) == ({}, other)


def test_the_hash_is_the_same_in_whatever_files(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path / "whole")
    adapter.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    export_file(adapter, tmp_path / "one.safetensors")
    hashes = {find_saved(tmp_path / name).sha256() for name in ("whole", "shards", "one.safetensors")}
    assert len(hashes) == 1
    tiny(groups=2).save_pretrained(tmp_path / "other")
    assert find_saved(tmp_path / "other").sha256() not in hashes


def test_shards_and_variants_of_files(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path / "shards", max_shard_size="10KB", variant="bf16")
    saved = find_saved(tmp_path / "shards")
    assert list(saved.files) == sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(saved.files) > 2
    assert saved.file_variant == "bf16"
    assert set(saved.tensors) == set(adapter.state_dict())
    adapter.save_pretrained(tmp_path / "both", variant="fp16")
    assert find_saved(tmp_path / "both").file_variant == "fp16"
    adapter.save_pretrained(tmp_path / "both")  # the plain one goes first
    assert find_saved(tmp_path / "both").files == (tmp_path / "both" / WEIGHTS,)
    assert find_saved(tmp_path / "both").file_variant is None


def test_one_part_of_a_save_is_refused(tiny: Build, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    tiny().save_pretrained(folder, max_shard_size="10KB")
    for file in sorted(folder.glob("*.safetensors"))[:2]:
        with refused("adapter", file.name, hint=str(folder)):
            find_saved(file)


@pytest.mark.parametrize(
    ("source", "received"), [("", "'' of type str"), (None, "NoneType"), ((), "tuple"), (3, "int")]
)
def test_what_is_no_path_is_refused(source: Any, received: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused("adapter", received, expected="Hub id"):
        find_saved(source)


def test_a_saved_pipeline(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with refused("adapter", f"'{tmp_path}', a pipeline without an adapter"):
        find_saved(tmp_path)
    tiny().save_pretrained(tmp_path / "adapter")
    saved = find_saved(tmp_path)
    assert (saved.source, saved.path) == (str(tmp_path), tmp_path / "adapter")


def test_a_hub_id(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().save_pretrained(tmp_path / "plain")
    tiny().save_pretrained(tmp_path / "pipe" / "adapter")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    fetched: list[tuple[str, list[str]]] = []

    def fetch(source: str, allow_patterns: list[str]) -> str:
        fetched.append((source, allow_patterns))
        if source == "someone/gone":
            raise OSError("not\nthere")
        return str(tmp_path / source.partition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    saved = find_saved("someone/plain")
    assert (saved.source, saved.path) == ("someone/plain", tmp_path / "plain")
    assert find_saved("someone/pipe").path == tmp_path / "pipe" / "adapter"
    assert {"config.json", "diffusion_pytorch_model*"} <= set(fetched[0][1])
    with refused("adapter", "'someone/gone' (OSError: not"):
        find_saved("someone/gone")
    asked = len(fetched)
    for path in ("./someone/plain", "/someone/plain", "a/b/c", "someone/x.safetensors", "x.safetensors"):
        with refused("adapter", f"'{path}', which does not exist"):
            find_saved(path)
    assert len(fetched) == asked


def test_a_run_is_its_adapter_or_its_newest_checkpoint(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny(groups=2)
    folder = write_run(tmp_path / "run", adapter, steps=(2, 10))
    saved = find_saved(folder)
    newest = folder / "checkpoints" / "step-00000010"
    assert (saved.path, saved.files) == (newest, (newest / "average.safetensors",))
    assert (saved.source, saved.is_checkpoint, saved.file_variant) == (str(folder), True, None)
    assert (saved.run, saved.class_name, check_nexus(saved)["groups"]) == ({}, "NexusAdapter", 2)
    (newest / "manifest.json").unlink()  # as if it had not been finished
    assert find_saved(folder).path == folder / "checkpoints" / "step-00000002"
    adapter.save_pretrained(folder / "adapter")
    assert find_saved(folder).path == folder / "adapter"
    assert not find_saved(folder).is_checkpoint


def test_a_damaged_adapter_of_a_finished_run_is_not_replaced_by_a_checkpoint(
    tiny: Build, tmp_path: Path
) -> None:
    adapter = tiny(groups=2)
    folder = write_run(tmp_path / "run", adapter, steps=(2,))  # whose weights may not be the best ones
    adapter.save_pretrained(folder / "adapter")
    (folder / "adapter" / "config.json").unlink()
    saved = find_saved(folder)
    assert (saved.path, saved.config) == (folder / "adapter", {})
    with refused("adapter", "weights without a config", hint="config.json"):
        load_adapter(folder)
    (folder / "adapter" / "diffusion_pytorch_model.safetensors").unlink()
    with refused("adapter", "adapter', which has none"):
        find_saved(folder)


def test_a_checkpoint_is_the_average_where_there_is_one(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny()
    with_average = write_run(tmp_path / "run", adapter, steps=(2,)) / "checkpoints" / "step-00000002"
    assert find_saved(with_average).files == (with_average / "average.safetensors",)
    state = {"adapter": config_of(adapter)}
    without = save_checkpoint(tmp_path, 4, {"module": adapter.state_dict()}, state)
    assert find_saved(without).files == (without / "module.safetensors",)


def test_a_checkpoints_file_is_of_its_checkpoint(tiny: Build, tmp_path: Path) -> None:
    adapter = tiny(groups=2, residual=True)
    folder = write_run(tmp_path / "run", adapter, steps=(2,)) / "checkpoints" / "step-00000002"
    for name in ("average", "module"):
        file = folder / f"{name}.safetensors"
        saved = find_saved(file)
        assert (saved.source, saved.path, saved.files) == (str(file), folder, (file,))
        assert saved.config == config_of(adapter)
        assert saved.is_checkpoint
    state = {"adapter": config_of(adapter)}
    tensors = {"module": adapter.state_dict(), "optimizer": {"x": torch.ones(1)}}
    other = save_checkpoint(tmp_path, 4, tensors, state)
    with refused("adapter", "optimizer.safetensors'", expected="module.safetensors"):
        find_saved(other / "optimizer.safetensors")


@pytest.mark.parametrize("version", [3, "2", None, 0])
def test_checkpoints_of_other_formats(tiny: Build, tmp_path: Path, version: object) -> None:
    adapter = tiny()
    state = {"adapter": config_of(adapter), "format_version": version}
    folder = save_checkpoint(tmp_path, 4, {"module": adapter.state_dict()}, state)
    with refused("adapter", f"'{folder}' with format_version {version!r}", hint="Upgrade"):
        find_saved(folder)


def test_a_checkpoint_without_a_config_has_its_runs_recipe(tiny: Build, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tiny(), steps=(2,), own_config=False)
    checkpoint = folder / "checkpoints" / "step-00000002"
    for source in (folder, checkpoint):
        saved = find_saved(source)
        assert saved.config == {}
        assert saved.run == {"base": {"path": "base"}, "adapter": {"method": "slim"}}
    (folder / "config.toml").write_text("[base")
    with refused("adapter", "config.toml'"):
        find_saved(checkpoint)
    moved = checkpoint.rename(tmp_path / "step-00000002")
    with refused("adapter", f"'{moved}'", hint="run's folder"):
        find_saved(moved)


# Names


def test_a_name_goes_before_a_folder_of_that_name(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("prime")
    tiny().save_pretrained("mine")
    embedded = BUNDLED["embedded"].adapter("prime", "canny")
    assert find_saved("prime").path == embedded
    for source in ("./prime", "prime/", Path("prime"), str(tmp_path / "prime")):
        assert find_saved(source).config["text_width"] == 12, source
    assert find_saved("mine").path == Path("mine")
    assert find_saved("prime", base="other").path == Path("prime")


def test_names_belong_to_their_base() -> None:
    with refused("adapter", "'prime', which does not exist", hint="the base 'embedded' and does not fit 'x'"):
        find_saved("prime", base="x")
    with refused("adapter", "'mine', which does not exist") as caught:
        find_saved("mine", base="x")
    assert caught.value.hint == ""


def test_unknown_names_and_conditions() -> None:
    with refused("adapter", "'prim', which does not exist", hint="prime, slim, prime-paper, slim-paper, t2i"):
        find_saved("prim")
    with refused("adapter", "'t2i'", expected="prime, slim for depth"):
        find_saved("t2i", "depth")
    with refused("condition", "'pose'", expected="canny, depth"):
        find_saved("prime", "pose")


def test_an_incomplete_installation_of_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_weights(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        find_saved("prime")
    assert str(tmp_path / "canny" / "prime-residual" / "config.json") in str(caught.value)


# What is no adapter, or damaged


def test_paths_that_are_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with refused("adapter", f"'{tmp_path / 'notes.txt'}'", expected=".safetensors"):
        find_saved(tmp_path / "notes.txt")
    with refused("adapter", f"'{tmp_path / 'gone'}', which does not exist"):
        find_saved(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with refused("adapter", f"'{tmp_path / 'empty'}', which has none", expected=WEIGHTS):
        find_saved(tmp_path / "empty")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    with refused("adapter", f"'{tmp_path / 'run'}', a training run without a checkpoint"):
        find_saved(tmp_path / "run")
    (tmp_path / "short.safetensors").write_bytes(b"x" * 20)
    with refused("adapter", "short.safetensors'"):
        find_saved(tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    ("content", "received"),
    [(b"{", "config.json'"), (b"[1]", "a list"), (b"\xff", "config.json'"), (b"[" * 10**5, "config.json'")],
)
def test_configs_that_are_none(tiny: Build, tmp_path: Path, content: bytes, received: str) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with refused("adapter", received, expected="JSON"):
        find_saved(tmp_path)


@pytest.mark.parametrize("version", [2, "1", None, 0])
def test_other_formats(tiny: Build, tmp_path: Path, version: object) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path / "folder")
    config = config_of(adapter) | {"format_version": version}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "one.safetensors"
    save_file(adapter.state_dict(), file, metadata={"nexus_adapters.config": json.dumps(config)})
    checkpoint = save_checkpoint(tmp_path, 4, {"module": adapter.state_dict()}, {"adapter": config})
    for source in (tmp_path / "folder", file, checkpoint):
        with refused("adapter", f"'{source}' (format_version: ", hint="upgrade" if version == 2 else ""):
            find_saved(source)


@pytest.mark.parametrize(
    "content",
    [
        {},
        *({"weight_map": value} for value in ({}, ["a"], "a", {"a": 1}, {"a": ["b"]}, {"a": None, "b": "c"})),
    ],
)
def test_indices_that_are_none(tiny: Build, tmp_path: Path, content: object) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
    with refused("adapter", f"{WEIGHTS}.index.json'", expected="weight_map"):
        find_saved(tmp_path)


def test_an_index_names_files_of_its_own_folder(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    index = tmp_path / "saved" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with refused("adapter", "without '../outside.safetensors'"):
        find_saved(tmp_path / "saved")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a" * 5000, "a\0b", "saved/diffusion_pytorch_model.safetensors", "config.json"]
)
def test_odd_names_in_an_index(tiny: Build, tmp_path: Path, name: str) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with refused("adapter", str(tmp_path), expected="index"):
        find_saved(tmp_path)


def test_weights_of_several_saves_are_not_guessed_between(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path, variant="fp16")
    tiny().save_pretrained(tmp_path, variant="ema")
    with refused("adapter", f"'{tmp_path}'", hint="Name one"):
        find_saved(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.ema.safetensors"
    assert find_saved(file).files == (file,)
    (tmp_path / "other").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tiny().state_dict(), tmp_path / "other" / name)
    with refused("adapter", "a.safetensors, b.safetensors", hint="Name one"):
        find_saved(tmp_path / "other")


@pytest.mark.parametrize(
    "content", [b'{"a": "\\ud800"}', b'{"a": 1' + b"0" * 400 + b"}", b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}"]
)
def test_json_that_no_adapter_needs(tiny: Build, tmp_path: Path, content: bytes) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with refused("adapter", "config.json'", expected="JSON"):
        find_saved(tmp_path)


@pytest.mark.parametrize("name", ["average.safetensors", "state.json"])
def test_checkpoints_that_have_changed(tiny: Build, tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", tiny(), steps=(2,)) / "checkpoints" / "step-00000002"
    if name == "state.json":
        (folder / name).write_text("{}")
    else:
        tensors = load_file(folder / name)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, folder / name)
    with refused("adapter", f"'{folder / name}', which was changed"):
        find_saved(folder)


def test_a_checkpoint_without_weights(tiny: Build, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 4, {"optimizer": tiny().state_dict()}, {})
    with refused("adapter", f"'{folder}'", expected="weights"):
        find_saved(folder)


# A Nexus adapter's config


def test_a_config_with_its_defaults(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("block", "block_options", "noise_exponent", "format_version"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = check_nexus(find_saved(tmp_path))
    assert (found["block"], found["block_options"], found["noise_exponent"]) == ("paper", {}, 0.0)


@pytest.mark.parametrize(
    ("changes", "received"),
    [
        ({"text_width": -1}, "(text_width: expected a positive integer, got -1)"),
        ({"pools": [0]}, "(pools: "),
        ({"heads": None}, "heads"),
        ({"groups": 2}, "a prime adapter in"),
    ],
)
def test_configs_that_do_not_fit(tiny: Build, tmp_path: Path, changes: dict[str, Any], received: str) -> None:
    tiny().save_pretrained(tmp_path)
    config = config_of(tiny()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with refused("adapter", received) as caught:
        check_nexus(find_saved(tmp_path))
    assert f"'{tmp_path}'" in str(caught.value)


def test_finding_does_not_import_torch(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    program = (
        "import sys; from nexus_adapters.adapter.saved import find_saved;"
        "find_saved(sys.argv[1]).sha256(); find_saved('slim').parameters; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
