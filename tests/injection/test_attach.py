"""The hook: what it adds, when it runs the adapter, and that nothing of it stays."""

import copy
import gc
import threading
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tests import tiny
from tests.refusals import refused

from nexus_adapters import NexusAdapter, load_adapter
from nexus_adapters.bases import BASES, Place, register_base
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.injection import Control, attach, detach, residuals
from nexus_adapters.injection.denoiser_hook import CallGuard

PROMPTS = ["a red star", "a blue ring on a green cat", "photo of a dog"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


@pytest.fixture(scope="module")
def adapter(pipe):
    return tiny.adapter(pipe.unet)


@pytest.fixture
def unet(pipe):
    return pipe.unet


@contextmanager
def calls_of(module):
    """The arguments and outputs of every call of `module`."""
    calls = []
    handle = module.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    yield calls
    handle.remove()


def generate(pipe, prompt="a red star", steps=2, count=1, **options):
    options = {"height": 64, "width": 64, "negative_prompt": "blurry"} | options
    if isinstance(prompt, list):
        options["negative_prompt"] = [options["negative_prompt"]] * len(prompt)
    total = count * (len(prompt) if isinstance(prompt, list) else 1)
    seeded = options.pop("generator", None) or tiny.generators(total)
    return pipe(
        prompt,
        num_inference_steps=steps,
        num_images_per_prompt=count,
        generator=seeded,
        output_type="pt",
        **options,
    ).images


def bare_call(unet, rows=2, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    text = torch.randn(rows, 5, tiny.TEXT_WIDTH, generator=generator)
    return unet(latents, 10, text, **kwargs).sample


def trace_of(unet):
    """Everything that a hook could leave behind."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    names += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [dict(getattr(unet, name)) for name in names], sorted(vars(unet)), unet.forward


@pytest.mark.parametrize("policy", ["positive", "per_branch", "cond_only"])
def test_scale_0_is_the_base_bit_for_bit(pipe, adapter, policy):
    base = generate(pipe)
    with calls_of(adapter) as calls, attach(pipe, Control(adapter, tiny.condition(), scale=0, policy=policy)):
        assert torch.equal(generate(pipe), base)
    assert not calls
    with attach(pipe, Control(adapter, tiny.condition(), policy=policy)):
        assert (generate(pipe) - base).abs().max() > 0.05


@pytest.mark.parametrize("policy", ["positive", "per_branch", "cond_only"])
def test_one_adapter_call_in_all_steps(pipe, adapter, policy):
    control = Control(adapter, tiny.condition(), policy=policy)
    with calls_of(adapter) as calls, calls_of(pipe.unet) as steps, attach(pipe, control):
        generate(pipe, steps=6)
    assert len(steps) == 6
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("policy", "conditions"),
    [
        ("positive", 1),
        ("per_branch", 3),
        ("cond_only", 3),
        pytest.param("positive", 3, marks=pytest.mark.full),
        pytest.param("per_branch", 1, marks=pytest.mark.full),
        pytest.param("cond_only", 1, marks=pytest.mark.full),
    ],
)
def test_a_batch_equals_its_singles(pipe, adapter, policy, conditions):
    maps = tiny.condition(conditions)
    with attach(pipe, Control(adapter, maps, policy=policy)) as handle:
        batch = generate(pipe, PROMPTS, count=2, generator=tiny.generators(6))
        singles = []
        for index, prompt in enumerate(PROMPTS):
            handle.controls[0].condition = maps[min(index, conditions - 1)][None]
            singles += [generate(pipe, prompt, generator=[g]) for g in tiny.generators(2, first=2 * index)]
    assert (batch - torch.cat(singles)).abs().max() < 1e-4
    assert (singles[0] - singles[2]).abs().max() > 0.01


def test_one_prompt_with_a_condition_for_each_image(pipe, adapter):
    maps = tiny.condition(2)
    with attach(pipe, Control(adapter, maps)) as handle:
        batch = generate(pipe, count=2, generator=[*tiny.generators(1), *tiny.generators(1)])
        handle.controls[0].condition = maps[1:]
        single = generate(pipe, generator=tiny.generators(1))
    assert (batch[1:] - single).abs().max() < 1e-4
    assert (batch[0] - batch[1]).abs().max() > 0.01


def test_who_reads_which_text(pipe, adapter):
    """The adapter's text rows under each policy, against the embeddings that the pipeline makes."""
    positive, negative = pipe.encode_prompt(PROMPTS[:2], "cpu", 2, True, ["blurry", "blurry"])
    expected = {
        "positive": positive,
        "cond_only": positive,
        "per_branch": torch.cat([negative, positive]),
    }
    for policy, text in expected.items():
        maps = tiny.condition(2)
        with calls_of(adapter) as calls, attach(pipe, Control(adapter, maps, policy=policy)):
            generate(pipe, PROMPTS[:2], count=2)
        (condition, read), _ = calls[0]
        assert torch.equal(read, text)
        assert torch.equal(condition, maps.repeat_interleave(2, 0).repeat(len(text) // 4, 1, 1, 1))


def test_cond_only_leaves_the_negative_branch_alone(pipe, adapter, unet):
    seen = []

    def add(module, args, kwargs):
        seen.append(kwargs["down_intrablock_additional_residuals"])

    for policy in ("cond_only", "positive"):
        with attach(pipe, Control(adapter, tiny.condition(), policy=policy)):
            handle = unet.register_forward_pre_hook(add, with_kwargs=True)
            generate(pipe, steps=1)
            handle.remove()
    for alone, both in zip(*seen, strict=True):
        assert torch.count_nonzero(alone[0]) == 0
        assert torch.equal(alone[1], both[1])
        assert torch.equal(both[0], both[1])


def test_guidance_switched_off_in_mid_run(pipe, adapter):
    def stop_guiding(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    options = {
        "callback_on_step_end": stop_guiding,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with calls_of(adapter) as calls, attach(pipe, Control(adapter, tiny.condition())):
        generate(pipe, steps=4, **options)
    assert [len(args[1]) for args, _ in calls] == [1, 1]
    assert torch.equal(calls[0][0][1], calls[1][0][1])


def test_unguided(pipe, adapter):
    with calls_of(adapter) as calls, attach(pipe, Control(adapter, tiny.condition())):
        generate(pipe, guidance_scale=1.0)
    assert [len(args[1]) for args, _ in calls] == [1]


def test_a_bare_unet_needs_per_branch(unet, adapter):
    with refused("policy", "positive", expected="per_branch", hint="branches="):
        attach(unet, Control(adapter, tiny.condition()))
    with refused("pipe_or_denoiser", "a denoiser alone", expected="num_train_timesteps"):
        attach(unet, Control(adapter, tiny.condition(), policy="per_branch", end=0.5))


def test_a_bare_unet_and_its_pipeline_agree(pipe, unet, adapter):
    control = Control(adapter, tiny.condition(), policy="per_branch")
    with attach(pipe, control):
        expected = generate(pipe)
    with attach(unet, control):
        assert torch.equal(generate(pipe), expected)


def test_the_hook_adds_what_residuals_gives(unet, adapter):
    maps, text = tiny.condition(2), torch.randn(2, 5, tiny.TEXT_WIDTH)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = unet(latents, 7, text, **residuals(adapter(maps, text), 0.7)).sample
        with attach(unet, Control(adapter, maps, scale=0.7, policy="per_branch")):
            assert torch.equal(unet(latents, 7, text).sample, expected)
            assert torch.equal(unet(sample=latents, timestep=7, encoder_hidden_states=text)[0], expected)


@pytest.mark.parametrize("by_position", [False, True])
def test_residuals_already_there_are_added_to(unet, adapter, by_position):
    control = Control(adapter, tiny.condition(), policy="per_branch")
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, tiny.TEXT_WIDTH)
    with torch.no_grad():
        theirs = [torch.randn_like(f) for f in adapter(tiny.condition(), text)]
        both = [t + o for t, o in zip(theirs, adapter(tiny.condition(), text), strict=True)]
        expected = unet(latents, 7, text, down_intrablock_additional_residuals=both).sample
        kept = list(theirs)
        with attach(unet, control):
            if by_position:
                out = unet(latents, 7, text, None, None, None, None, None, None, None, theirs).sample
            else:
                out = unet(latents, 7, text, down_intrablock_additional_residuals=theirs).sample
    assert torch.equal(out, expected)
    assert len(theirs) == len(kept)  # the UNet emptied our list, not the caller's


@pytest.mark.filterwarnings("ignore:Passing intrablock residual connections:FutureWarning")
def test_legacy_residuals_alone_are_refused_where_they_would_be_dropped(unet, adapter):
    control = Control(adapter, tiny.condition(), policy="per_branch")
    sizes = ((8, 8), (16, 4), (24, 2), (24, 1))
    legacy = [torch.ones(2, c, s, s) for c, s in sizes]
    with attach(unet, control), torch.no_grad():
        with refused("down_block_additional_residuals", expected="mid_block_additional_residual"):
            bare_call(unet, down_block_additional_residuals=legacy)
        control.scale = 0
        bare_call(unet, down_block_additional_residuals=legacy)


def test_live_changes(pipe, adapter):
    other = tiny.condition(seed=9)
    expected = {}
    for name, changed in {"scale": {"scale": 0.3}, "condition": {"condition": other}, "policy": {}}.items():
        options = {"condition": tiny.condition(), "policy": "per_branch" if name == "policy" else "positive"}
        with attach(pipe, Control(adapter, **options | changed)):
            expected[name] = generate(pipe)
    with calls_of(adapter) as calls, attach(pipe, Control(adapter, tiny.condition())) as handle:
        first = generate(pipe)
        control = handle.controls[0]
        control.scale = 0.3
        assert torch.equal(generate(pipe), expected["scale"])
        assert len(calls) == 1  # the same features
        control.scale, control.condition = 1.0, other
        assert torch.equal(generate(pipe), expected["condition"])
        control.condition, control.policy = tiny.condition(), "per_branch"
        assert torch.equal(generate(pipe), expected["policy"])
        control.policy = "positive"
        assert torch.equal(generate(pipe), first)


def test_live_changes_on_the_handle_of_one_control(pipe, adapter):
    first, second = Control(adapter, tiny.condition()), Control(adapter, tiny.condition())
    with attach(pipe, first) as handle:
        handle.scale, handle.condition = 0.25, tiny.condition(seed=9)
        assert (handle.scale, first.scale) == (0.25, 0.25)
        assert torch.equal(first.condition, tiny.condition(seed=9))
        assert handle.condition is first.condition
        with refused("scale", "nan", expected="a finite number"):
            handle.scale = float("nan")
    with attach(pipe, first, second) as handle, refused("controls", "2", expected="a single control"):
        handle.scale = 0.5
    assert second.scale == 1.0


def test_a_bare_unets_controls_are_shared(unet, adapter):
    before = trace_of(unet)
    control = Control(adapter, tiny.condition(), policy="per_branch")
    with refused("shared", "False", expected="True"):
        attach(unet, control, shared=False)
    assert trace_of(unet) == before


def test_a_misspelled_setting_is_refused(adapter):
    control = Control(adapter, tiny.condition())
    with pytest.raises(AttributeError, match=r"no setting strength; it has condition, scale, "):
        control.strength = 0.2


def test_a_setting_that_the_handle_does_not_have_is_refused(pipe, adapter):
    with attach(pipe, Control(adapter, tiny.condition())) as handle:
        for name in ("policy", "start", "strength"):
            with pytest.raises(
                AttributeError, match=f"^the handle has no setting {name}: use scale or condition"
            ):
                setattr(handle, name, 0.3)


def test_changed_weights_give_new_features(pipe):
    adapter = tiny.adapter(pipe.unet)
    with attach(pipe, Control(adapter, tiny.condition())):
        first = generate(pipe)
        for parameter in adapter.parameters():
            parameter.data.mul_(0.5)
        assert (generate(pipe) - first).abs().max() > 0.01


def zero(tensor):
    tensor.zero_()


def zero_past_the_version(tensor):
    tensor.data.zero_()


def zero_by_numpy(tensor):
    tensor.numpy()[...] = 0


@pytest.mark.parametrize("edit", [zero, zero_past_the_version, zero_by_numpy])
@pytest.mark.parametrize("name", ["condition", "mask"])
@pytest.mark.parametrize("attached_in", [nullcontext, torch.inference_mode])
def test_edits_in_place_give_new_features(unet, adapter, edit, name, attached_in):
    maps = {"condition": tiny.condition(), "mask": torch.ones(1, 1, 64, 64)}
    with torch.no_grad():
        with attach(unet, Control(adapter, **maps | {name: 0 * maps[name]}, policy="per_branch")):
            expected = bare_call(unet)
        with attached_in():
            handle = attach(unet, Control(adapter, **maps, policy="per_branch"))
        with handle, calls_of(adapter) as calls:
            before = bare_call(unet)
            assert torch.equal(bare_call(unet), before)
            assert len(calls) == 1
            with attached_in():
                edit(getattr(handle.controls[0], name))
            assert torch.equal(bare_call(unet), expected)
            assert len(calls) == 2
    assert not torch.equal(before, expected)


def hooked_by(module, kind):
    if kind == "pre-hook":
        return module.register_forward_pre_hook(lambda m, args: tuple(0 * a for a in args))
    return module.register_forward_hook(
        lambda m, args, out: [0 * f for f in out] if isinstance(out, list) else 0 * out
    )


@pytest.mark.parametrize("kind", ["pre-hook", "hook"])
@pytest.mark.parametrize("part", ["", "adapter.body.0"])
def test_hooks_on_the_adapter_give_new_features(unet, adapter, kind, part):
    with attach(unet, Control(adapter, tiny.condition(), policy="per_branch")), torch.no_grad():
        before = bare_call(unet)
        hook = hooked_by(adapter.get_submodule(part), kind)
        hooked = bare_call(unet)
        assert torch.equal(bare_call(unet), hooked)
        hook.remove()
        assert torch.equal(bare_call(unet), before)
    assert not torch.equal(hooked, before)


def test_lora_on_the_adapter_gives_new_features(unet):
    """Added, scaled, switched off and on, as PEFT does it: without a change of any weight."""
    adapter = tiny.adapter(unet)
    with attach(unet, Control(adapter, tiny.condition(), policy="per_branch")), torch.no_grad():
        plain = bare_call(unet)
        config = LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
        torch.manual_seed(0)
        inject_adapter_in_model(config, adapter)
        layers = [module for module in adapter.modules() if isinstance(module, BaseTunerLayer)]
        tuned = bare_call(unet)
        for layer in layers:
            layer.scale_layer(0.5)
        scaled = bare_call(unet)
        for layer in layers:
            layer.enable_adapters(enabled=False)
        assert torch.equal(bare_call(unet), plain)
        for layer in layers:
            layer.enable_adapters(enabled=True)
        assert torch.equal(bare_call(unet), scaled)
    assert not torch.equal(tuned, plain)
    assert not torch.equal(tuned, scaled)


@pytest.mark.parametrize(
    ("start", "end", "acting"),
    [(0.0, 1.0, 10), (0.0, 0.5, 5), (0.5, 1.0, 5), (0.3, 0.6, 3), (0.0, 0.0, 0), (1.0, 1.0, 0)],
)
def test_start_and_end_are_positions_in_the_schedule(pipe, adapter, unet, start, end, acting):
    """DDIM's ten steps lie at t = 901, 801, ... 1, so at p = 0.099, 0.199, ... 0.999."""
    seen = []
    none_acts = nullcontext() if acting else pytest.warns(UserWarning, match="never acted")
    with none_acts, attach(pipe, Control(adapter, tiny.condition(), start=start, end=end)):
        name = "down_intrablock_additional_residuals"
        handle = unet.register_forward_pre_hook(lambda m, a, k: seen.append(k.get(name)), with_kwargs=True)
        generate(pipe, steps=10)
        handle.remove()
    assert sum(residuals is not None for residuals in seen) == acting


def test_the_timestep_is_read_only_where_something_depends_on_it(adapter):
    class Unreadable:
        def __float__(self):
            raise AssertionError("read")

    class Timeless(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states, down_intrablock_additional_residuals=None):
            return sample

    pipe = SimpleNamespace(unet=Timeless(**tiny.SD15_UNET), scheduler=tiny.scheduler())
    control = Control(adapter, tiny.condition(), policy="per_branch")
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, tiny.TEXT_WIDTH)
    with calls_of(adapter) as calls, attach(pipe, control):
        pipe.unet(latents, Unreadable(), text)
        assert len(calls) == 1
        control.end = 0.5
        with pytest.raises(AssertionError, match="read"):
            pipe.unet(latents, Unreadable(), text)


@pytest.mark.parametrize("timestep", [torch.tensor([1, 2]), torch.tensor(-0.3), torch.tensor(1001)])
def test_what_is_no_timestep_is_refused_where_it_is_read(pipe, adapter, timestep):
    control = Control(adapter, tiny.condition(), policy="per_branch", end=0.5)
    pipe._guidance_scale = 1.0
    with attach(pipe, control), refused("timestep", expected="one timestep from 0 to 1000"):
        pipe.unet(torch.randn(2, 4, 8, 8), timestep, torch.randn(2, 5, tiny.TEXT_WIDTH))


def test_removal_is_exact(pipe, unet, adapter):
    before, image = trace_of(unet), generate(pipe)
    with attach(pipe, Control(adapter, tiny.condition())):
        generate(pipe)
        assert trace_of(unet) != before
    assert trace_of(unet) == before
    assert torch.equal(generate(pipe), image)


def test_removal_is_exact_after_exceptions(pipe, unet, adapter):
    before, image = trace_of(unet), generate(pipe)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attach(pipe, Control(adapter, tiny.condition())):
        generate(pipe, callback_on_step_end=fail)
    assert trace_of(unet) == before
    wide = Control(adapter, tiny.condition(1, 64, 128))
    with refused("condition", "128x64", expected="aspect"), attach(pipe, wide):
        generate(pipe)
    assert trace_of(unet) == before
    assert torch.equal(generate(pipe), image)


def test_a_failed_call_does_not_block_the_next(pipe, unet, adapter):
    control = Control(adapter, tiny.condition(3), policy="per_branch")
    with attach(unet, control), torch.no_grad():
        with refused("condition", "3", expected="1 or 2 maps"):
            bare_call(unet)
        control.condition = tiny.condition()
        with pytest.raises(RuntimeError):
            unet(
                torch.zeros(1, 5, 8, 8), 1, torch.zeros(1, 5, tiny.TEXT_WIDTH)
            )  # five channels: fails inside
        results = []
        thread = threading.Thread(target=lambda: results.append(bare_call(unet)))
        thread.start()
        thread.join()
        assert len(results) == 1


@pytest.mark.parametrize(
    ("order", "compiled"),
    [
        ((0, 1, 2), False),
        ((2, 1, 0), True),
        ((1, 0, 2), False),
        pytest.param((0, 1, 2), True, marks=pytest.mark.full),
        pytest.param((2, 1, 0), False, marks=pytest.mark.full),
        pytest.param((1, 0, 2), True, marks=pytest.mark.full),
    ],
)
def test_nested_attachments_add_up_and_go_in_any_order(adapter, order, compiled):
    unet = tiny.unet()
    if compiled:  # what unet.compile() does, without the compiler
        unet._compiled_call_impl = unet._call_impl
    before, before_call = trace_of(unet), unet._compiled_call_impl
    controls = [Control(adapter, tiny.condition(seed=s), scale=0.5, policy="per_branch") for s in range(3)]
    with torch.no_grad():
        base = bare_call(unet)
        handles = [attach(unet, control) for control in controls]
        nested = bare_call(unet)
        for count, index in enumerate(order):
            handles[index].remove()
            handles[index].remove()  # once more is no harm
            left = [controls[i] for i in sorted(order[count + 1 :])]
            now = bare_call(unet)
            if left:
                fresh = tiny.unet()
                with attach(fresh, *left):
                    assert torch.allclose(bare_call(fresh), now, atol=1e-5)
        assert torch.equal(now, base)
        with attach(unet, *controls):
            assert torch.allclose(bare_call(unet), nested, atol=1e-5)
    assert trace_of(unet) == before
    assert unet._compiled_call_impl == before_call
    assert (nested - base).abs().max() > 0.01


def test_a_control_that_is_attached_already_is_a_warning(pipe, unet, adapter):
    """As when a notebook's cell is run again: still added, as controls always are."""
    maps = tiny.condition()
    other = tiny.adapter(unet, variant="slim")
    attached = Control(adapter, maps), Control(adapter, tiny.condition(seed=9))
    with attach(pipe, *attached):
        for again in (
            Control(adapter, maps, scale=0.3),
            Control(adapter, maps.double(), end=0.5),
            attached[0],
        ):
            with pytest.warns(UserWarning, match="^1 of 2 controls are already attached") as warned:
                second = attach(pipe, again, Control(other, maps))
            assert len(warned) == 1
            second.remove()
        with pytest.warns(UserWarning, match="^2 of 2"):
            attach(unet, *attached, branches=("negative", "positive")).remove()
        once = generate(pipe)
        with pytest.warns(UserWarning, match="^1 of 1"), attach(pipe, attached[0], shared=False):
            assert (generate(pipe) - once).abs().max() > 0.01


def test_an_adapter_loaded_again_is_the_same_adapter(pipe, unet, adapter, tmp_path):
    """A notebook cell that loads the adapter, run twice."""
    maps = tiny.condition()
    adapter.save_pretrained(tmp_path)
    changed, fading = (NexusAdapter.from_pretrained(tmp_path) for _ in range(2))
    with torch.no_grad():
        changed.adapter.body[3].norm1.bias[-1] += 1
    fading.register_to_config(noise_exponent=1.0)
    with attach(pipe, Control(adapter, maps)):
        for again in (
            NexusAdapter.from_pretrained(tmp_path),
            load_adapter(tmp_path, dtype=torch.float64),
            copy.deepcopy(adapter),
        ):
            with pytest.warns(UserWarning, match="^1 of 1 controls are already attached"):
                attach(pipe, Control(again, maps)).remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for other in (changed, fading, tiny.adapter(unet, variant="slim")):
                attach(pipe, Control(other, maps)).remove()


def test_controls_of_one_call_that_repeat_each_other_are_a_warning(pipe, adapter):
    maps, left = tiny.condition(), torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    one, again = Control(adapter, maps), Control(copy.deepcopy(adapter), maps.clone(), scale=0.5)
    with pytest.warns(UserWarning, match="^controls 1 and 3 have the same adapter") as warned:
        attach(pipe, one, Control(adapter, tiny.condition(seed=9)), again).remove()
    assert len(warned) == 1
    apart = (
        (Control(adapter, maps, mask=left), Control(adapter, maps, mask=1 - left)),
        (Control(adapter, maps, end=0.5), Control(adapter, maps, start=0.5, scale=0.3)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for controls in apart:
            attach(pipe, *controls).remove()


def test_an_error_is_not_followed_by_a_warning(pipe, adapter):
    def fail():
        with attach(pipe, Control(adapter, tiny.condition(), end=0.01)):
            generate(pipe)
            raise ValueError("own")

    before = trace_of(pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ValueError, match="own"):
            fail()
    assert trace_of(pipe.unet) == before


def test_attachments_whose_handles_are_lost_are_detached(adapter):
    pipe = tiny.sd15()
    before, base = trace_of(pipe.unet), generate(pipe)
    attach(pipe, Control(adapter, tiny.condition()))
    attach(pipe, Control(adapter, tiny.condition(seed=9)), shared=False)
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # what unet.compile() does, without the compiler
    attach(pipe, Control(adapter, tiny.condition(seed=10)))
    detach(pipe)
    pipe.unet._compiled_call_impl = None
    detach(pipe)
    assert trace_of(pipe.unet)[0] == before[0]
    assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize("by", ["remove", "with"])
def test_removed_where_warnings_are_errors(adapter, by):
    pipe = tiny.sd15()
    before = trace_of(pipe.unet)
    handle = attach(pipe, Control(adapter, tiny.condition(), end=0.01))
    generate(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="never acted"):
            handle.remove() if by == "remove" else handle.__exit__(None, None, None)
    assert trace_of(pipe.unet) == before


def test_controls_that_never_meet_are_no_warning(pipe, unet, adapter, recwarn):
    """Another adapter or map, after removal, and in other pipelines or threads that share the denoiser."""
    control = Control(adapter, tiny.condition())
    attach(pipe, control).remove()
    second = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    with attach(pipe, control, shared=False):
        attach(second, control, shared=False).remove()
        thread = threading.Thread(target=lambda: attach(pipe, control, shared=False).remove())
        thread.start()
        thread.join()
        attach(pipe, Control(adapter, tiny.condition(seed=9))).remove()
        attach(pipe, Control(adapter, tiny.condition(2))).remove()
        attach(pipe, Control(tiny.adapter(unet, variant="slim"), tiny.condition())).remove()
    assert not [w for w in recwarn if "attached" in str(w.message)]


def test_a_removed_attachment_is_not_entered_again(unet, adapter):
    handle = attach(unet, Control(adapter, tiny.condition(), policy="per_branch"))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"has been removed; call attach\(\) again"), handle:
        pass


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_at_once_are_refused(adapter, compiled):
    unet, results = tiny.unet(), []
    if compiled:
        unet._compiled_call_impl = unet._call_impl
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert done.wait(20)

    def first():
        with torch.no_grad():
            results.append(bare_call(unet))

    with attach(unet, Control(adapter, tiny.condition(), policy="per_branch")), torch.no_grad():
        hook = unet.conv_in.register_forward_hook(wait)
        thread = threading.Thread(target=first, name="other")
        thread.start()
        assert inside.wait(20)
        hook.remove()
        for _ in range(2):  # refusing one does not let in the next
            with pytest.raises(
                RuntimeError,
                match=r"two simultaneous calls .* thread other is in a call while thread MainThread",
            ):
                bare_call(unet)
        done.set()
        thread.join()
        assert torch.equal(bare_call(unet), *results)


def test_a_caller_that_is_gone_does_not_block():
    guard = CallGuard(tiny.unet())
    thread = threading.Thread(target=guard.enter)
    thread.start()
    thread.join()
    guard.enter()
    guard.enter()  # left over from an interrupted call of this thread
    guard.leave()


def test_an_interrupted_call_does_not_lock_out_other_threads(adapter):
    """Ctrl-C in the UNet: PyTorch then runs no hook behind the call, and the caller's thread lives on."""
    unet, results = tiny.unet(), []

    def interrupt(*_):
        raise KeyboardInterrupt

    def later():
        with torch.no_grad():
            results.append(bare_call(unet))

    with attach(unet, Control(adapter, tiny.condition(), policy="per_branch")), torch.no_grad():
        hook = unet.conv_in.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            bare_call(unet)
        hook.remove()
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
    assert len(results) == 1


def test_a_call_outside_of_the_pipelines_run_has_no_layout(pipe, adapter, unet):
    """What the pipeline last did says nothing of a call of its UNet by hand."""
    control = Control(adapter, tiny.condition())
    with attach(pipe, control), torch.no_grad():
        generate(pipe)
        with refused("policy", "positive", expected='"per_branch" for a call without a pipeline'):
            bare_call(unet)
    control.policy = "per_branch"
    with attach(unet, control), torch.no_grad():
        expected = bare_call(unet)
    with attach(pipe, control), torch.no_grad():
        assert torch.equal(bare_call(unet), expected)


def test_an_adapter_for_another_vae_is_refused(pipe, unet):
    other = tiny.adapter(unet, unshuffle=16)
    with refused("adapter", "16, from unshuffle 16", expected="8 pixels of the condition per latent"):
        attach(pipe, Control(other, tiny.condition()))


def test_removal_frees_the_features(unet, adapter):
    handle = attach(unet, Control(adapter, tiny.condition(), policy="per_branch"))
    kept = []

    def remember(module, args, kwargs):  # at scale 1 the features that are kept are those that are added
        kept.extend(map(weakref.ref, kwargs["down_intrablock_additional_residuals"]))

    hook = unet.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        bare_call(unet)
    hook.remove()
    assert kept
    assert all(reference() is not None for reference in kept)
    handle.remove()
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_gradients_reach_the_adapter_and_not_the_unet():
    unet = tiny.unet().requires_grad_(False)
    adapter = tiny.adapter(unet).requires_grad_(True)
    with calls_of(adapter) as calls, attach(unet, Control(adapter, tiny.condition(), policy="per_branch")):
        bare_call(unet).sum().backward()
        first = [p.grad.clone() for p in adapter.parameters()]
        bare_call(unet).sum().backward()
    assert len(calls) == 2  # each its own graph
    assert all(p.grad is None for p in unet.parameters())
    moved = [p.grad for p in adapter.parameters()]
    assert all(torch.allclose(2 * a, b, atol=1e-4) for a, b in zip(first, moved, strict=True))
    assert sum(float(g.abs().sum()) for g in moved) > 0


def test_inference_mode(pipe, adapter):
    with attach(pipe, Control(adapter, tiny.condition())):
        expected = generate(pipe)
    with torch.inference_mode(), calls_of(adapter) as calls, attach(pipe, Control(adapter, tiny.condition())):
        assert torch.equal(generate(pipe), expected)
        assert len(calls) == 1
    with attach(pipe, Control(adapter, tiny.condition())) as handle:
        with torch.inference_mode():
            generate(pipe)
        assert torch.equal(generate(pipe), expected)
        assert handle.controls[0].scale == 1


def test_half_precision_follows_the_call(adapter):
    unet = tiny.unet().to(torch.bfloat16)
    latents = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    text = torch.randn(1, 5, tiny.TEXT_WIDTH, dtype=torch.bfloat16)
    with torch.no_grad(), attach(unet, Control(adapter, tiny.condition(), policy="per_branch")):
        out = unet(latents, 7, text).sample
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


SIZES = [(8, 8), (72, 88), (104, 56), (24, 200), (1000, 8), (8, 1016), (1016, 136)]
SHORT = [(tiny.SD15_UNET, (104, 56)), (tiny.SDXL_UNET, (72, 88)), (tiny.SD15_UNET, (8, 1016))]


@pytest.mark.parametrize(
    ("config", "size"),
    [
        *SHORT,
        *(
            pytest.param(config, size, marks=pytest.mark.full)
            for config in (tiny.SD15_UNET, tiny.SDXL_UNET)
            for size in SIZES
            if (config, size) not in SHORT
        ),
    ],
)
def test_any_multiple_of_8(config, size):
    unet = tiny.unet(config)
    adapter = tiny.adapter(unet)
    condition = tiny.condition(1, *size)
    latents = torch.randn(1, 4, size[0] // 8, size[1] // 8)
    text = torch.randn(1, 5, config["cross_attention_dim"])
    added = {"text_embeds": torch.zeros(1, tiny.TEXT_WIDTH), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        base = unet(latents, 5, text, added_cond_kwargs=added).sample
        with attach(unet, Control(adapter, condition, policy="per_branch")):
            out = unet(latents, 5, text, added_cond_kwargs=added).sample
    assert out.shape == base.shape
    assert (out - base).abs().max() > 0.001


def test_the_middle_feature_of_sdxl_is_added():
    unet = tiny.unet(tiny.SDXL_UNET)
    adapter = tiny.adapter(unet)
    seen = []
    unet.mid_block.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    unet.up_blocks[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k["hidden_states"].clone()), with_kwargs=True
    )
    text = torch.randn(1, 5, 2 * tiny.TEXT_WIDTH)
    added = {"text_embeds": torch.zeros(1, tiny.TEXT_WIDTH), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad(), attach(unet, Control(adapter, tiny.condition(1, 104, 72), policy="per_branch")):
        unet(torch.randn(1, 4, 13, 9), 5, text, added_cond_kwargs=added)
    assert (seen[1] - seen[0]).abs().max() > 0.01


def test_misfits_are_found_when_attaching(pipe, unet, adapter):
    before = trace_of(unet)
    for changes, found, needed in (
        ({"text_width": 20}, "20", "text_width 16"),
        ({"channels": (8, 16, 24), "pools": (0, 1, 1)}, "3", "number of features 4"),
    ):
        wrong = tiny.adapter(unet, **changes)
        with refused("adapter", found, expected=needed):
            attach(pipe, Control(wrong, tiny.condition()))
    assert trace_of(unet) == before


def test_text_of_another_width_is_refused(unet, adapter):
    with attach(unet, Control(adapter, tiny.condition(), policy="per_branch")):
        with refused("encoder_hidden_states", "20", expected="width 16"):
            unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 20))
        with refused("encoder_hidden_states", "(1, 5, 16)", expected="(2, N, D)"):
            unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(1, 5, 16))


@pytest.mark.parametrize("target", [None, "pipe", torch.nn.Linear(1, 1), object()])
def test_what_has_no_unet_is_refused(adapter, target):
    with refused("pipe_or_denoiser", f"a {type(target).__name__}", expected="UNet2DConditionModel"):
        attach(target, Control(adapter, tiny.condition()))


def test_controls_are_required(pipe, adapter):
    with refused("controls", "no control", expected="one or more controls"):
        attach(pipe)
    with refused("controls", "NexusAdapter", expected="one or more controls"):
        attach(pipe, adapter)


@pytest.mark.parametrize("kind", ["nexus", "t2i"])
def test_features_fade_with_the_noise(pipe, adapter, kind):
    """A noise exponent is the very scale along the schedule that the scheduler's noise gives."""
    if kind == "t2i":
        torch.manual_seed(3)
        adapter = T2IAdapter(channels=[8, 16, 24, 24], num_res_blocks=2).eval().requires_grad_(False)
    share = 1 - pipe.scheduler.alphas_cumprod

    def scale(position):
        return 2 * float(share[min(999, round(1000 * (1 - position)))]) ** 1.5

    with attach(pipe, Control(adapter, tiny.condition(), scale=scale)):
        expected = generate(pipe)
    with attach(pipe, Control(adapter, tiny.condition(), scale=2, noise_exponent=1.5)) as handle:
        assert torch.allclose(generate(pipe), expected, atol=1e-5)
        handle.controls[0].noise_exponent = 0
        plain = generate(pipe)
    assert not torch.allclose(plain, expected, atol=1e-3)
    with attach(pipe, Control(adapter, tiny.condition(), scale=2)):
        assert torch.equal(generate(pipe), plain)


def test_an_adapter_brings_its_noise_exponent(pipe):
    torch.manual_seed(0)
    trained = NexusAdapter.for_unet(pipe.unet, noise_exponent=1).eval()
    with attach(pipe, Control(trained, tiny.condition())) as handle:
        assert handle.controls[0].noise_exponent == 1
        faded = generate(pipe)
    with attach(pipe, Control(trained, tiny.condition(), noise_exponent=0)):
        assert not torch.equal(generate(pipe), faded)


def test_noise_is_known_where_a_pipeline_has_a_schedule_of_it(pipe, unet, adapter):
    fading = Control(adapter, tiny.condition(2), policy="per_branch", noise_exponent=1)
    with refused("pipe_or_denoiser", "a denoiser alone", expected="noise_exponent"):
        attach(unet, fading)
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()}, requires_safety_checker=False
    )
    with refused("noise_exponent", "a FlowMatch", expected="alphas_cumprod", hint="noise_exponent=0"):
        attach(other, fading)
    fading.noise_exponent = 0
    attach(unet, fading).remove()


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), True, "1"])
def test_a_noise_exponent_is_a_number(adapter, wrong):
    with refused("noise_exponent", repr(wrong)):
        Control(adapter, tiny.condition(), noise_exponent=wrong)


