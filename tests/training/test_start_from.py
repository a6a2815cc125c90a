"""Training that starts from an adapter: wherever it lies, and with its architecture."""

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused
from tests.training.runs import SMALL_UNET, config, recipe, run, weightless
from torch import nn

from nexus_adapters import NexusAdapter
from nexus_adapters.adapter.blocks import register_block
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.adapter.stage import Stage
from nexus_adapters.methods import load_adapter, method_of
from nexus_adapters.methods.nexus import NexusMethod
from nexus_adapters.training.checks import check_base, check_place
from nexus_adapters.training.recipe import dump_config, load_run_recipe, parse_config
from nexus_adapters.training.run import dry_run, train_adapter
from nexus_adapters.training.run_folder import RunFolder

AT_NO_RATE = {"training__learning_rate": 1e-12, "training__max_train_steps": 1}  # what it starts from


@register_block("wide-in-test-start-from")
class Wide(Stage):
    """A block of one's own, with weights and an option."""

    def __init__(self, *, channels: int, gain: float = 1.0, **stage: object) -> None:
        super().__init__(channels=channels, **stage)
        self.gate = nn.Parameter(torch.full((channels, 1, 1), gain))

    def forward(self, x: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.gate * super().forward(x, prompt_embeds)


@register_block("no-attention-in-test-start-from")
class Plain(nn.Module):
    """A block that reads no prompt."""

    def __init__(self, *, in_channels: int, channels: int, pools: int, **stage: object) -> None:
        super().__init__()
        self.pools = pools
        self.conv = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        for _ in range(self.pools):
            x = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        return self.conv(x)


@pytest.mark.parametrize("below", ["", "adapter", "checkpoints/step-00000002"])
def test_a_run_does_not_start_from_itself(root, tmp_path, below):
    out = tmp_path / "out"
    (out / below).mkdir(parents=True)
    (tmp_path / "link").symlink_to(out)
    for start in (out / below, tmp_path / "link" / below):
        with refused("adapter.start_from", f"'{start}' in '{out}'", hint="resume"):
            check_place(config(root, out, adapter__start_from=str(start)))


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run with an average and two checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "out"
    changes = {"training__ema_decay": 0.5, "training__max_train_steps": 4}
    run(root, out, adapter__heads=2, adapter__head_width=3, **changes)
    return out


def saved(folder, name="prime", **options):
    unet = tiny.unet(**SMALL_UNET)
    torch.manual_seed(11)
    NexusAdapter.for_unet(unet, name, **options).save_pretrained(folder)
    return folder


def same(ours, theirs):
    """Up to a step at almost no rate."""
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in ours.items())


OWN = {
    "eight heads": ("prime", {"heads": 8, "head_width": 2}),
    "four groups": ("slim", {"groups": 4}),
    "paper": ("slim-paper", {"heads": 3, "head_width": 4}),
    "own block": ("prime", {"block": "wide-in-test-start-from", "block_options": {"gain": 0.5}}),
    "fading": ("prime", {"noise_exponent": 0.5}),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.full) if k in ("eight heads", "fading") else k for k in OWN]
)
def test_a_run_takes_the_architecture_over(root, tmp_path, kind):
    method, options = OWN[kind]
    start = saved(tmp_path / "start", method, **options)
    changes = {"adapter__method": method, "adapter__start_from": str(start), **AT_NO_RATE}
    found = NexusAdapter.from_pretrained(run(root, tmp_path / "out", **changes))
    theirs = NexusAdapter.from_pretrained(start)
    for name, value in options.items():
        assert found.config[name] == value
    assert found.variant == theirs.variant == method
    assert same(found.state_dict(), theirs.state_dict())
    said = dry_run(config(root, tmp_path / "dry", **changes))
    assert f"{sum(p.numel() for p in theirs.parameters()):,} parameters" in said


