import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import load_file, save_file

from nexus_adapters import InvalidArgument, NexusAdapter, load_adapter
from nexus_adapters.adapter.arguments import describe_base
from nexus_adapters.adapter.saved import check_nexus, find_saved
from nexus_adapters.cli import main
from nexus_adapters.methods import find_method
from nexus_adapters.training.checkpoint import save_checkpoint

SD = {
    "channels": (320, 640, 1280, 1280),
    "pools": (False, True, True, True),
    "unshuffle": 8,
    "text_width": 768,
}
CONTROLNET = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "conditioning_embedding_out_channels": (4, 8),
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
    assert shown["variant"] == f"{variant} (groups {groups}, residual connection)"
    assert shown["block"] == "paper"
    assert shown["format"] == "version 1"
    assert shown["parameters"] == f"{sum(p.numel() for p in adapter.parameters()):,} (F32)"
    assert "text width 48, channels 32, 64" in shown["base"]
    assert shown["files"] == WEIGHTS


def test_says_that_an_adapter_is_the_papers(saved, capsys):
    assert rows(capsys, saved)["variant"].startswith("slim-paper (groups 2, no residual connection")


def test_a_block_that_is_not_registered_is_described(saved, capsys):
    break_config(block="gate", block_options={"gain": 2.0, "kind": "sum"})(saved)
    shown = rows(capsys, saved)["block"]
    assert shown.startswith("gate, gain 2.0, kind 'sum' (not registered")
    assert "--import" in shown


def test_a_newer_format_is_refused(saved, capsys):
    break_config(format_version=2)(saved)
    assert main(["info", str(saved)]) == 2
    errors = capsys.readouterr().err
    assert "format_version" in errors
    assert "upgrade" in errors


