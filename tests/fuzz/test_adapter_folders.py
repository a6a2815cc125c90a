"""Damaged and made-up adapter files: all readers load them, or all raise one `InvalidArgument`."""

import argparse
import copy
import json
import random
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import load_file, save_file
from tests.adapter.test_formats import as_original
from tests.cli.test_info import CONTROLNET

from nexus_adapters import NexusAdapter, load_adapter
from nexus_adapters.adapter.formats import export_file, import_adapter
from nexus_adapters.adapter.weights import read_header
from nexus_adapters.cli import info
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import file_sha256
from nexus_adapters.training.checkpoint import save_checkpoint

JUNK = [
    None, True, False, 0, 1, 2, -1, 3.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x",
    "prime", "someone/else", "../..", "/etc", "\0", "a" * 5000, "\ud800", [], {}, [None], [[]], [0], [4, 8],
    [2**40, 8], [10**9], [True, False], {"a": 1}, "NexusAdapter", "T2IAdapter", "ControlNetModel", ["x"],
]  # fmt: skip
WHOLE = [b"", b"{}", b"[]", b"null", b"3", b'"someone/else"', b'"."', b"[" * 5000, b"\xff\xfe{}", b"NaN"]
KINDS = [
    torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float16, torch.bfloat16, torch.float64,
]  # fmt: skip
FORMS = ("folder", "shards", "single file", "T2I folder", "T2I pickle", "checkpoint", "ControlNet")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder for each of FORMS."""
    root = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    geometry = {"channels": (4, 8), "pools": (0, 1), "unshuffle": 8, "text_width": 4}
    adapter = NexusAdapter(**geometry, heads=1, head_width=4, groups=2, residual=True).eval()
    t2i = T2IAdapter(channels=[4, 8, 8, 8], num_res_blocks=2).eval()
    adapter.save_pretrained(root / "folder")
    adapter.save_pretrained(root / "shards", max_shard_size="1KB")
    (root / "single file").mkdir()
    export_file(adapter, root / "single file" / "one.safetensors")
    t2i.save_pretrained(root / "T2I folder")
    net = ControlNetModel(**CONTROLNET)
    net.save_pretrained(root / "ControlNet")
    (root / "T2I pickle").mkdir()
    torch.save({"state_dict": as_original(t2i)}, root / "T2I pickle" / "t2i.pth")
    state = {"adapter": json.loads(adapter.to_json_string()), "format_version": 2}
    made = save_checkpoint(root / "checkpoints", 1, {"module": adapter.state_dict()}, state)
    made.rename(root / "checkpoint")
    return root


def places(content, path=()):
    """The paths of all values in JSON."""
    found = [path]
    keys = content if isinstance(content, dict) else range(len(content) if isinstance(content, list) else 0)
    for key in keys:
        value = content[key]
        found += places(value, (*path, key))
    return found


def changed_json(content, chance):
    """With one value replaced, removed or added."""
    content = copy.deepcopy(content)
    path = chance.choice(places(content))
    junk = chance.choice(JUNK) if chance.random() < 0.9 else json.loads("[" * 200 + "]" * 200)
    if not path:
        return {**content, chance.choice(["more", "quantization_config", "_more", "auto_map"]): junk}
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    if chance.random() < 0.2:
        del inside[path[-1]]
    else:
        inside[path[-1]] = junk
    return content


def change_json_file(file, chance):
    if chance.random() < 0.15:
        file.write_bytes(chance.choice(WHOLE))
    else:
        file.write_text(json.dumps(changed_json(json.loads(file.read_text()), chance)))


def change_bytes(file, chance):
    content = bytearray(file.read_bytes())
    place = chance.choice([chance.randrange(len(content)), chance.randrange(min(len(content), 400))])
    how = chance.randrange(3)
    if how == 0:
        content[place] ^= 1 << chance.randrange(8)
    elif how == 1:
        del content[place:]
    else:
        content[place:place] = chance.randbytes(chance.randrange(1, 9))
    file.write_bytes(bytes(content))


def change_tensors(tensors, chance):
    """One of them: its type, shape, values, name or presence."""
    name = chance.choice(sorted(tensors))
    tensor, how = tensors[name], chance.randrange(8)
    if how < 3:
        tensors[name] = tensor.to(chance.choice(KINDS))
    elif how == 3:
        tensors[name] = torch.zeros([chance.randrange(4) for _ in range(chance.randrange(5))])
    elif how == 4:
        tensors[name] = torch.full_like(tensor, chance.choice([float("nan"), float("inf")]))
    elif how == 5:
        del tensors[name]
    elif how == 6:
        tensors[chance.choice(["more", "adapter.body.9.more", "adapter.body.x.y", "module." + name])] = tensor
    else:
        tensors[name + chance.choice(["", ".x", "0"])] = tensors.pop(name)
    return {key: value.contiguous() for key, value in tensors.items()}


def change_weights(file, chance):
    """Also the config in the metadata; the hash stays only where nothing says what it was."""
    if file.suffix == ".pth":
        torch.save({"state_dict": change_tensors(torch.load(file)["state_dict"], chance)}, file)
        return
    metadata = dict(read_header(file).metadata)
    metadata.pop("sha256", None)
    key = "nexus_adapters.config"
    if key in metadata and chance.random() < 0.6:
        metadata[key] = json.dumps(changed_json(json.loads(metadata[key]), chance))
        save_file(load_file(file), file, metadata)
    else:
        save_file(change_tensors(load_file(file), chance), file, metadata)


def change(folder, chance):
    file = chance.choice(sorted(folder.iterdir()))
    how = chance.random()
    if how < 0.05:
        file.unlink()
    elif how < 0.3 and file.stat().st_size:
        change_bytes(file, chance)
    elif file.suffix == ".json":
        change_json_file(file, chance)
    else:
        change_weights(file, chance)


def read_info(source):
    info.run(argparse.Namespace(path=str(source), condition="canny"))


def outcome(read, source):
    """None where it loads, else the error."""
    try:
        adapter = read(source)
    except InvalidArgument as error:
        return error
    assert adapter is None or all(bool(p.isfinite().all()) for p in adapter.parameters())
    return None


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"asked the Hub for {args} {kwargs}")

    for name in ("snapshot_download", "hf_hub_download", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", refuse)
    monkeypatch.setattr("diffusers.utils.hub_utils.hf_hub_download", refuse)


def check_case(form, seed, originals, tmp_path, capsys):
    chance = random.Random(f"{form} {seed}")
    folder = Path(shutil.copytree(originals / form, tmp_path / f"{form} {seed}"))
    for _ in range(0 if seed is None else chance.choice([1, 1, 1, 2])):
        if any(folder.iterdir()):
            try:
                change(folder, chance)
            except Exception:  # it was damaged already
                continue
    manifest = folder / "manifest.json"
    if form == "checkpoint" and seed is not None and manifest.is_file() and chance.random() < 0.8:
        hashes = {file.name: file_sha256(file) for file in folder.iterdir() if file != manifest}
        manifest.write_text(json.dumps({"sha256": hashes}))
    source = folder
    if form in ("single file", "T2I pickle"):
        source = next(folder.iterdir(), folder / "gone.pth")
    readers = {"load_adapter": load_adapter, "info": read_info}
    if form not in ("checkpoint", "ControlNet"):
        readers["import_adapter"] = lambda source: import_adapter(source).adapter
    if form in ("folder", "shards"):
        readers["from_pretrained"] = NexusAdapter.from_pretrained
    if form == "single file":
        readers["from_single_file"] = NexusAdapter.from_single_file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: outcome(read, source) for name, read in readers.items()}
    shown = capsys.readouterr().out
    if "not registered" in shown or "no known method loads" in shown:
        del found["info"]  # which says what is missing here
    longest = max((str(error) for error in found.values() if error is not None), key=len, default="")
    assert len(longest) < 3000, longest[:300]
    assert len({error is None for error in found.values()}) == 1, found
    shutil.rmtree(folder)
    return found["load_adapter"] is None


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_adapter_loads_or_is_refused_by_all_readers_alike(form, originals, tmp_path, capsys):
    assert check_case(form, None, originals, tmp_path, capsys)  # as it is
    loaded = [check_case(form, seed, originals, tmp_path, capsys) for seed in range(32)]
    assert any(loaded)
    assert not all(loaded)


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_thousands_of_changes(form, originals, tmp_path, capsys):
    for seed in range(32, 1000):
        check_case(form, seed, originals, tmp_path, capsys)