@pytest.mark.parametrize(
    ("options", "key", "expected", "received"),
    [
        ({"heads": 4}, "heads", "8, as", "4"),
        ({"head_width": 4}, "head_width", "2, as", "4"),
        ({"method": "slim"}, "method", "'prime'", "'slim'"),
        ({"method": "prime-paper"}, "method", "'prime'", "'prime-paper'"),
        ({"residual": False}, "residual", "residual=true", "false"),
        ({"block": "wide-in-test-start-from"}, "block", "paper", "wide-in-test-start-from"),
        ({"method": "t2i"}, "start_from", "a T2I-Adapter", "a NexusAdapter"),
        ({"method": "controlnet"}, "start_from", "a ControlNet", "a NexusAdapter"),
        ({"method": "controlnet-xs", "size_ratio": 1.0}, "start_from", "a ControlNet-XS", "a NexusAdapter"),
    ],
)
def test_what_contradicts_it_is_refused_before_any_work(root, tmp_path, options, key, expected, received):
    start = saved(tmp_path / "start", heads=8, head_width=2)
    changes = {f"adapter__{name}": value for name, value in options.items()}
    base = root / ("sd15" if options.get("method") == "t2i" else "base")
    changes["base__path"] = str(weightless(base, tmp_path / "base"))
    for work in (run, lambda *args, **given: dry_run(config(*args, **given))):
        with refused(f"adapter.{key}", received, expected=expected) as caught:
            work(root, tmp_path / "out", adapter__start_from=str(start), **changes)
        assert str(start) in caught.value.expected + str(caught.value.received)
    assert not (tmp_path / "out").exists()


def test_groups_that_contradict_are_refused(root, tmp_path):
    start = saved(tmp_path / "start", "slim", groups=4)
    changes = {"adapter__method": "slim", "adapter__start_from": str(start), "adapter__groups": 2}
    with refused("adapter.groups", "2", expected="4, as"):
        run(root, tmp_path / "out", **changes)


@pytest.mark.parametrize(
    "what",
    ["run", "checkpoint", "alone", *(pytest.param(w, marks=pytest.mark.full) for w in ("adapter", "file"))],
)
def test_from_a_run_wherever_it_lies(root, trained, tmp_path, what):
    """Its finished adapter, and of a checkpoint the average that it is for, moved out of the run or not."""
    checkpoint = trained / "checkpoints" / "step-00000004"
    sources = {"run": trained, "adapter": trained / "adapter", "checkpoint": checkpoint}
    if what == "alone":
        sources["alone"] = shutil.copytree(checkpoint, tmp_path / "moved")
    sources["file"] = trained / "adapter" / "diffusion_pytorch_model.safetensors"  # next to its config
    changes = {"adapter__start_from": str(sources[what]), **AT_NO_RATE}
    found = NexusAdapter.from_pretrained(run(root, tmp_path / "out", **changes))
    assert (found.config.heads, found.config.head_width) == (2, 3)
    average = load_file(checkpoint / "average.safetensors")
    assert same(found.state_dict(), average)
    assert not same(load_file(checkpoint / "module.safetensors"), average)


CONTINUED = {  # at another rate, by another schedule, for longer, on other data
    "training__learning_rate": 3e-3,
    "training__schedule": "linear",
    "training__max_train_steps": 3,
    "training__ema_decay": 0.5,
    "data__count": 9,
}


