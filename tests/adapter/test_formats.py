"""Adapters in others' formats, each written in that format's exact key layout."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.refusals import refused
from torch import Tensor

from nexus_adapters.adapter.formats import export_file, import_adapter
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.tensors import split_kernel
from nexus_adapters.adapter.weights import add_metadata, read_header
from nexus_adapters.methods import load_adapter

SD = {"channels": [64, 128, 128, 128], "num_res_blocks": 2, "downscale_factor": 8}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def t2i(in_channels=3, **changes):
    torch.manual_seed(2)
    return T2IAdapter(in_channels=in_channels, **SD | changes).eval()


def nexus(variant="prime", **changes):
    torch.manual_seed(3)
    arguments = {
        "channels": SD["channels"],
        "pools": [0, 1, 1, 1],
        "unshuffle": 8,
        "groups": 1 if variant == "prime" else 2,
        "text_width": 768,
        "heads": 1,
        "head_width": 64,
    }
    return NexusAdapter(**arguments | changes).eval()


def same(adapter, other):
    ours, theirs = adapter.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def as_original(adapter: T2IAdapter) -> dict[str, Tensor]:
    """The names under which T2I-Adapters were first published, written down one by one."""
    stored, found = adapter.state_dict(), {}
    for part in ("weight", "bias"):
        found[f"conv_in.{part}"] = stored[f"adapter.conv_in.{part}"]
        found[f"body.2.in_conv.{part}"] = stored[f"adapter.body.1.in_conv.{part}"]
        for stage in range(4):
            for unit in range(2):
                for block in ("block1", "block2"):
                    name = f"body.{2 * stage + unit}.{block}.{part}"
                    found[name] = stored[f"adapter.body.{stage}.resnets.{unit}.{block}.{part}"]
    return found


# The release's config, and what it writes there: `groups` says nothing of the weights.
RELEASE = {"_class_name": "NexusAdapter", "_diffusers_version": "0.30.0", "in_channels": 3, **SD}


def test_the_releases_folders_load_as_adapters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASE | {"adapter_type": "full_adapter", "groups": 2}))
    save_file(nexus("slim").state_dict(), tmp_path / WEIGHTS)
    loaded = load_adapter(tmp_path)
    assert loaded.variant == "slim-paper"
    assert same(loaded, nexus("slim"))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_what_is_wrong_in_a_config_is_named_with_its_adapter(tmp_path, form):
    config = json.loads(nexus().to_json_string()) | {"heads": 0}
    source = tmp_path / "x.safetensors"
    if form == "folder":
        source = tmp_path / "x"
        nexus().save_pretrained(source)
        (source / "config.json").write_text(json.dumps(config))
    else:
        save_file(nexus().state_dict(), source, {"nexus_adapters.config": json.dumps(config)})
    with refused("adapter", f"'{source}' (heads: expected a positive integer, got 0)"):
        load_adapter(source)


@pytest.mark.parametrize("variant", ["prime", "slim"])
@pytest.mark.parametrize("form", ["folder", "folder of pickles", "state dict", "pickled state dict"])
def test_the_releases_adapters_are_imported_exactly(tmp_path, variant, form):
    expected = nexus(variant)
    stored = expected.state_dict()
    assert ("adapter.body.0.resnets.0.block1.gwc.weight" in stored) == (variant == "slim")
    source = tmp_path / "release"
    if form.startswith("folder"):
        source.mkdir()
        config = RELEASE | {"adapter_type": "full_adapter", "groups": 2}
        (source / "config.json").write_text(json.dumps(config))
        if form == "folder":
            save_file(stored, source / WEIGHTS)
        else:
            torch.save(stored, source / "diffusion_pytorch_model.bin")
    elif form == "state dict":
        source = tmp_path / "weights.safetensors"
        save_file(stored, source)
    else:
        source = tmp_path / "weights.pth"
        torch.save({"state_dict": stored}, source)
    found = import_adapter(source, None if form.startswith("folder") else f"{variant}-paper")
    assert found.kind == "an adapter of the public release"
    assert found.adapter.variant == f"{variant}-paper"
    assert same(found.adapter, expected)
    assert dict(found.adapter.config)["residual"] is False
    assert {k: v for k, v in found.adapter.config.items() if k[:1] != "_"} == {
        k: v for k, v in expected.config.items() if k[:1] != "_"
    }
    text = torch.randn(1, 5, 768)
    pairs = zip(found.adapter(tiny.condition(), text), expected(tiny.condition(), text), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_of_ours_that_have_lost_their_config_are_refused(tmp_path):
    """The form and the heads are in no tensor."""
    nexus(residual=True, heads=4, head_width=16).save_pretrained(tmp_path)
    assert load_adapter(tmp_path / WEIGHTS).config.heads == 4
    (tmp_path / "config.json").unlink()
    for source in (tmp_path, tmp_path / WEIGHTS):
        with refused("source", f"'{source}'", hint="config.json next to"):
            import_adapter(source)
        with refused("adapter", f"'{source}'", hint="config.json next to"):
            load_adapter(source)


@pytest.mark.parametrize(
    "own",
    [
        {"residual": True, "heads": 4, "head_width": 16},  # heads and form are in no tensor
        {"heads": 2, "head_width": 32, "noise_exponent": 0.5},
        {"groups": 2, "residual": True},
        {},
    ],
    ids=str,
)
def test_nothing_is_guessed_of_weights_without_a_config(tmp_path, own):
    """As of a checkpoint's weights that were copied from its folder."""
    tensors = nexus(**own).state_dict()
    save_file(tensors, tmp_path / "average.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "weights.pth")
    (tmp_path / "folder").mkdir()
    save_file(tensors, tmp_path / "folder" / "module.safetensors")
    stated, other = ("slim", "prime") if own.get("groups") else ("prime", "slim")
    for name in ("average.safetensors", "weights.pth", "folder"):
        for variant in (None, "prime", "slim"):
            with refused("source", name, expected="config", hint="--variant prime-paper"):
                import_adapter(tmp_path / name, variant)
        with refused("adapter", name, expected="config", hint="--variant prime-paper"):
            load_adapter(tmp_path / name)
        with refused("variant", f"{other}-paper", expected=f"{stated}-paper"):
            import_adapter(tmp_path / name, f"{other}-paper")
        assert import_adapter(tmp_path / name, f"{stated}-paper").adapter.variant == f"{stated}-paper"


def test_the_releases_xl_adapter(tmp_path):
    expected = nexus(pools=[0, 0, 1, 0], unshuffle=16, text_width=2048)
    save_file(expected.state_dict(), tmp_path / "xl.safetensors")
    assert import_adapter(tmp_path / "xl.safetensors", "prime-paper").adapter.config["pools"] == (0, 0, 1, 0)
    source = tmp_path / "release"
    source.mkdir()
    config = RELEASE | {"adapter_type": "full_adapter_xl", "downscale_factor": 16, "groups": 1}
    (source / "config.json").write_text(json.dumps(config))
    save_file(expected.state_dict(), source / WEIGHTS)
    found = import_adapter(source).adapter
    assert same(found, expected)
    assert found.config["text_width"] == 2048


@pytest.mark.parametrize(
    ("channels", "heads", "head_width"),
    [([64, 128, 128, 1280], 10, 64), ([64, 128, 128, 128], 3, 32), ([96, 96, 96, 96], 1, 48)],
)
def test_heads_of_the_release(tmp_path, channels, heads, head_width):
    """Ten of 64 for SD's widths, as the attention's tensors show."""
    expected = nexus(channels=channels, heads=heads, head_width=head_width)
    save_file(expected.state_dict(), tmp_path / "x.safetensors")
    config = import_adapter(tmp_path / "x.safetensors", "prime-paper").adapter.config
    assert (config["heads"], config["head_width"]) == (heads, head_width)


@pytest.mark.parametrize("form", ["folder", "pth", "flat safetensors"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_t2i_adapter_starts_a_prime(tmp_path, form, residual):
    trunk = t2i()
    source = tmp_path / "t2i"
    if form == "folder":
        trunk.save_pretrained(source)
    elif form == "pth":
        source = tmp_path / "t2iadapter_canny_sd14v1.pth"
        torch.save(as_original(trunk), source)
    else:
        source = tmp_path / "t2i.safetensors"
        save_file(as_original(trunk), source)
    variant = "prime" if residual else "prime-paper"
    found = import_adapter(source, variant)
    assert found.kind == "a T2I-Adapter"
    assert found.adapter.variant == variant
    assert found.adapter.config["text_width"] == 768
    ours, theirs = found.adapter.state_dict(), trunk.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    if residual:  # until it is trained it gives what the T2I-Adapter gives
        pairs = zip(
            found.adapter(tiny.condition(), torch.randn(1, 5, 768)), trunk(tiny.condition()), strict=True
        )
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert same(import_adapter(source, residual=residual).adapter, found.adapter)
    if not residual:
        assert not same(import_adapter(source, variant, seed=1).adapter, found.adapter)


def test_what_the_t2i_adapters_features_become_is_measured(tmp_path):
    """On line maps: identical, near or unrelated, which the notes say in numbers."""
    trunk = t2i()
    trunk.save_pretrained(tmp_path)
    default = import_adapter(tmp_path)
    assert (default.adapter.config["residual"], default.adapter.config["zero_init"]) == (True, True)
    assert default.notes[0] == "before training, its features equal those of the T2I-Adapter"
    lines = (tiny.condition() > 0.5).float()
    cosines = {}
    for variant, options in {"slim": {}, "prime-paper": {}, "prime": {"zero_init": False}}.items():
        found = import_adapter(tmp_path, variant, **options)
        shown = found.notes[0].partition("first to last, is ")[2].partition(", and")[0]
        cosines[variant] = [float(value) for value in shown.split(", ")]
        pairs = zip(found.adapter(lines, torch.randn(1, 8, 768)), trunk(lines), strict=True)
        measured = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in pairs]
        if variant == "slim":  # of the others the attention is random
            assert cosines[variant] == pytest.approx([value.item() for value in measured], abs=0.15)
        assert "% of the features' norm" in found.notes[0]
    assert 0.8 < min(cosines["slim"]) < max(cosines["slim"]) < 1
    assert max(map(abs, cosines["prime-paper"])) < 0.6


def test_a_stem_for_grey_maps_reads_three_channels(tmp_path):
    trunk = t2i(in_channels=1).half().float()
    torch.save({name: tensor.half() for name, tensor in as_original(trunk).items()}, tmp_path / "depth.pth")
    found = import_adapter(tmp_path / "depth.pth")
    assert found.notes[0] == "before training, its features equal those of the T2I-Adapter"
    assert found.adapter.config["in_channels"] == 3
    assert "one-channel" in " ".join(found.notes)
    grey = torch.rand(1, 1, 64, 64)
    pairs = zip(found.adapter(grey.expand(1, 3, 64, 64), torch.randn(1, 5, 768)), trunk(grey), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_a_t2i_adapter_for_xl(tmp_path):
    trunk = t2i(downscale_factor=16, adapter_type="full_adapter_xl")
    trunk.save_pretrained(tmp_path / "xl")
    torch.save(as_original(trunk), tmp_path / "xl.pth")
    for source in ("xl", "xl.pth"):
        found = import_adapter(tmp_path / source).adapter
        assert (found.config["text_width"], found.config["pools"]) == (2048, (0, 0, 1, 0))
        pairs = zip(found(tiny.condition(), torch.randn(1, 5, 2048)), trunk(tiny.condition()), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert import_adapter(tmp_path / "xl", text_width=1024).adapter.config["text_width"] == 1024


def test_a_t2i_adapter_starts_a_slim(tmp_path):
    t2i().save_pretrained(tmp_path)
    found = import_adapter(tmp_path, "slim")
    assert found.adapter.variant == "slim"
    assert any("least-squares" in note and "bias" in note for note in found.notes)
    stored = found.adapter.state_dict()
    dense = t2i().state_dict()["adapter.body.0.resnets.0.block1.weight"]
    grouped, pointwise = split_kernel(dense, 2)
    assert torch.equal(stored["adapter.body.0.resnets.0.block1.gwc.weight"], grouped)
    assert torch.equal(stored["adapter.body.0.resnets.0.block1.pwc.weight"], pointwise)


def test_the_split_kernel_is_the_least_squares_solution():
    """Against lstsq over all the entries that a grouped 3x3 and a 1x1 can reach."""
    channels, groups = 4, 2
    dense = torch.randn(channels, channels, 3, 3, dtype=torch.float64)
    columns = []
    for out in range(channels):
        for inner in range(channels):
            same_group = out * groups // channels == inner * groups // channels
            for place in range(9) if same_group else ():
                entry = torch.zeros(channels, channels, 9, dtype=torch.float64)
                entry[out, inner, place] = 1
                columns.append(entry.flatten())
            entry = torch.zeros(channels, channels, 9, dtype=torch.float64)
            entry[out, inner, 4] = 1  # the 1x1
            columns.append(entry.flatten())
    matrix = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(matrix, dense.flatten()[:, None], driver="gelsd").solution
    nearest = (matrix @ solution).reshape(dense.shape)
    grouped, pointwise = split_kernel(dense, groups)
    found = torch.zeros_like(dense)
    for g in range(groups):
        rows = slice(2 * g, 2 * g + 2)
        found[rows, rows] += grouped[rows]
    found[:, :, 1:2, 1:2] += pointwise
    assert torch.allclose(found, nearest)
    assert (grouped.square().sum() + pointwise.square().sum()) == pytest.approx(
        float(solution.square().sum())
    )


@pytest.mark.parametrize("variant", ["prime", "slim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trips_are_exact(tmp_path, variant, dtype):
    adapter = nexus(variant, residual=True).to(dtype)
    export_file(adapter, tmp_path / "one.safetensors", {"base": "mine"})
    once = import_adapter(tmp_path / "one.safetensors").adapter
    once.save_pretrained(tmp_path / "folder", max_shard_size="300KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    twice = import_adapter(tmp_path / "folder").adapter
    export_file(twice, tmp_path / "two.safetensors", {"base": "mine"})
    assert same(adapter, once)
    assert same(adapter, twice)
    assert once.dtype == twice.dtype == dtype
    assert {k: v for k, v in twice.config.items() if k[:1] != "_"} == {
        k: v for k, v in adapter.config.items() if k[:1] != "_"
    }
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_save_of_one_variant_of_files(tmp_path):
    adapter = nexus().half()
    for name, size in (("whole", "10GB"), ("shards", "300KB")):
        adapter.save_pretrained(tmp_path / name, variant="fp16", max_shard_size=size)
        assert same(import_adapter(tmp_path / name).adapter, adapter)


def test_a_missing_shard_is_named(tmp_path):
    nexus().save_pretrained(tmp_path, max_shard_size="300KB")
    sorted(tmp_path.glob("*-of-*.safetensors"))[1].unlink()
    with refused("source", "00002-of-"):
        import_adapter(tmp_path)


class Trap:
    """What a pickle with code does when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_code_does_not_execute(tmp_path, protocol):
    sprung = tmp_path / "sprung"
    with (tmp_path / "trap.pth").open("wb") as file:
        pickle.dump({"conv_in.weight": torch.zeros(1), "x": Trap(sprung)}, file, protocol=protocol)
    torch.save({"conv_in.weight": Trap(sprung)}, tmp_path / "zip.pth")
    for name in ("trap.pth", "zip.pth"):
        with refused("source", f"{name}', a pickle with code", hint="not run"):
            import_adapter(tmp_path / name)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("name", "seems"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole Stable Diffusion checkpoint"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "a VAE"),
        ("emb_params", "a textual inversion"),
        ("body.0.out_conv.weight", "a light T2I-Adapter"),
        ("something.weight", "something else (something.weight)"),
    ],
)
def test_what_is_no_adapter_is_described_by_what_it_seems_to_be(tmp_path, name, seems):
    save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
    with refused("source", f"x.safetensors', which seems to be {seems}", expected="an adapter"):
        import_adapter(tmp_path / "x.safetensors")
    if seems not in ("a ControlNet", "a light T2I-Adapter"):  # which have methods of their own
        with refused("adapter", f"x.safetensors', which seems to be {seems}"):
            load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("units", [1, 3])
def test_a_nexus_adapter_has_two_units_per_level(tmp_path, units):
    t2i(channels=[16, 16], num_res_blocks=units).save_pretrained(tmp_path)
    with refused("source", f"with {units}", expected="2 residual blocks per level"):
        import_adapter(tmp_path)
    assert load_adapter(tmp_path).config["num_res_blocks"] == units


def as_original_light(adapter):
    """The names under which light T2I-Adapters were first published."""
    found = {}
    for name, tensor in adapter.state_dict().items():
        found[name.removeprefix("adapter.").replace(".resnets.", ".body.")] = tensor
    return found


LIGHT = {"channels": [8, 16, 24], "num_res_blocks": 4, "adapter_type": "light_adapter"}


@pytest.mark.parametrize("form", ["folder", "pth", "one channel"])
def test_a_light_t2i_adapter_loads_and_starts_nothing(tmp_path, form):
    """As t2iadapter_color: four blocks, whose trunk is another."""
    light, source = T2IAdapter(**LIGHT, in_channels=1 if form == "one channel" else 3), tmp_path / "light"
    if form == "folder":
        light.save_pretrained(source)
    else:
        source = tmp_path / "t2iadapter_color_sd14v1.pth"
        torch.save(as_original_light(light), source)
    loaded = load_adapter(source)
    assert dict(loaded.config) == dict(loaded.config) | LIGHT
    assert same(loaded, light)
    with refused("source", f"'{source}', which seems to be a light T2I-Adapter", hint="load_adapter"):
        import_adapter(source)


@pytest.mark.parametrize(
    ("name", "seems"),
    [
        ("style_embedding", "a style T2I-Adapter"),
        ("task_embedding", "a CoAdapter fuser"),
        ("spatial_feat_mapping.0.1.weight", "a CoAdapter fuser"),
    ],
)
def test_adapters_without_a_structure_map_are_refused_by_name(tmp_path, name, seems):
    torch.save(
        {"ln_pre.weight": torch.ones(2), name: torch.ones(2), "proj": torch.ones(2)}, tmp_path / "x.pth"
    )
    with refused("source", seems):
        import_adapter(tmp_path / "x.pth")
    with refused("adapter", "x.pth"):
        load_adapter(tmp_path / "x.pth")


def prefixed(prefix):
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


WRAPPED = {
    "nested": lambda tensors: {"adapter": tensors, "step": 3},
    "nested twice": lambda tensors: {"state_dict": {"module": tensors}, "optimizer": {"lr": 1}},
    "prefix of the pipeline": prefixed("adapter."),
    "DDP": prefixed("module."),
    "DDP of a pipeline's": prefixed("module.adapter."),
    "compiled in DDP": prefixed("module._orig_mod."),
    "DDP, nested": lambda tensors: {"model": prefixed("module.")(tensors)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("names", ["first published", "diffusers", "diffusers without its prefix", "light"])
def test_what_training_scripts_put_around_a_t2i_adapter_is_removed(tmp_path, wrap, names):
    trunk = T2IAdapter(**LIGHT) if names == "light" else t2i(channels=[8, 16, 16, 16])
    tensors = trunk.state_dict()
    if names == "first published":
        tensors = as_original(trunk)
    elif names == "diffusers without its prefix":
        tensors = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items()}
    elif names == "light":
        tensors = as_original_light(trunk)
    torch.save(wrap(tensors), tmp_path / "x.pth")
    assert same(load_adapter(tmp_path / "x.pth"), trunk)
    if names != "light":
        found = import_adapter(tmp_path / "x.pth")
        assert found.kind == "a T2I-Adapter"
        assert all(torch.equal(found.adapter.state_dict()[k], v) for k, v in trunk.state_dict().items())


def zeros(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def moments(tensors):
    return {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1}]}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"adapter": {**tensors, "step": 3}},
        lambda tensors: {**tensors, "step": 3, "optimizer": moments(tensors)},
        lambda tensors: {"step": torch.tensor(3), "model": tensors, "optimizer": moments(tensors)},
        lambda tensors: {"state_dict": {"epoch": 1}, "adapter": tensors},
        lambda tensors: {"model": {"mean": torch.zeros(3)}, "adapter": tensors},
        lambda tensors: {"state_dict": tensors, "model": tensors},
    ],
    ids=[
        "a counter within",
        "all at the top",
        "a counter of torch",
        "an empty one",
        "statistics",
        "one twice",
    ],
)
def test_what_else_is_in_a_pickle_does_not_hide_the_adapter(tmp_path, wrap):
    trunk = t2i(channels=[8, 16, 16, 16])
    torch.save(wrap(trunk.state_dict()), tmp_path / "x.pth")
    assert same(load_adapter(tmp_path / "x.pth"), trunk)


@pytest.mark.parametrize(
    ("wrap", "received"),
    [
        (lambda t: {"state_dict": zeros(t), "adapter": t}, "in 'state_dict' and 'adapter'"),
        (lambda t: {"adapter": t, "model": {"module": zeros(t)}}, "in 'adapter' and 'model.module'"),
        (lambda t: {**t, "model": zeros(t)}, "in the top level and 'model'"),
        (lambda t: {"model": t, "ema": zeros(t), "step": 3}, "in 'model' and 'ema'"),
        (lambda t: {"ema": t, "step": 3}, "a dict with 'ema', 'step'"),
        (lambda t: {"model": {"a": {"b": {"c": {"d": t}}}}}, "a dict with 'model'"),
        (lambda t: {"step": torch.tensor(3)}, "a dict with 'step'"),
        (lambda t: dict(enumerate(t.values())), "a dict with 0, 1"),
        (lambda t: list(t.values()), "a list"),
    ],
    ids=range(9),
)
def test_a_pickle_whose_adapter_would_have_to_be_guessed_is_refused(tmp_path, wrap, received):
    torch.save(wrap(t2i(channels=[8, 16, 16, 16]).state_dict()), tmp_path / "x.pth")
    for loader, name in ((load_adapter, "adapter"), (import_adapter, "source")):
        with refused(name, received):
            loader(tmp_path / "x.pth")


def test_names_that_become_one_are_refused(tmp_path):
    tensors = as_original(t2i(channels=[8, 16, 16, 16]))
    save_file(tensors | {"module.conv_in.bias": torch.zeros(8)}, tmp_path / "x.safetensors")
    with refused("source", "conv_in.bias and module.conv_in.bias"):
        import_adapter(tmp_path / "x.safetensors")
    with refused("adapter", "conv_in.bias and module.conv_in.bias"):
        load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change", [{"channels": [64, 128, 128]}, {"num_res_blocks": 3}, {"in_channels": 1}, {"adapter_type": "x"}]
)
def test_a_t2i_config_that_contradicts_its_tensors_is_refused(tmp_path, change):
    t2i(channels=[8, 16, 16, 16]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("source"):
        import_adapter(tmp_path)
    with refused("adapter"):
        load_adapter(tmp_path)


def mixed_up(change):
    tensors = nexus().state_dict()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "expected", "received"),
    [
        (lambda t: t.pop("adapter.body.1.norm1.bias"), "exactly", "(missing: adapter.body.1.norm1.bias)"),
        (lambda t: t.pop("adapter.conv_in.weight"), "adapter.conv_in.weight", "which lacks it"),
        (lambda t: t.update({"adapter.more": torch.zeros(1)}), "exactly", "(unexpected: adapter.more)"),
        (
            lambda t: t.update({"adapter.body.2.norm1.bias": torch.zeros(7)}),
            "exactly",
            "(misshapen: adapter.body.2.norm1.bias (7,), expected (128,))",
        ),
        (lambda t: t["adapter.conv_in.bias"].fill_(float("nan")), "finite numbers", "adapter.conv_in.bias"),
        (
            lambda t: t.update({"adapter.body.1.resnets.0.block1.gwc.weight": torch.zeros(128, 64, 3, 3)}),
            "exactly",
            "(unexpected: adapter.body.1.resnets.0.block1.gwc.weight)",
        ),
        (lambda t: t.update({"adapter.conv_in.weight": torch.zeros(64, 75, 3, 3)}), "8 or 16", "75 inputs"),
    ],
)
def test_mixed_up_files_are_refused(tmp_path, change, expected, received):
    save_file(mixed_up(change), tmp_path / "x.safetensors")
    with refused("source", received, expected=expected):
        import_adapter(tmp_path / "x.safetensors", "prime-paper")


def test_what_cannot_be_read(tmp_path):
    for name, content in {
        "a.safetensors": b"x" * 20,
        "b.pth": b"x" * 20,
        "c.pth": b"",
        "d.safetensors": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with refused("source", name):
            import_adapter(tmp_path / name)
    (tmp_path / "README.md").write_text("# words")
    with refused("source", "README.md'", expected=".safetensors"):
        import_adapter(tmp_path / "README.md")
    with refused("source", "nowhere', which does not exist"):
        import_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused("source", "empty', which has none", expected="weights"):
        import_adapter(tmp_path / "empty")
    torch.save({"body.weight": torch.zeros(99)}, tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    for length in (100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with refused("source", "cut.pth', which cannot be read"):
            import_adapter(tmp_path / "cut.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with refused("source", "list.pth', a list", expected="tensors by name"):
        import_adapter(tmp_path / "list.pth")


def test_folders_of_other_models(tmp_path):
    tiny.unet().save_pretrained(tmp_path / "unet")
    with refused("source", f"'{tmp_path / 'unet'}', a UNet2DConditionModel", expected="T2IAdapter"):
        import_adapter(tmp_path / "unet")
    tiny.sd15().save_pretrained(tmp_path / "pipe")
    with refused("source", "pipe', a pipeline without an adapter"):
        import_adapter(tmp_path / "pipe")
    nexus().save_pretrained(tmp_path / "pipe" / "adapter")
    assert same(import_adapter(tmp_path / "pipe").adapter, nexus())


def test_a_flipped_bit_is_found(tmp_path):
    export_file(nexus(), tmp_path / "x.safetensors")
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    content[-9] ^= 4
    (tmp_path / "x.safetensors").write_bytes(content)
    with refused("source", "x.safetensors", expected="SHA-256"):
        import_adapter(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")


def test_the_name_decides_the_form_of_a_t2i_start(tmp_path):
    t2i().save_pretrained(tmp_path)
    for name in ("prime", "slim", "prime-paper", "slim-paper"):
        assert import_adapter(tmp_path, name).adapter.variant == name
    assert import_adapter(tmp_path, "slim", residual=False).adapter.variant == "slim-paper"
    with refused("residual", "True"):
        import_adapter(tmp_path, "slim-paper", residual=True)
    with refused("zero_init", "True"):
        import_adapter(tmp_path, "prime-paper", zero_init=True)
    with refused("variant", "'light'", expected="slim-paper"):
        import_adapter(tmp_path, "light")
    with refused("text_width", "0"):
        import_adapter(tmp_path, text_width=0)


def test_single_files_have_a_format_version(tmp_path):
    file = tmp_path / "x.safetensors"
    export_file(nexus(residual=True), file)
    metadata = read_header(file).metadata
    assert (metadata["format_version"], metadata["variant"]) == ("1", "prime")
    config = json.loads(metadata["nexus_adapters.config"])
    assert (config["format_version"], config["block"], config["block_options"]) == (1, "paper", {})
    add_metadata(file, {"nexus_adapters.config": json.dumps(config | {"format_version": 2})})
    with refused("source", "x.safetensors' (format_version: expected at most 1, got 2)", hint="upgrade"):
        import_adapter(file)


def test_a_single_file_cannot_say_a_subclass(tmp_path):
    class Mine(NexusAdapter):
        pass

    mine = Mine(channels=[8], pools=[0], unshuffle=2, text_width=4, heads=1, head_width=4)
    with refused("adapter", "a Mine", hint="save_pretrained"):
        export_file(mine, tmp_path / "x.safetensors")
