"""Hashes in the metadata of saved adapters: what is not as it was saved is not loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.refusals import refused

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.weights import add_metadata, check_hash, hash_tensors, read_header
from nexus_adapters.errors import InvalidArgument

Build = Callable[..., NexusAdapter]

PATH = "pretrained_model_name_or_path"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as stored:
        found: dict[str, str] = stored.metadata()
    return found


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("size", ["10GB", "10KB"])
def test_each_file_of_a_save_has_the_hash_of_all(tiny: Build, tmp_path: Path, size: str) -> None:
    adapter = tiny()
    adapter.save_pretrained(tmp_path / "a", max_shard_size=size)
    adapter.save_pretrained(tmp_path / "b", max_shard_size="5KB")
    files = weights(tmp_path / "a")
    assert (len(files) > 1) == (size == "10KB")
    hashes = {metadata(file)["sha256"] for file in [*files, *weights(tmp_path / "b")]}
    tensors = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
    assert hashes == {hash_tensors(tensors)}
    assert {metadata(file)["format"] for file in files} == {"pt"}
    again = NexusAdapter.from_pretrained(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter.parameters(), strict=True))


def test_several_saves_in_one_folder_have_their_own(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    tiny().half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert len({metadata(file)["sha256"] for file in weights(tmp_path)}) == 2
    assert (
        NexusAdapter.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16).dtype
        == torch.float16
    )


def flipped(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -50])
@pytest.mark.parametrize("size", ["10GB", "10KB"])
def test_one_flipped_bit_is_found(tiny: Build, tmp_path: Path, size: str, place: int) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size=size)
    flipped(weights(tmp_path)[-1], place)
    with refused(PATH, str(tmp_path), expected="SHA-256", hint="damaged"):
        NexusAdapter.from_pretrained(tmp_path)


def test_a_shard_of_another_save_is_found(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "a", max_shard_size="10KB")
    torch.manual_seed(1)
    other = tiny()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    shard = weights(tmp_path / "a")[1]
    shard.write_bytes((tmp_path / "b" / shard.name).read_bytes())
    with refused(PATH, "10 files in ", hint="from several saves"):
        NexusAdapter.from_pretrained(tmp_path / "a")


def test_a_truncated_file_is_refused(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    for length in (len(content) - 1, len(content) // 2, 4, 0):
        (tmp_path / WEIGHTS).write_bytes(content[:length])
        with pytest.raises((InvalidArgument, OSError), match=WEIGHTS):
            NexusAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("has_hash", [True, False])
def test_numbers_that_are_not_finite_are_refused(
    tiny: Build, tmp_path: Path, value: float, has_hash: bool
) -> None:
    adapter = tiny()
    with torch.no_grad():
        next(adapter.parameters())[0] = value
    adapter.save_pretrained(tmp_path)
    if not has_hash:
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    with refused(PATH, "adapter.conv_in.weight", expected="finite"):
        NexusAdapter.from_pretrained(tmp_path)


def test_files_without_a_hash_load(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    assert check_hash([tmp_path / WEIGHTS]) is None
    NexusAdapter.from_pretrained(tmp_path)


def test_pickles_are_neither_written_nor_read(tiny: Build, tmp_path: Path) -> None:
    with refused("safe_serialization", "False"):
        tiny().save_pretrained(tmp_path, safe_serialization=False)
    tiny().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with refused(PATH, ".bin", expected="safetensors"):
        NexusAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"channels": 3}', ""])
def test_malformed_configs_are_refused(tiny: Build, tmp_path: Path, content: str) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError, AttributeError, TypeError)):
        NexusAdapter.from_pretrained(tmp_path)


def test_a_config_of_another_class_is_refused(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModel"}))
    with refused("config", "a ControlNetModel", expected="a NexusAdapter", hint="ControlNetModel"):
        NexusAdapter.from_pretrained(tmp_path)


def test_saving_over_damaged_files(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    tiny().save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    assert check_hash([tmp_path / WEIGHTS]) is not None


def test_metadata_are_added_and_tensors_stay(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.float16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    add_metadata(tmp_path / "x.safetensors", {"more": "wörds"})
    assert metadata(tmp_path / "x.safetensors") == {"format": "pt", "more": "wörds"}
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_pushing_uploads_what_has_the_hash(tiny: Build, tmp_path: Path) -> None:
    pushed = []

    class Pushed(NexusAdapter):
        def push_to_hub(self, repo_id: str, **options: object) -> None:
            pushed.append((repo_id, options, "sha256" in metadata(tmp_path / WEIGHTS)))

    adapter = Pushed(**dict(tiny().config))
    adapter.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/adapter", private=True)
    assert pushed == [("me/adapter", {"private": True, "variant": None}, True)]