def test_a_run_continues_another_with_its_optimizer(root, trained, tmp_path, monkeypatch):
    checkpoint = trained / "checkpoints" / "step-00000004"
    seen = []

    def watched(run, *args):
        found = real(run, *args)
        tensors = run.state.tensors()
        seen.append(
            {kind: {name: tensor.clone() for name, tensor in tensors[kind].items()} for kind in tensors}
        )
        return found

    real = RunFolder.resume
    monkeypatch.setattr(RunFolder, "resume", watched)
    for source in (trained, checkpoint):
        changes = CONTINUED | {"adapter__start_from": str(source), "adapter__start_from_optimizer": True}
        run(root, tmp_path / source.name, **changes)
    run(root, tmp_path / "without", **CONTINUED, adapter__start_from=str(checkpoint))
    for first in seen[:2]:
        assert len(first["optimizer"]) > 0
        for kind in ("module", "optimizer"):
            saved = load_file(checkpoint / f"{kind}.safetensors")
            assert first[kind].keys() == saved.keys()
            assert all(torch.equal(tensor, first[kind][name]) for name, tensor in saved.items())
    assert seen[2]["optimizer"] == {}
    assert all(
        torch.equal(seen[2]["module"][name], t)
        for name, t in load_file(checkpoint / "average.safetensors").items()
    )


@pytest.mark.parametrize(
    ("source", "changes", "key", "received"),
    [
        ("adapter", {}, "start_from_optimizer", "adapter'"),
        ("checkpoints/step-00000004", {"training__optimizer": "muon"}, "start_from_optimizer", "'adamw'"),
        ("", {"adapter__heads": 4}, "heads", "4"),
        ("checkpoints/none", {}, "start_from_optimizer", "none"),
        ("checkpoints/damaged", {}, "start_from_optimizer", "damaged"),
    ],
)
def test_an_optimizers_state_that_does_not_fit(root, trained, tmp_path, source, changes, key, received):
    shutil.copytree(trained, tmp_path / "run")
    damaged = shutil.copytree(trained / "checkpoints/step-00000004", tmp_path / "run/checkpoints/damaged")
    (damaged / "optimizer.safetensors").write_bytes(b"")
    start = {"adapter__start_from": str(tmp_path / "run" / source), "adapter__start_from_optimizer": True}
    for work in (run, lambda *args, **given: dry_run(config(*args, **given))):
        with refused(f"adapter.{key}", received):
            work(root, tmp_path / "out", **changes, **start)


@pytest.mark.parametrize(("method", "takes_optimizer"), [("prime", True), ("", False)])
def test_a_run_resumes_without_what_it_started_from(root, trained, tmp_path, method, takes_optimizer):
    """Once it has a checkpoint; until then its start is needed, and another start is another run."""
    shutil.copytree(trained, tmp_path / "first")
    changes: dict[str, Any] = CONTINUED | {
        "adapter__start_from": str(tmp_path / "first"),
        "adapter__start_from_optimizer": takes_optimizer,
        "training__schedule": "constant",
        "log__every_steps": 1000,
    }

    def attempt(out, **given):
        chosen = recipe(root, tmp_path / out, **changes | given)
        chosen["adapter"] = {key: value for key, value in chosen["adapter"].items() if key != "method"}
        if method:
            chosen["adapter"]["method"] = method
        return train_adapter(parse_config(chosen))

    attempt("out")
    (tmp_path / "first").rename(tmp_path / "moved")
    found = NexusAdapter.from_pretrained(attempt("out", training__max_train_steps=4))
    assert (found.config.heads, found.config.head_width) == (2, 3)
    assert json.loads((tmp_path / "out" / "trained_on.json").read_bytes())["trained_on"]["is_complete"]
    with refused("adapter.start_from_optimizer" if takes_optimizer else "adapter.start_from", "first"):
        attempt("new")
    with refused("output_dir" if method else "adapter.start_from"):
        attempt("out", adapter__start_from=str(tmp_path / "other"), training__max_train_steps=5)


