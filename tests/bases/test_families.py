"""Names for what users add, and which base a pipeline or denoiser belongs to."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from tests import tiny
from tests.refusals import refused
from torch import nn

from nexus_adapters.bases import BASES, Base, register_base
from nexus_adapters.bases.families import base_of, config_of, family_of
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.registry import Registry

GROUP = "nexus_adapters.things"


@pytest.fixture
def things():
    found = Registry("thing", GROUP)
    found.register("own")(Own)
    return found


class Own:
    pass


class Other:
    pass


def defined_again():
    """As by a notebook's cell that is run twice: another class of the same name."""
    return type("Own", (), {"__module__": __name__, "__qualname__": "Own"})


def test_a_registered_class(things):
    assert things["own"] is Own
    assert things.find("own", "thing") is Own
    assert "own" in things
    assert (list(things), len(things), dict(things)) == (["own"], 1, {"own": Own})
    assert things.register("other")(Other) is Other  # a decorator
    assert list(things) == ["own", "other"]


def test_the_same_class_again_replaces_the_former(things):
    again = defined_again()
    assert again is not Own
    assert things.register("own")(again) is again
    assert things["own"] is again
    assert len(things) == 1


def test_a_name_that_is_taken(things):
    with refused("name", f"'own', which is {__name__}.Own", expected="thing"):
        things.register("own")(Other)
    assert things["own"] is Own


def test_records_are_the_same_if_they_are_equal(things):
    """Of what is no class, the place of its definition does not show whether it is another one."""
    first = SimpleNamespace(label="first")
    things.add("record", first)
    things.add("record", SimpleNamespace(label="first"))
    with refused("name", "label='first'"):
        things.add("record", SimpleNamespace(label="second"))


def test_every_entry_is_checked(install):
    def check(entry):
        if entry is Own:
            raise InvalidArgument("thing", "another", "Own")

    found = Registry("thing", GROUP, check)
    install(GROUP, good=f"{__name__}:Other", bad=f"{__name__}:Own")
    with refused("thing", "Own"):
        found.register("own")(Own)
    with refused("thing", "Own"):
        found.find("bad", "argument")
    assert found["good"] is Other
    assert list(found) == ["good", "bad"]


def test_what_is_registered_for_a_while_is_forgotten(things):
    again = defined_again()
    with things.temporary():
        things.register("other")(Other)
        things.register("own")(again)
        with things.temporary():
            things.register("third")(Other)
        assert dict(things) == {"own": again, "other": Other}
    assert dict(things) == {"own": Own}
    with pytest.raises(ZeroDivisionError), things.temporary():
        things.register("other")(1 / 0)
    assert dict(things) == {"own": Own}


def test_a_name_is_needed(things):
    with refused("name", "''"):
        things.register("")


@pytest.mark.parametrize("name", ["unknown", "", ["own"], None])
def test_an_unknown_name_has_a_hint(things, name):
    with refused("adapter.thing", repr(name), expected="a known thing (own)") as caught:
        things.find(name, "adapter.thing")
    for way in ("import MODULE", "--import MODULE", "imports ="):
        assert way in caught.value.hint
    assert things.get("unknown") is None
    with pytest.raises(KeyError):
        things["unknown"]


def test_installed_packages_are_asked_by_name(things, install):
    install(GROUP, plugin=f"{__name__}:Other", own=f"{__name__}:Other")
    install("another.group", elsewhere=f"{__name__}:Other")
    assert list(things) == ["own", "plugin"]
    assert "plugin" in things
    assert "elsewhere" not in things
    assert things.find("plugin", "thing") is Other
    assert things["own"] is Own  # what is registered goes first
    assert dict(things) == {"own": Own, "plugin": Other}
    with refused("thing", "'unknown'", expected="own, plugin"):
        things.find("unknown", "thing")


def test_a_package_is_imported_only_when_it_is_asked_for(things, install):
    install(GROUP, broken="nexus_adapters_has_no_such_module:Thing")
    assert "broken" in things
    assert list(things) == ["own", "broken"]
    assert things["own"] is Own
    with refused("adapter.thing", "nexus_adapters_has_no_such_module", expected="'broken' that can be"):
        things.find("broken", "adapter.thing")


