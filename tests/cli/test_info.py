import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_adapters import NexusAdapter
from nexus_adapters.adapter.bases import describe_base
from nexus_adapters.cli import main
from nexus_adapters.cli.saved_adapter import read_saved_adapter
from nexus_adapters.embedded import embedded_adapter

SD = {
    "channels": (320, 640, 1280, 1280),
    "pools": (False, True, True, True),
    "unshuffle": 8,
    "text_width": 768,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(**arguments):
    base = {"channels": (32, 64), "pools": (False, True), "unshuffle": 8, "text_width": 48}
    return NexusAdapter(**base | {"heads": 1, "head_width": 32} | arguments)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    tiny(groups=2).save_pretrained(tmp_path / "slim")
    return tmp_path / "slim"


def rows(capsys, path):
    assert main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines}


@pytest.mark.parametrize(("groups", "variant"), [(1, "prime"), (2, "slim")])
def test_says_what_an_adapter_is(tmp_path, capsys, groups, variant):
    adapter = tiny(groups=groups, residual=True)
    adapter.save_pretrained(tmp_path)
    shown = rows(capsys, tmp_path)
    assert shown["variant"] == f"{variant} (groups {groups}), residual"
    assert shown["parameters"] == f"{sum(p.numel() for p in adapter.parameters()):,} (F32)"
    assert "text width 48, channels 32, 64" in shown["base"]
    assert shown["files"] == WEIGHTS


def test_hash_is_over_dtype_shape_and_bytes_in_order_of_the_names(saved, capsys):
    digest = hashlib.sha256()
    for _, tensor in sorted(load_file(saved / WEIGHTS).items()):
        digest.update(f"F32 {','.join(str(side) for side in tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    assert rows(capsys, saved)["sha256"] == digest.hexdigest()


def test_hash_ignores_sharding_and_metadata_and_sees_one_weight(saved, tmp_path):
    whole = read_saved_adapter(saved).sha256()
    NexusAdapter.from_pretrained(saved).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shards = read_saved_adapter(tmp_path / "shards")
    assert len(shards.files) > 1
    assert shards.sha256() == whole
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors, saved / WEIGHTS, metadata={"note": "other"})
    assert read_saved_adapter(saved).sha256() == whole
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, saved / WEIGHTS)
    assert read_saved_adapter(saved).sha256() != whole


def test_half_precision_and_variants(saved, tmp_path, capsys):
    half = NexusAdapter.from_pretrained(saved).to(torch.bfloat16)
    half.save_pretrained(saved, variant="bf16")
    assert "(F32)" in rows(capsys, saved)["parameters"]
    half.save_pretrained(tmp_path / "half", variant="bf16")
    half.save_pretrained(tmp_path / "shards", variant="bf16", max_shard_size="30KB")
    shown, sharded = rows(capsys, tmp_path / "half"), rows(capsys, tmp_path / "shards")
    assert "(BF16)" in shown["parameters"]
    assert shown["files"] == "diffusion_pytorch_model.bf16.safetensors"
    assert shown["sha256"] == sharded["sha256"]


@pytest.mark.parametrize(
    ("config", "base"),
    [
        (SD, "Stable Diffusion 1.x (text width 768, channels 320, 640, 1280, 1280)"),
        (SD | {"text_width": 1024}, "Stable Diffusion 2.x (text width 1024"),
        (
            SD | {"unshuffle": 16, "pools": [False, False, True, False], "text_width": 2048},
            "Stable Diffusion XL (text width 2048",
        ),
        (embedded_adapter("prime").config, "the embedded Stable Diffusion (text width 160"),
        (SD | {"text_width": 512}, "text width 512, channels 320, 640, 1280, 1280"),
        (SD | {"pools": (False, True, True, False)}, "text width 768"),
    ],
)
def test_names_the_base(config, base):
    assert describe_base(config).startswith(base)


def break_config(**changes):
    def act(folder):
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return act


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def index_only(content):
    def act(folder):
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_bytes(content)

    return act


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "which has no config.json"),
        (write("config.json", b"{"), "PATH: expected JSON; received"),
        (write("config.json", b"[1]"), "PATH: expected a JSON object; received"),
        (write("model_index.json", b"{}"), "which is a pipeline"),
        (break_config(_class_name="T2IAdapter"), "whose config.json says T2IAdapter"),
        (break_config(_class_name=None), "whose config.json says no _class_name"),
        (break_config(text_width=None), "whose config.json lacks 'text_width'"),
        (break_config(text_width=-1), "whose config.json is wrong: text_width: expected"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"PATH: expected {WEIGHTS}; received"),
        (write(WEIGHTS, b""), "PATH: expected safetensors; received"),
        (truncate, "PATH: expected safetensors; received"),
        (index_only(b"{}"), "PATH: expected a weight_map; received"),
        (index_only(b'{"weight_map": {"a": "gone.safetensors"}}'), "PATH: expected the shard"),
    ],
)
def test_anything_else_is_one_line_and_status_2(saved, capsys, damage, message):
    damage(saved)
    assert main(["info", str(saved)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nexus info: error: PATH: expected")
    assert message in err
    assert err.count("\n") == 1


def test_paths_that_are_no_folder(saved, capsys):
    for path, message in [(saved / "gone", "which does not exist"), (saved / WEIGHTS, "which is a file")]:
        assert main(["info", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_pipeline_folder_points_to_its_adapter(saved, capsys):
    pipeline = saved.parent
    saved.rename(pipeline / "adapter")
    (pipeline / "model_index.json").write_text("{}")
    assert main(["info", str(pipeline)]) == 2
    assert f"its adapter is '{pipeline / 'adapter'}'" in capsys.readouterr().err


def test_damaged_weights_are_told(saved, capsys):
    file = saved / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert main(["info", str(saved)]) == 2
    assert "nexus info: error: PATH: expected tensors with the SHA-256" in capsys.readouterr().err


def test_files_without_a_hash(saved, capsys):
    file = saved / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file)
    assert rows(capsys, saved)["sha256"].endswith(" (its files tell none)")


def test_a_config_of_another_variant_than_the_tensors_is_told(saved, capsys):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"groups": 3 - config["groups"]}))
    assert main(["info", str(saved)]) == 2
    assert "PATH: expected the tensors of a " in capsys.readouterr().err


def test_an_adapter_from_before_an_option_existed_has_its_default(saved, capsys):
    break_config(noise_exponent=None)(saved)
    assert "fades" not in rows(capsys, saved)["variant"]
    assert read_saved_adapter(saved).config["noise_exponent"] == 0
    break_config(noise_exponent=0.5)(saved)
    assert rows(capsys, saved)["variant"].endswith("fades with the noise (exponent 0.5)")