@pytest.mark.parametrize(("method", "start"), [("prime", "t2i"), ("t2i", "t2i"), ("slim", "slim")])
def test_a_resumed_run_records_what_an_uninterrupted_one_does(root, tmp_path, method, start):
    """Although it takes its options from its own checkpoint, and the other from what both started from."""
    options = {"t2i": {"noise_exponent": 0.5}, "slim": {"zero_init": True, "noise_exponent": 0.5}}
    build(start, **options[start]).save_pretrained(tmp_path / "start")
    changes: dict[str, Any] = {
        "base__path": str(root / "sd15"),
        "adapter__method": method,
        "adapter__start_from": str(tmp_path / "start"),
        "training__schedule": "constant",
    }
    whole = run(root, tmp_path / "whole" / "out", **changes, training__max_train_steps=2)
    for steps in (1, 2):
        resumed = run(root, tmp_path / "resumed" / "out", **changes, training__max_train_steps=steps)
    for name in ("config.json", "training.json"):
        assert json.loads((resumed / name).read_text()) == json.loads((whole / name).read_text()), name
    record = json.loads((whole / "training.json").read_text())["config"]
    kept = [name for name in ("zero_init", "heads", "noise_exponent") if name in load_adapter(whole).config]
    assert kept
    for name in kept:
        assert record[f"adapter.{name}"] == load_adapter(whole).config[name]


def test_an_unfinished_run_gives_its_newest_checkpoint(root, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "adapter")
    changes = {"adapter__start_from": str(tmp_path / "unfinished"), **AT_NO_RATE}
    found = NexusAdapter.from_pretrained(run(root, tmp_path / "out", **changes))
    assert same(found.state_dict(), load_file(trained / "checkpoints/step-00000004/average.safetensors"))


@pytest.mark.parametrize("name", ["average.safetensors", "state.json", "manifest.json"])
def test_of_an_unfinished_run_a_damaged_checkpoint_is_skipped(trained, tmp_path, name):
    unfinished = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(unfinished / "adapter")
    older, newest = (unfinished / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    (newest / name).write_bytes(b"{}")
    with pytest.warns(UserWarning, match="step-00000004' is skipped"):
        assert find_saved(unfinished).path == older
    (older / name).write_bytes(b"{}")
    with pytest.warns(UserWarning, match="step-00000004' is skipped"), refused("adapter", "step-00000002"):
        find_saved(unfinished)


@pytest.mark.parametrize("method", ["prime", "slim"])
def test_an_adapter_of_the_package_by_its_name(method):
    """On its own base alone, and for the condition of the data."""
    changes = {"adapter": {"method": method, "start_from": method}, "output_dir": "out"}
    data = {"kind": "scenes", "count": 40, "resolution": 128}
    for condition in ("canny", "depth"):
        made = parse_config(changes | {"data": data | {"condition": condition}})
        _, options, tensors = check_base(made)
        theirs = load_adapter(method, condition)
        assert (
            (options.heads, options.head_width) == (theirs.config.heads, theirs.config.head_width) == (8, 8)
        )
        assert same(tensors, theirs.state_dict())  # of this condition


@pytest.mark.parametrize("name", ["prime", "slim", "prime-paper", "slim-paper", "t2i"])
def test_the_method_is_that_of_the_adapter(name):
    data = {"kind": "scenes", "count": 40, "resolution": 128}
    made = parse_config({"adapter": {"start_from": name}, "data": data, "output_dir": "out"})
    assert made.adapter.method == name
    check_base(made)
    assert f'method = "{name}"' in dump_config(made)
    with refused("data.condition", "'normals'", expected="canny"):
        parse_config({"adapter": {"start_from": name}, "data": data | {"condition": "normals"}})


@pytest.mark.parametrize(
    "method", ["slim-paper", "t2i", "controlnet-xs", pytest.param("controlnet", marks=pytest.mark.full)]
)
def test_a_run_goes_by_the_adapter_alone(root, tmp_path, method):
    """Its method and, where the method has such options, its size and how its features fade."""
    options = {"controlnet-xs": {"size_ratio": 0.5}, "t2i": {"noise_exponent": 0.5}}.get(method, {})
    torch.manual_seed(11)
    build(method, tiny.unet(attention_head_dim=1), **options).save_pretrained(tmp_path / "start")
    tiny.sd15(unet=tiny.unet(attention_head_dim=1)).save_pretrained(tmp_path / "base")  # of four levels
    made = config(root, tmp_path / "out", base__path=str(tmp_path / "base"), **AT_NO_RATE)
    section = {"start_from": str(tmp_path / "start")}
    made = dataclasses.replace(made, adapter=section)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, resolution=128))
    found, theirs = load_adapter(train_adapter(made)), load_adapter(tmp_path / "start")
    assert method_of(found).name == method
    assert same(found.state_dict(), theirs.state_dict())
    for name, value in options.items():
        if name in theirs.config:
            assert found.config[name] == value
    assert load_run_recipe(tmp_path / "out" / "config.toml").adapter.method == method