def test_hash_is_over_dtype_shape_and_bytes_in_order_of_the_names(saved, capsys):
    digest = hashlib.sha256()
    for _, tensor in sorted(load_file(saved / WEIGHTS).items()):
        digest.update(f"F32 {','.join(str(side) for side in tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    assert rows(capsys, saved)["sha256"] == digest.hexdigest()


def test_hash_ignores_sharding_and_metadata_and_sees_one_weight(saved, tmp_path):
    whole = find_saved(saved).sha256()
    NexusAdapter.from_pretrained(saved).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shards = find_saved(tmp_path / "shards")
    assert len(shards.files) > 1
    assert shards.sha256() == whole
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors, saved / WEIGHTS, metadata={"note": "other"})
    assert find_saved(saved).sha256() == whole
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, saved / WEIGHTS)
    assert find_saved(saved).sha256() != whole


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
        (find_saved("prime").config, "the embedded Stable Diffusion (text width 160"),
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
        (write("config.json", b"{"), "config.json'"),
        (write("config.json", b"[1]"), "config.json'"),
        (write("model_index.json", b"{}"), "pipeline"),
        (break_config(text_width=None), "text_width"),
        (break_config(text_width=-1), "text_width: expected a positive integer, got -1"),
        (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
        (write(WEIGHTS, b""), f"{WEIGHTS}'"),
        (truncate, f"{WEIGHTS}'"),
        (index_only(b"{}"), "weight_map"),
        (index_only(b'{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
    ],
)
def test_anything_else_is_one_line_and_status_2(saved, capsys, damage, message):
    damage(saved)
    assert main(["info", str(saved)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nexus info: error: PATH: ")
    assert f"'{saved}" in err
    assert message in err
    assert err.count("\n") == 1


def test_paths_that_are_no_adapter(saved, capsys):
    for path in (saved / "gone", saved / "config.json"):
        assert main(["info", str(path)]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("nexus info: error: PATH: ")
        assert f"'{path}'" in errors


def refusal(capsys, path):
    """The one line, which is also that of loading it."""
    assert main(["info", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    with pytest.raises(InvalidArgument) as caught:
        load_adapter(path)
    assert err == f"nexus info: error: {caught.value.with_name('PATH')}\n"
    return err


def test_weights_without_a_config(saved, capsys):
    """Ours and those of others, in folders and files: nobody knows what they are."""
    (saved / "config.json").unlink()
    for _ in ("with a hash", "without"):
        for path in (saved, saved / WEIGHTS):
            assert "config.json" in refusal(capsys, path)
        save_file(load_file(saved / WEIGHTS), saved / WEIGHTS)


def cast(kind):
    def act(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors["adapter.conv_in.bias"] = tensors["adapter.conv_in.bias"].to(kind)
        save_file(tensors, folder / WEIGHTS)

    return act


def fill(value):
    def act(folder):
        tensors = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
        tensors["adapter.body.0.norm1.bias"][-1] = value
        save_file(tensors, folder / WEIGHTS)

    return act


@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        (cast(torch.int8), "adapter.conv_in.bias"),
        (cast(torch.bool), "adapter.conv_in.bias"),
        (cast(torch.complex64), "adapter.conv_in.bias"),
        (cast(torch.float8_e4m3fn), "adapter.conv_in.bias"),
        (fill(float("nan")), "adapter.body.0.norm1.bias"),
        (fill(float("-inf")), "adapter.body.0.norm1.bias"),
        (lambda folder: break_config(channels=[32, 128])(folder), "adapter.body.1"),
        (lambda folder: break_config(channels=[32], pools=[0])(folder), "unexpected"),
        (lambda folder: break_config(unshuffle=2**50)(folder), "conv_in.weight"),
        (lambda folder: break_config(more=1)(folder), "unknown: more"),
        (lambda folder: break_config(quantization_config={"bits": 4})(folder), "quantization_config"),
    ],
)
def test_what_loading_refuses_is_no_adapter_here_either(saved, capsys, damage, shown):
    damage(saved)
    assert main(["info", str(saved)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert shown in err
    with pytest.raises(InvalidArgument, match=shown.replace(".", "[.]")):
        load_adapter(saved)


def test_a_t2i_adapter(tmp_path, capsys):
    T2IAdapter(channels=[8, 8], downscale_factor=2).save_pretrained(tmp_path)
    assert rows(capsys, tmp_path)["kind"] == "T2I-Adapter (T2IAdapter)"


def test_a_weights_file_with_its_config_next_to_it(saved, tmp_path, capsys):
    assert rows(capsys, saved / WEIGHTS) == rows(capsys, saved)
    ControlNetModel(**CONTROLNET).save_pretrained(tmp_path / "controlnet")
    shown = rows(capsys, tmp_path / "controlnet" / WEIGHTS)
    assert shown == rows(capsys, tmp_path / "controlnet")
    assert shown["kind"] == "ControlNet (ControlNetModel)"


def test_a_subclass_that_has_been_imported(tmp_path, capsys):
    class MyAdapter(NexusAdapter):
        pass

    adapter = MyAdapter(**dict(tiny(groups=2, residual=True).config))
    adapter.save_pretrained(tmp_path)
    shown = rows(capsys, tmp_path)
    assert shown["kind"] == "MyAdapter"
    assert shown["variant"].startswith("slim (groups 2")


def test_a_class_that_no_method_loads(saved, capsys):
    break_config(_class_name="TheirAdapter")(saved)
    shown = rows(capsys, saved)
    assert "TheirAdapter" in shown["kind"]
    assert "variant" not in shown


@pytest.mark.parametrize(
    ("section", "label"),
    [
        ({"method": "slim"}, "Nexus Slim (paper configuration)"),
        ({"method": "slim", "residual": True}, "Nexus Slim"),
        ({"method": "t2i"}, "T2I-Adapter"),
    ],
)
def test_a_checkpoint_without_a_config_is_described_by_its_run(tmp_path, capsys, section, label):
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in section.items())
    (tmp_path / "config.toml").write_text(f"[adapter]\n{text}")
    save_checkpoint(tmp_path / "checkpoints", 2, {"module": tiny().state_dict()}, {})
    assert rows(capsys, tmp_path)["kind"] == label


def test_the_public_releases_adapters(saved, capsys):
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS)
    config = {"_class_name": "NexusAdapter", "downscale_factor": 8, "adapter_type": "full_adapter"}
    (saved / "config.json").write_text(json.dumps(config))
    assert rows(capsys, saved)["kind"] == "Nexus adapter of the public release"


def test_pickles(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"nothing")
    assert "x.pth" in refusal(capsys, tmp_path / "x.pth")
    torch.save(T2IAdapter(channels=[8, 8]).state_dict(), tmp_path / "t2i.pth")
    shown = rows(capsys, tmp_path / "t2i.pth")
    assert (shown["kind"], shown["parameters"]) == ("T2I-Adapter", "in a pickle")


def test_a_nexus_adapter_is_described_without_torch(saved):
    program = (
        "import sys; from nexus_adapters.cli import main; main(['info', sys.argv[1]]);"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "False"
    shown = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()[:-1]}
    described = find_method("slim").describe(find_saved(saved))  # the same as by its method
    assert {name: shown[name] for name in described} == described


def test_a_config_that_does_not_name_its_class(saved, capsys):
    expected = rows(capsys, saved)
    break_config(_class_name=None)(saved)
    assert rows(capsys, saved) == expected


def test_the_adapter_of_a_pipeline(saved, capsys):
    expected, pipeline = rows(capsys, saved), saved.parent
    saved.rename(pipeline / "adapter")
    (pipeline / "model_index.json").write_text("{}")
    assert rows(capsys, pipeline) == expected


def test_damaged_weights_are_refused(saved, capsys):
    file = saved / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert main(["info", str(saved)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("nexus info: error: PATH: ")
    assert "SHA-256" in errors
    assert f"'{file}'" in errors


def test_files_without_a_hash(saved, capsys):
    file = saved / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file)
    assert rows(capsys, saved)["sha256"].endswith(" (computed; the files do not record one)")


def test_a_config_of_another_variant_than_the_tensors_is_refused(saved, capsys):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"groups": 3 - config["groups"]}))
    assert main(["info", str(saved)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("nexus info: error: PATH: ")
    assert f"'{saved}'" in errors
    assert "groups 1" in errors


def test_an_adapter_from_before_an_option_existed_has_its_default(saved, capsys):
    break_config(noise_exponent=None)(saved)
    assert "fades" not in rows(capsys, saved)["variant"]
    assert check_nexus(find_saved(saved))["noise_exponent"] == 0
    break_config(noise_exponent=0.5)(saved)
    assert rows(capsys, saved)["variant"].endswith("fades with the noise (exponent 0.5)")