def test_packages_that_disagree(things, install):
    install(GROUP, plugin=f"{__name__}:Other")
    install(GROUP, plugin=f"{__name__}:Own")
    with refused("thing", f"{__name__}:Other, {__name__}:Own", expected="one installed package"):
        things.find("plugin", "thing")
    install(GROUP, twice=f"{__name__}:Other")
    install(GROUP, twice=f"{__name__}:Other")  # one package, found in two folders
    assert things["twice"] is Other


# Bases


@pytest.fixture
def bases():
    """Registrations last as long as the test."""
    with BASES.temporary():
        yield BASES


@pytest.mark.parametrize("build", [tiny.sd15, tiny.sdxl])
def test_the_base_of_a_pipeline(build):
    pipe = build()
    base, denoiser = base_of(pipe)
    assert isinstance(base, UNetBase)
    assert denoiser is pipe.unet
    assert base.pipe is pipe
    assert base.scheduler is pipe.scheduler
    assert base.config["cross_attention_dim"] == pipe.unet.config.cross_attention_dim
    assert (base.latent_channels, base.pixels_per_latent) == (4, 8)
    other = diffusers.StableDiffusionImg2ImgPipeline(**tiny.sd15_components(), requires_safety_checker=False)
    moved = base.bound_to(other)
    assert (moved.pipe, moved.scheduler) == (other, other.scheduler)
    assert moved.config is base.config


def test_the_base_of_a_denoiser():
    unet = tiny.unet()
    base, denoiser = base_of(unet)
    assert denoiser is unet
    assert base.pipe is None
    assert base.scheduler is None


def test_a_compiled_denoiser_is_seen_through():
    unet = tiny.unet()
    compiled = torch.compile(unet, backend="eager")
    base, denoiser = base_of(compiled)
    assert denoiser is compiled  # what the pipeline calls
    assert base.places() == base_of(unet)[0].places()
    assert base_of(tiny.sd15(unet=compiled))[1] is compiled


def test_a_subclass_of_a_denoiser_is_of_its_family():
    class Mine(diffusers.UNet2DConditionModel):
        pass

    unet = Mine(**tiny.SD15_UNET)
    assert config_of(unet)["_class_name"] == "UNet2DConditionModel"
    assert base_of(unet)[0].places() == base_of(tiny.unet())[0].places()


@pytest.mark.parametrize(
    ("target", "received", "hint"),
    [
        (None, "a NoneType", ""),
        ("folder", "a str", ""),
        (nn.Linear(1, 1), "a Linear", ""),
        (SimpleNamespace(unet=nn.Linear(1, 1)), "a SimpleNamespace with a Linear", ""),
        (SimpleNamespace(unet=None), "a SimpleNamespace", ""),
    ],
)
def test_what_is_of_no_base(target, received, hint):
    with refused("pipe_or_denoiser", received, expected="UNet2DConditionModel", hint=hint):
        base_of(target)


def test_a_module_with_a_unet_inside():
    wrapper = nn.Module()
    wrapper.unet = tiny.unet()
    with refused("pipe_or_denoiser", "a Module", hint=".unet"):
        base_of(wrapper)


def test_an_unknown_denoiser_is_named():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4,
        norm_num_groups=1,
    )  # fmt: skip
    assert family_of(config_of(transformer)) is None
    with refused("pipe_or_denoiser", "a DiTTransformer2DModel"):
        base_of(transformer)


def test_a_base_of_ones_own(bases):
    class Conv(nn.Module):
        config = {"_class_name": "Conv"}  # noqa: RUF012

    @register_base("conv")
    class ConvBase(UNetBase):
        denoiser_name = "net"
        denoiser_class = Conv

    pipe = SimpleNamespace(net=Conv(), scheduler=tiny.scheduler())
    base, denoiser = base_of(pipe)
    assert isinstance(base, ConvBase)
    assert denoiser is pipe.net
    assert isinstance(base_of(Conv())[0], ConvBase)
    assert type(base_of(tiny.unet())[0]) is UNetBase
    assert issubclass(bases.find("conv", "base"), Base)


def test_a_broken_package_does_not_stand_in_the_way(bases, install):
    """Families of the package and of the user are asked before others are imported."""
    install("nexus_adapters.bases", broken="nexus_adapters_has_no_such_module:Base")
    assert "broken" in bases
    assert isinstance(base_of(tiny.sd15())[0], UNetBase)
    with refused("name", "nexus_adapters_has_no_such_module"):
        base_of(nn.Linear(1, 1))