def test_what_the_options_say_of_a_start(root, tmp_path):
    """How features fade is not its architecture; its size is."""
    build("t2i", noise_exponent=0.5).save_pretrained(tmp_path / "t2i")
    changes = {"adapter__method": "t2i", "adapter__start_from": str(tmp_path / "t2i")}
    changes["base__path"] = str(root / "sd15")
    for given, expected in ((None, 0.5), (0.25, 0.25), (0.0, 0.0)):
        own = {} if given is None else {"adapter__noise_exponent": given}
        _, options, _ = check_base(config(root, tmp_path / "out", **changes, **own))
        assert options.noise_exponent == expected
    build("controlnet-xs", tiny.unet(**SMALL_UNET), size_ratio=0.5).save_pretrained(tmp_path / "xs")
    changes = {"adapter__method": "controlnet-xs", "adapter__start_from": str(tmp_path / "xs")}
    with refused("adapter.size_ratio", "1.0", expected="0.5, as"):
        check_base(config(root, tmp_path / "out", **changes, adapter__size_ratio=1.0))


@pytest.mark.parametrize(
    ("options", "key", "received"),
    [
        ({"start_from": "{root}/nowhere"}, "adapter.start_from", "nowhere"),
        ({"start_from": "{root}/base/unet"}, "adapter.start_from", "a UNet2DConditionModel"),
        ({"start_from": 3}, "adapter.start_from", "3"),
        ({"start_from": "{tmp}/odd"}, "adapter.start_from", "odd"),
    ],
)
def test_a_start_whose_method_is_unknown(root, tmp_path, options, key, received):
    odd = saved(tmp_path / "odd")
    file = odd / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"groups": "many"}))
    folders = {"root": root, "tmp": tmp_path}
    options = {k: v.format(**folders) if isinstance(v, str) else v for k, v in options.items()}
    with refused(key, received):
        parse_config({"output_dir": str(tmp_path / "out"), "data": {"path": "x"}, "adapter": options})


def test_a_start_is_read_once(root, tmp_path, monkeypatch):
    start = saved(tmp_path / "start")
    read = []
    whole = NexusMethod.load
    monkeypatch.setattr(NexusMethod, "load", lambda self, found: read.append(found) or whole(self, found))
    run(root, tmp_path / "out", adapter__start_from=str(start), **AT_NO_RATE)
    assert len(read) == 1


def test_names_belong_to_the_embedded_base(root, tmp_path):
    with refused("adapter.start_from", "'prime'", hint="base"):
        run(root, tmp_path / "out", adapter__start_from="prime")


@pytest.mark.parametrize(
    ("start", "received"),
    [
        ("{root}/nowhere", "nowhere"),
        ("{root}/base", "a pipeline without an adapter"),
        ("{root}/images", "images"),
    ],
)
def test_what_is_no_adapter(root, tmp_path, start, received):
    with refused("adapter.start_from", received):
        run(root, tmp_path / "out", adapter__start_from=start.replace("{root}", str(root)))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_model(root, tmp_path):
    with refused("adapter.start_from", "a UNet2DConditionModel", expected="Nexus Prime"):
        run(root, tmp_path / "out", adapter__start_from=str(root / "base" / "unet"))