# Where the UNet adds the features of its keyword itself, also to the skip connections: behind the last
# attention of each block that has one, and behind the last layer.
MODULES = (
    "down_blocks.0.attentions.0",
    "down_blocks.1.attentions.0",
    "down_blocks.2.attentions.0",
    "down_blocks.3.resnets.0",
)


class HookedBase(UNetBase):
    """UNets take features through hooks on their modules, as denoisers without a keyword do."""

    def places(self):
        return tuple(
            Place(place.channels, place.stride, module=module, output=0 if "attentions" in module else None)
            for place, module in zip(super().places(), MODULES, strict=True)
        )


@pytest.fixture
def hooked():
    with BASES.temporary():
        yield register_base("hooked")(HookedBase)


def all_hooks(unet):
    return [dict(module._forward_hooks) for module in unet.modules()], trace_of(unet)


@pytest.mark.parametrize("policy", ["positive", "per_branch", "cond_only"])
def test_hooks_on_modules_add_what_the_keyword_does(pipe, adapter, policy, request):
    control = Control(adapter, tiny.condition(3), policy=policy)
    base = generate(pipe, PROMPTS)
    with attach(pipe, control):
        expected = generate(pipe, PROMPTS)
    before = all_hooks(pipe.unet)
    request.getfixturevalue("hooked")
    with attach(pipe, control) as handle:
        assert torch.equal(generate(pipe, PROMPTS), expected)
        handle.scale = 0
        assert torch.equal(generate(pipe, PROMPTS), base)
        handle.scale = 1
        assert torch.equal(generate(pipe, PROMPTS), expected)
    assert all_hooks(pipe.unet) == before
    assert torch.equal(generate(pipe, PROMPTS), base)


