"""Prime and Slim under training: shapes, fading features, and what they start from."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, T2IAdapter
from safetensors.torch import save_file
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused
from tests.training.test_loss import batch
from torch import nn

from nexus_adapters import NexusAdapter, load_adapter
from nexus_adapters.adapter.arguments import ARGUMENTS
from nexus_adapters.adapter.blocks import register_block
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.adapter.stage import Stage
from nexus_adapters.methods import METHODS, find_method, method_of, register_method
from nexus_adapters.methods.method import FEATURES
from nexus_adapters.methods.nexus import NexusMethod, NexusOptions


@register_block("gated-in-test-nexus")
class Gated(Stage):
    """A block of one's own with an option."""

    def __init__(self, *, channels: int, gain: float = 1.0, **stage: object) -> None:
        super().__init__(channels=channels, **stage)
        self.gate = nn.Parameter(torch.full((channels, 1, 1), gain))

    def forward(self, x: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.gate * super().forward(x, prompt_embeds)


NAMES = ("prime", "slim", "prime-paper", "slim-paper")


@pytest.mark.parametrize("method", [*NAMES, "t2i"])
@pytest.mark.parametrize("config", [tiny.SD15_UNET, tiny.SDXL_UNET], ids=["sd15", "sdxl"])
def test_every_method_fits_its_unet(method, config):
    unet = tiny.unet(config)
    adapter = build(method, unet)
    assert method_of(adapter) is find_method(method)
    find_method(method).check_fit(adapter, tiny.base(unet))
    if method == "t2i":
        features = adapter(tiny.condition(1, 128, 128))
    else:
        text = torch.randn(1, tiny.TOKENS, config["cross_attention_dim"])
        features = adapter(tiny.condition(1, 128, 128), text)
    assert len(features) == 4
    assert adapter.config["unshuffle" if method != "t2i" else "downscale_factor"] in (8, 16)


@pytest.mark.parametrize("method", [*NAMES, "t2i"])
def test_features_fade_with_each_samples_noise(method):
    unet = tiny.unet().requires_grad_(False)
    torch.manual_seed(0)
    base = tiny.base(unet, DDPMScheduler())
    constant, fading = (build(method, unet, noise_exponent=p) for p in (0.0, 2.0))
    fading.load_state_dict(constant.state_dict())
    timesteps, given = torch.tensor([10, 400, 900]), batch()
    plain, faded = (
        find_method(method).denoiser_arguments(adapter, given, given.latents, timesteps, base)[FEATURES]
        for adapter in (constant, fading)
    )
    factors = (1 - base.scheduler.alphas_cumprod[timesteps]).square()[:, None, None, None]
    assert all(torch.allclose(theirs * factors, ours) for ours, theirs in zip(faded, plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_network(name):
    """The same in a recipe as in `for_unet`."""
    unet = tiny.unet()
    torch.manual_seed(3)
    ours = build(name, unet)
    torch.manual_seed(3)
    theirs = NexusAdapter.for_unet(unet, name)
    assert arguments(ours) == arguments(theirs)
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    assert ours.config.residual is (not name.endswith("-paper"))


@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_the_papers_name_is_the_other_without_residual(variant):
    """In what decides a run, too: either spelling resumes it."""
    ours = NexusOptions(f"{variant}-paper").identity()
    assert ours == NexusOptions(variant, residual=False).identity()
    assert ours["method"] == variant
    assert ours != NexusOptions(variant).identity()


def arguments(adapter):
    """What it was built with, as JSON has it."""
    return json.loads(json.dumps({name: adapter.config[name] for name in ARGUMENTS}))


# What a run starts from


OWN = {
    "prime": ("prime", {}),
    "slim": ("slim", {}),
    "prime-paper": ("prime-paper", {}),
    "slim-paper": ("slim-paper", {}),
    "two heads": ("prime", {"heads": 2, "head_width": 3}),
    "eight heads": ("prime", {"heads": 8, "head_width": 2}),
    "four groups": ("slim", {"groups": 4}),
    "own block": ("prime", {"block": "gated-in-test-nexus", "block_options": {"gain": 0.5}}),
    "fading": ("prime", {"noise_exponent": 0.5}),
    "blind start": ("prime", {"zero_init": True}),
    "t2i": ("t2i", {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each of OWN, with weights of its own."""
    root = tmp_path_factory.mktemp("saved")
    for seed, (name, (method, options)) in enumerate(OWN.items()):
        torch.manual_seed(100 + seed)
        build(method, **options).save_pretrained(root / name)
    return root


def fresh(method, unet=None, **options):
    torch.manual_seed(0)
    return build(method, unet, **options)


@pytest.mark.parametrize("method", NAMES)
def test_the_same_kind_gives_all(saved, method):
    adapter = fresh(method)
    start = find_method(method).starting_tensors(adapter, find_saved(saved / method))
    theirs = NexusAdapter.from_pretrained(saved / method).state_dict()
    assert start.keys() == adapter.state_dict().keys() == theirs.keys()
    assert all(torch.equal(start[name], tensor) for name, tensor in theirs.items())
    assert any(not torch.equal(start[name], tensor) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("method", ["prime", "prime-paper"])
def test_t2i_gives_prime_its_trunk(saved, method):
    adapter, t2i = fresh(method), T2IAdapter.from_pretrained(saved / "t2i")
    start = find_method(method).starting_tensors(adapter, find_saved(saved / "t2i"))
    kept = set(adapter.state_dict()) - set(start)
    assert kept
    assert all(".norm1." in name or ".cross_attention." in name for name in kept)
    assert all(torch.equal(start[name], tensor) for name, tensor in t2i.state_dict().items())
    # With its attention out of the way, the trunk is T2I's.
    adapter.load_state_dict(adapter.state_dict() | start)
    condition = tiny.condition(1)
    features = []
    for stage in adapter.adapter.body:
        stage.norm1.register_forward_hook(lambda module, args, out: features.append(args[0]))
    adapter(condition, torch.zeros(1, tiny.TOKENS, tiny.TEXT_WIDTH))
    assert torch.allclose(
        features[0].flatten().sort().values, t2i(condition)[0].flatten().sort().values, atol=1e-5
    )


@pytest.mark.parametrize("method", ["prime", "prime-paper", "t2i"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_t2i_adapter_for_gray_maps_starts_one_for_colors(tmp_path, method, form):
    made = build("t2i")
    gray = T2IAdapter(**{**dict(made.config), "in_channels": 1})
    gray.save_pretrained(tmp_path)
    source = tmp_path if form == "folder" else tmp_path / "gray.safetensors"
    if form == "file":
        save_file(gray.state_dict(), source)
    adapter = fresh(method)
    with pytest.warns(UserWarning, match="reads 1 channel"):
        start = find_method(method).starting_tensors(adapter, find_saved(source))
    made.load_state_dict({name: start[name] for name in made.state_dict()})
    condition = tiny.condition()[:, :1]
    pairs = zip(made(condition.expand(-1, 3, -1, -1)), gray(condition), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)


def test_what_does_not_fit_is_named(saved):
    with refused("start_from", str(saved / "prime"), expected="adapter.body.0."):
        find_method("slim").starting_tensors(fresh("slim"), find_saved(saved / "prime"))


def test_another_bases_adapter_is_told_by_its_first_tensor(saved):
    wider = fresh("prime", tiny.unet(block_out_channels=(16, 16, 24, 24)))
    with refused("start_from", "shape (8,", expected="shape (16,"):
        find_method("prime").starting_tensors(wider, find_saved(saved / "prime"))


def test_a_controlnet_has_no_trunk_to_give(tmp_path):
    build("controlnet").save_pretrained(tmp_path)
    with refused("start_from", "a ControlNet", expected="a Nexus adapter or a T2I-Adapter"):
        find_method("prime").starting_tensors(fresh("prime"), find_saved(tmp_path))


def adopted(saved, name, method, **options):
    return find_method(method).adopt(NexusOptions(method, **options), find_saved(saved / name))


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("t2i", "blind start")])
def test_its_architecture_is_taken_over(saved, name):
    """With the method's name alone, in either spelling of the paper's."""
    method, _ = OWN[name]
    options = adopted(saved, name, method)
    made = fresh(method, **{k: v for k, v in vars(options).items() if k != "method"})
    theirs = NexusAdapter.from_pretrained(saved / name)
    assert arguments(made) == arguments(theirs)
    start = find_method(method).starting_tensors(made, find_saved(saved / name))
    assert all(torch.equal(start[key], tensor) for key, tensor in theirs.state_dict().items())
    if method.endswith("-paper"):
        assert (
            adopted(saved, name, method.removesuffix("-paper"), residual=False).arguments == options.arguments
        )


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("t2i", "blind start")])
def test_what_says_the_same_is_no_contradiction(saved, name):
    method, given = OWN[name]
    options = adopted(saved, name, method, **given)
    assert options.arguments == adopted(saved, name, method).arguments


@pytest.mark.parametrize(
    ("name", "method", "options", "key", "expected", "received"),
    [
        ("two heads", "prime", {"heads": 4}, "heads", "2, ", "4"),
        ("two heads", "prime", {"head_width": 4}, "head_width", "3, ", "4"),
        ("prime", "prime", {"heads": 5}, "heads", "1, ", "5"),
        ("four groups", "slim", {"groups": 2}, "groups", "4, ", "2"),
        ("slim", "slim", {"groups": 4}, "groups", "2, ", "4"),
        ("prime", "slim", {}, "method", "'prime' (residual=true)", "'slim'"),
        ("slim", "prime", {}, "method", "'slim' (residual=true)", "'prime'"),
        ("prime-paper", "prime", {}, "method", "'prime-paper' (residual=false)", "'prime'"),
        ("prime", "prime-paper", {}, "method", "'prime' (residual=true)", "'prime-paper'"),
        ("slim-paper", "prime-paper", {}, "method", "'slim-paper' (residual=false)", "'prime-paper'"),
        ("prime", "prime", {"residual": False}, "residual", "'prime' (residual=true)", "false"),
        ("slim", "prime", {"residual": False}, "method", "'slim' (residual=true)", "'prime'"),
        ("prime-paper", "prime", {"residual": True}, "residual", "'prime-paper' (residual=false)", "true"),
        ("own block", "prime", {"block": "paper"}, "block", "gated-in-test-nexus", "paper"),
        ("prime", "prime", {"block": "gated-in-test-nexus"}, "block", "paper", "gated-in-test-nexus"),
        ("own block", "prime", {"block_options": {"gain": 2.0}}, "block_options", "0.5", "2.0"),
        ("prime", "prime", {"block_options": {"gain": 2.0}}, "block_options", "{}", "2.0"),
    ],
)
def test_what_contradicts_it_is_refused(saved, name, method, options, key, expected, received):
    with refused(key, received, expected=expected) as caught:
        adopted(saved, name, method, **options)
    assert str(saved / name) in caught.value.expected


def test_a_t2i_adapter_says_nothing_of_the_attention(saved):
    given = {"heads": 2, "head_width": 4, "residual": False, "noise_exponent": 1.0}
    assert adopted(saved, "t2i", "prime", **given) == NexusOptions("prime", **given)


@pytest.mark.parametrize(
    ("method", "given", "starts_at_zero"),
    [
        ("prime", {}, True),
        ("slim", {}, True),
        ("prime", {"zero_init": False}, False),
        ("prime-paper", {}, False),
    ],
)
def test_the_attention_starts_at_zero_on_a_t2i_adapter(saved, method, given, starts_at_zero):
    """So that Prime starts as that adapter. Without a residual connection its features would all be zero."""
    assert bool(adopted(saved, "t2i", method, **given).zero_init) is starts_at_zero


def test_features_may_be_taught_to_fade(saved):
    """No tensor depends on it, and converted T2I-Adapters do not know it; what is not said is taken over."""
    assert adopted(saved, "prime", "prime", noise_exponent=1.0).noise_exponent == 1.0
    assert adopted(saved, "fading", "prime", noise_exponent=0.0).noise_exponent == 0.0
    assert adopted(saved, "fading", "prime").noise_exponent == 0.5
    adapter = fresh("prime", noise_exponent=1.0)
    start = find_method("prime").starting_tensors(adapter, find_saved(saved / "prime"))
    assert start.keys() == adapter.state_dict().keys()


def test_which_of_both_is_part_of_what_decides_a_run():
    """Said or taken over, features fade in another way."""
    said = NexusOptions("prime", start_from="somewhere", noise_exponent=0.0).identity()
    assert said != NexusOptions("prime", start_from="somewhere").identity()
    assert NexusOptions("prime", noise_exponent=0.0).identity() == NexusOptions("prime").identity()


def test_an_attention_that_began_at_zero_goes_on_as_it_is(saved):
    """The option describes how it began, and is taken over unless it is given."""
    options = adopted(saved, "blind start", "prime")
    assert options.zero_init is True
    assert adopted(saved, "prime", "prime").zero_init is False
    assert adopted(saved, "blind start", "prime", zero_init=False).zero_init is False
    made = fresh("prime")
    start = find_method("prime").starting_tensors(made, find_saved(saved / "blind start"))
    assert start.keys() == made.state_dict().keys()


def test_a_config_that_says_too_little_is_of_the_paper(saved, tmp_path):
    """As it was before there were other forms: what it leaves out has its default."""
    (tmp_path / "old").mkdir()
    config = json.loads((saved / "prime-paper" / "config.json").read_text())
    for key in ("residual", "zero_init", "noise_exponent", "block", "block_options", "format_version"):
        config.pop(key, None)
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "old" / weights).write_bytes((saved / "prime-paper" / weights).read_bytes())
    assert (
        adopted(tmp_path, "old", "prime-paper").arguments
        == adopted(saved, "prime-paper", "prime-paper").arguments
    )
    with refused("method", "'prime'", expected="'prime-paper'"):
        adopted(tmp_path, "old", "prime")


def test_the_last_definition_of_a_subclass_is_loaded(tmp_path):
    """As in a notebook, whose cell is run twice."""

    def define():
        class OfANotebook(NexusAdapter):
            pass

        return OfANotebook

    first, last = define(), define()
    last(**dict(build("slim").config)).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        assert type(load_adapter(source)) is last
    assert first is not last


def test_a_method_registered_again_replaces_the_former():
    def define(qualname):
        return type("Mine", (NexusMethod,), {"__module__": __name__, "__qualname__": qualname})

    with METHODS.temporary():
        register_method(define("Mine")("mine-in-test-nexus"))
        again = register_method(define("Mine")("mine-in-test-nexus"))
        assert find_method("mine-in-test-nexus") is again
        with refused("name", "'mine-in-test-nexus'"):
            register_method(define("Another")("mine-in-test-nexus"))