def test_another_bases_adapter(root, tmp_path):
    other = tiny.unet(**SMALL_UNET | {"block_out_channels": (16, 16)})
    NexusAdapter.for_unet(other).save_pretrained(tmp_path / "start")
    with refused("adapter.start_from", "(16, 16)", expected="channels (8, "):
        run(root, tmp_path / "out", adapter__start_from=str(tmp_path / "start"))


def test_prime_from_a_t2i_adapter(root, tmp_path):
    """Its trunk; norms and attention begin as in a run without it, apart from the output projection."""
    base = {"base__path": str(root / "sd15")}
    t2i = tmp_path / "t2i"
    build("t2i").save_pretrained(t2i)
    found = run(root, tmp_path / "out", adapter__start_from=str(t2i), **base, **AT_NO_RATE)
    alone = run(root, tmp_path / "alone", **base, **AT_NO_RATE)
    weights = "diffusion_pytorch_model.safetensors"
    ours, trunk, fresh = (load_file(folder / weights) for folder in (found, t2i, alone))
    assert len(trunk) > 0
    for name, tensor in ours.items():
        other = torch.zeros_like(tensor) if ".to_out." in name else fresh[name]
        assert torch.allclose(tensor, trunk.get(name, other), atol=1e-6), name
    assert not same({name: fresh[name] for name in trunk}, trunk)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_attention_only(root, tmp_path, optimizer):
    """The T2I-Adapter's weights stay bit for bit, whatever the weight decay; all others are trained."""
    t2i = tmp_path / "t2i"
    build("t2i").save_pretrained(t2i)
    changes = {
        "base__path": str(root / "sd15"),
        "adapter__start_from": str(t2i),
        "training__max_train_steps": 3,
    }
    changes |= {
        "adapter__train": "attention",
        "training__optimizer": optimizer,
        "training__weight_decay": 0.1,
    }
    found = run(root, tmp_path / "out", **changes)
    start = run(root, tmp_path / "start", **changes | AT_NO_RATE)
    weights = "diffusion_pytorch_model.safetensors"
    ours, before, trunk = (load_file(folder / weights) for folder in (found, start, t2i))
    assert 0 < len(trunk) < len(ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, trunk[name] if name in trunk else before[name]) is (name in trunk), name


def test_a_dry_run_counts_what_is_trained(root, tmp_path):
    build("t2i").save_pretrained(tmp_path / "t2i")
    changes = {"base__path": str(root / "sd15"), "adapter__start_from": str(tmp_path / "t2i")}
    reports = {
        train: dry_run(config(root, tmp_path / train, adapter__train=train, **changes))
        for train in ("all", "attention")
    }
    unet = tiny.unet()
    named = NexusAdapter.for_unet(unet).named_parameters()
    trained = sum(p.numel() for name, p in named if ".norm1." in name or ".cross_attention." in name)
    assert f", of which {trained:,} are trained" in reports["attention"]
    assert "trained" not in reports["all"].splitlines()[0]


def test_attention_only_needs_a_start(root, tmp_path):
    with refused("adapter.train", "'attention'", expected="start_from"):
        config(root, tmp_path / "out", adapter__train="attention")


def test_attention_only_needs_an_attention(root, tmp_path):
    block = "no-attention-in-test-start-from"
    own = {"adapter__block": block, "adapter__train": "attention", "adapter__residual": True}
    start = saved(tmp_path / "start", block=block)
    with refused("adapter.train", block, expected="cross_attention"):
        run(root, tmp_path / "out", adapter__start_from=str(start), **own)


def test_the_seed_decides_all_that_is_not_taken(root, tmp_path):
    """What an adapter starts from does not change its run's random numbers."""
    start = saved(tmp_path / "start")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(root, tmp_path / name, adapter__start_from=str(start), seed=seed)
    weights = "adapter/diffusion_pytorch_model.safetensors"
    a, b, c = (load_file(tmp_path / name / weights) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