def test_attachments_by_hooks_on_modules_add_up(pipe, adapter, request):
    controls = [Control(adapter, tiny.condition(seed=seed), scale=0.5) for seed in range(2)]
    with attach(pipe, controls[0]):
        first = generate(pipe)
    with attach(pipe, *controls):
        expected = generate(pipe)
    before = all_hooks(pipe.unet)
    request.getfixturevalue("hooked")
    handles = [attach(pipe, control) for control in controls]
    assert torch.allclose(generate(pipe), expected, atol=1e-5)
    handles[1].remove()
    assert torch.allclose(generate(pipe), first, atol=1e-5)
    handles[0].remove()
    assert all_hooks(pipe.unet) == before


@pytest.mark.usefixtures("hooked")
def test_an_interrupted_call_leaves_no_features_behind(pipe, adapter):
    """PyTorch runs no hook behind a call that was interrupted, and the next may be another pipeline's."""
    other = tiny.quiet(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    base = generate(other)

    def interrupt(*_):
        raise KeyboardInterrupt

    with attach(pipe, Control(adapter, tiny.condition()), shared=False):
        hook = pipe.unet.conv_in.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        hook.remove()
        assert torch.equal(generate(other), base)
        assert not torch.equal(generate(pipe), base)


class TokenBase(UNetBase):
    """Takes features as a transformer does, (B, H * W, C), here within the UNet's attentions."""

    def places(self):
        named = [f"{module}.transformer_blocks.0" for module in MODULES[:3]]
        tokens = [
            Place(p.channels, p.stride, module=m, layout="tokens")
            for p, m in zip(super().places(), named, strict=False)
        ]
        return (*tokens, Place(24, 8, module=MODULES[3]))


def test_tokens_of_a_denoiser(pipe, adapter):
    base = generate(pipe)
    with BASES.temporary():
        register_base("tokens")(TokenBase)
        attachment = attach(pipe, Control(adapter, tiny.condition(), policy="cond_only"))
    seen = []
    block = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    with attachment, torch.no_grad():
        early = block.register_forward_hook(lambda m, a, out: seen.append(out), prepend=True)
        late = block.register_forward_hook(lambda m, a, out: seen.append(out))
        assert not torch.equal(generate(pipe, steps=1), base)
        early.remove()
        late.remove()
        positive, _ = pipe.encode_prompt("a red star", "cpu", 1, False)
        feature = adapter(tiny.condition(), positive)[0]
    added = seen[1] - seen[0]
    assert torch.count_nonzero(added[0]) == 0
    assert torch.allclose(added[1], feature[0].flatten(1).T, atol=1e-5)
    assert torch.equal(generate(pipe), base)


def test_a_denoiser_whose_forward_takes_no_features(pipe, adapter):
    """As copies of diffusers' UNet from before it did."""

    class UNet2DConditionModel(torch.nn.Module):
        config = pipe.unet.config

        def forward(self, sample, timestep, encoder_hidden_states):
            return sample

    with refused(
        "pipe_or_denoiser", "a UNet2DConditionModel", expected="down_intrablock_additional_residuals"
    ):
        attach(UNet2DConditionModel(), Control(adapter, tiny.condition(), policy="per_branch"))
