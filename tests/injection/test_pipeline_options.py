"""What users turn on in stock pipelines, together with a control."""

import gc

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    KolorsPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tests import tiny

from nexus_adapters.injection import Control, attach

STEPS = 2


def run(pipe, prompt="a red star", **options):
    given = {"num_inference_steps": STEPS, "output_type": "latent", "generator": tiny.generators(1)[0]}
    return pipe(prompt, **given | options).images


def check(pipe, adapter=None, adapter_calls=1, **options):
    """The control acts, once a generation, and at scale 0 and after removal not at all."""
    adapter = adapter or tiny.adapter(pipe.unet)
    calls = []
    counted = adapter.register_forward_hook(lambda *_: calls.append(1))
    base = run(pipe, **options)
    with attach(pipe, Control(adapter, tiny.condition())) as handle:
        found = run(pipe, **options)
        assert len(calls) == adapter_calls
        handle.scale = 0
        assert torch.equal(run(pipe, **options), base)
    counted.remove()
    assert torch.equal(run(pipe, **options), base)
    assert (found - base).abs().max() > 0.01
    return found


def lora(unet, folder):
    """A file of LoRA weights for `unet`, as trainers write them."""
    torch.manual_seed(11)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def test_lora(tmp_path):
    lora(tiny.unet(), tmp_path)
    pipe = tiny.sd15()
    plain = run(pipe)
    adapter = tiny.adapter(pipe.unet)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert (run(pipe) - plain).abs().max() > 0.01
    found = check(pipe, adapter)
    with attach(pipe, Control(adapter, tiny.condition())):  # in the other order, too
        pipe.unload_lora_weights()
        without = run(pipe)
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(run(pipe), found)
    assert not torch.equal(without, found)
    pipe.fuse_lora()
    check(pipe, adapter)


def ip_adapter_weights(unet):
    """Of four image tokens, for every cross-attention of the UNet."""
    torch.manual_seed(12)
    width = unet.config.cross_attention_dim
    layers = {}
    for place, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{place}.{part}.weight"] = torch.randn(inner, width) / 4
        assert processor is not None
    projection = {
        "proj.weight": torch.randn(4 * width, 6),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def test_ip_adapter():
    pipe = tiny.sd15()
    adapter = tiny.adapter(pipe.unet)
    plain = run(pipe)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    pipe.set_ip_adapter_scale(1.0)
    seen = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 6), torch.ones(1, 1, 6)])]}
    assert (run(pipe, **seen) - plain).abs().max() > 0.01
    check(pipe, adapter, **seen)
    check(pipe, tiny.adapter(pipe.unet), **seen)  # made for the UNet as it is now


def test_textual_inversion():
    pipe = tiny.sd15()
    torch.manual_seed(13)
    pipe.load_textual_inversion({"<thing>": torch.randn(tiny.TEXT_WIDTH)}, token="<thing>")
    assert not torch.equal(check(pipe, prompt="a <thing>"), check(pipe, prompt="a star"))


def test_prompt_weighting_by_embeddings():
    pipe = tiny.sd15()
    embeds, negative = pipe.encode_prompt("a red star", "cpu", 1, True, "blurry")
    weighted = embeds * torch.linspace(0.5, 2, embeds.shape[1]).reshape(1, -1, 1)
    texts = {"prompt": None, "negative_prompt_embeds": negative}
    assert not torch.equal(
        check(pipe, prompt_embeds=weighted, **texts), check(pipe, prompt_embeds=embeds, **texts)
    )


def test_freeu():
    pipe = tiny.sd15()
    plain = run(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    assert not torch.equal(run(pipe), plain)
    check(pipe)


def swap_prompts(embeds):
    def callback(pipe, step, timestep, given):
        return {"prompt_embeds": embeds} if step == 1 else {}

    return callback


def test_prompt_embeddings_swapped_in_mid_run():
    """The adapter reads the new text from then on: once for each content."""
    pipe = tiny.sd15()
    other, negative = pipe.encode_prompt("photo of a dog", "cpu", 1, True, "")
    both = torch.cat([negative, other])
    tensors = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    check(pipe, adapter_calls=2, callback_on_step_end=swap_prompts(both), num_inference_steps=3, **tensors)


def test_lcm_without_guidance():
    pipe = tiny.sd15(unet=tiny.unet(time_cond_proj_dim=8))
    pipe.scheduler = LCMScheduler(num_train_timesteps=1000, original_inference_steps=50)
    check(pipe, guidance_scale=4.0)  # an input of the UNet, in one branch
    turbo = tiny.sdxl()
    check(turbo, guidance_scale=0.0)


def test_several_controlnets():
    base = tiny.sd15()
    nets = MultiControlNetModel([tiny.controlnet(base.unet), tiny.controlnet(base.unet)])
    pipe = tiny.sd15(StableDiffusionControlNetPipeline, unet=base.unet, controlnet=nets)
    check(pipe, image=[tiny.image(seed=8), tiny.image(seed=9)], controlnet_conditioning_scale=[1.0, 0.5])


def test_text_of_a_projected_encoder():
    """As Kolors has it: the UNet itself projects a wide text, which the adapter reads as it is."""
    changes = {"encoder_hid_dim": 40, "encoder_hid_dim_type": "text_proj"}
    unet = tiny.unet(tiny.SDXL_UNET, **changes, projection_class_embeddings_input_dim=6 * 4 + 40)
    pipe = tiny.quiet(
        KolorsPipeline(
            vae=tiny.vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=tiny.scheduler()
        )
    )
    torch.manual_seed(14)
    embeds = {
        "prompt_embeds": torch.randn(1, 5, 40),
        "negative_prompt_embeds": torch.randn(1, 5, 40),
        "pooled_prompt_embeds": torch.randn(1, 40),
        "negative_pooled_prompt_embeds": torch.randn(1, 40),
    }
    adapter = tiny.adapter(unet)
    assert adapter.config.text_width == 40
    check(pipe, adapter, prompt=None, height=64, width=64, **embeds)


@pytest.mark.parametrize("kind", ["v_prediction", "wide"])
def test_stable_diffusion_2(kind):
    """v-prediction, and a text of another width, with heads of one width and linear projections."""
    unet = tiny.unet(
        cross_attention_dim=tiny.TEXT_WIDTH, attention_head_dim=(1, 2, 3, 3), use_linear_projection=True
    )
    pipe = tiny.sd15(unet=unet)
    if kind == "v_prediction":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
    check(pipe)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16])
def test_half_precision(dtype):
    pipe = tiny.sd15()
    noise = torch.randn(1, 4, 8, 8, generator=tiny.generators(1)[0])  # drawn in half precision it may differ
    expected = check(pipe, latents=noise)
    adapter = tiny.adapter(pipe.unet)
    pipe.to(dtype)
    for of_adapter in (torch.float32, dtype):
        found = check(pipe, adapter.to(of_adapter), latents=noise.to(dtype))
        assert found.dtype == dtype
        assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_layerwise_casting():
    pipe = tiny.sd15()
    adapter = tiny.adapter(pipe.unet)
    expected = check(pipe, adapter)
    for model in (pipe.unet, adapter):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = check(pipe, adapter)
    assert (found - expected).abs().mean() < 0.3 * expected.abs().mean()


def test_slicing():
    pipe = tiny.sd15()
    expected = check(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert torch.allclose(check(pipe, output_type="latent"), expected, atol=1e-4)


@pytest.mark.parametrize("where", ["model", "sequential"])
def test_offload(where):
    pipe = tiny.sd15()
    adapter = tiny.adapter(pipe.unet)
    expected = check(pipe, adapter)
    if where == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # what enable_sequential_cpu_offload does; accelerate takes "cpu", and not the "cpu:0" it is given
        for model in (pipe.unet, pipe.vae, pipe.text_encoder, adapter):
            cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        assert next(adapter.parameters()).is_meta
    assert torch.equal(check(pipe, adapter), expected)


def test_from_pipe_both_ways():
    """Pipelines that share a UNet share its controls, whichever of them was made from which."""
    first = tiny.sd15()
    adapter = tiny.adapter(first.unet)
    with attach(first, Control(adapter, tiny.condition())):
        second = tiny.quiet(StableDiffusionImg2ImgPipeline.from_pipe(first))
        edited = run(second, image=tiny.image(), strength=0.5)
        back = tiny.quiet(StableDiffusionPipeline.from_pipe(second))
        assert torch.equal(run(back, height=64, width=64), run(first, height=64, width=64))
    assert (run(second, image=tiny.image(), strength=0.5) - edited).abs().max() > 0.01


def t2i():
    torch.manual_seed(3)
    adapter = T2IAdapter(channels=[8, 16, 24, 24], num_res_blocks=1).eval().requires_grad_(False)
    for block in adapter.adapter.body:
        for weight in block.parameters():
            weight.mul_(3)
    return adapter


def test_variants_and_t2i_adapters_mix():
    """Three kinds of adapters in one call, each once a generation, with settings of its own."""
    pipe = tiny.sd15()
    adapters = [tiny.adapter(pipe.unet), tiny.adapter(pipe.unet, variant="slim"), t2i()]
    calls = []
    for adapter in adapters:
        adapter.register_forward_hook(lambda module, *_: calls.append(module))
    controls = [
        Control(adapters[0], tiny.condition(), scale=0.8, end=0.6),
        Control(adapters[1], tiny.condition(seed=9), policy="per_branch", mask=tiny.image(seed=3)),
        Control(adapters[2], tiny.condition(seed=10), scale=[0, 1], level_scales="prompt"),
    ]
    base = run(pipe)
    with attach(pipe, *controls):
        found = run(pipe)
    assert sorted(map(id, calls)) == sorted(map(id, adapters))
    for left_out in range(3):  # each one counts
        with attach(pipe, *(c for place, c in enumerate(controls) if place != left_out)):
            assert (run(pipe) - found).abs().max() > 0.001
    assert torch.equal(run(pipe), base)


class Shallow(UNet2DConditionModel):
    """Compiling takes as long as a UNet is deep."""

    def forward(
        self, sample, timestep, encoder_hidden_states, down_intrablock_additional_residuals=None, **options
    ):
        feature = (down_intrablock_additional_residuals or [0.0])[0]
        text = encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1)
        return (self.conv_out(self.conv_in(sample) + text + timestep / 1000 + feature),)


TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def graphs(pipe, form):
    """Compile the UNet in this form; a list that grows by each graph that it is compiled to."""
    torch.compiler.reset()
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    if form == "module":
        pipe.unet.compile(backend=backend, fullgraph=True, dynamic=False)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True, dynamic=False)
    return found


FULL = pytest.mark.full
COMPILED = [
    ({}, 1, "wrapper", "shallow"),
    ({"end": 0.5}, 2, "module", "shallow"),
    pytest.param({}, 1, "module", "deep", marks=FULL),
    pytest.param({}, 1, "wrapper", "deep", marks=FULL),
    pytest.param({"end": 0.5}, 2, "module", "deep", marks=FULL),
    pytest.param({"end": 0.5}, 2, "wrapper", "deep", marks=FULL),
    pytest.param({"scale": [1, 0.5]}, 1, "module", "deep", marks=FULL),
    pytest.param({"scale": [1, 0.5]}, 1, "wrapper", "deep", marks=FULL),
]


@pytest.mark.parametrize(("settings", "expected", "form", "depth"), COMPILED)
def test_compiled_to_one_graph_and_to_two_with_start_or_end(depth, form, settings, expected):
    torch.manual_seed(0)
    unet = Shallow(**tiny.SD15_UNET).eval() if depth == "shallow" else tiny.unet(**TWO_LEVELS)
    pipe = tiny.sd15(unet=unet)
    adapter = tiny.adapter(pipe.unet)
    with attach(pipe, Control(adapter, tiny.condition(), **settings)):
        plain = run(pipe)
    compiled = graphs(pipe, form)
    with attach(pipe, Control(adapter, tiny.condition(), **settings)):
        found = run(pipe)
        run(pipe)
    assert torch.allclose(found, plain, atol=1e-5)
    assert len(compiled) == expected
    torch.compiler.reset()
    gc.collect()


def test_cancelled_within_one_step():
    """By diffusers' own switch, and by an error from the callback: the UNet is left as it was."""
    pipe = tiny.sd15()
    adapter = tiny.adapter(pipe.unet)
    base = run(pipe)
    taken = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: taken.append(1))

    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 1
        return given

    with attach(pipe, Control(adapter, tiny.condition())):
        run(pipe, callback_on_step_end=stop, num_inference_steps=3)
        assert len(taken) == 2
        pipe._interrupt = False

        def fail(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=fail)
        assert len(taken) == 3
    hook.remove()
    assert torch.equal(run(pipe), base)


def test_scale_changed_on_the_handle_in_mid_run():
    """As a slider would: from the next step on, without another adapter call."""
    pipe = tiny.sd15()
    adapter = tiny.adapter(pipe.unet)
    calls = []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    with attach(pipe, Control(adapter, tiny.condition(), scale=[1, 1, 0.5, 0.5])):
        expected = run(pipe, num_inference_steps=4)
    calls.clear()
    with attach(pipe, Control(adapter, tiny.condition())) as handle:

        def slide(pipe, step, timestep, given):
            handle.scale = 1.0 if step < 1 else 0.5
            return given

        assert torch.equal(run(pipe, callback_on_step_end=slide, num_inference_steps=4), expected)
    assert len(calls) == 1


def test_previews_in_each_step():
    pipe = tiny.sd15()
    seen = []

    def look(pipe, step, timestep, given):
        seen.append(pipe.vae.decode(given["latents"] / pipe.vae.config.scaling_factor).sample)
        return given

    with attach(pipe, Control(tiny.adapter(pipe.unet), tiny.condition())):
        final = run(pipe, callback_on_step_end=look, output_type="pt")
    assert len(seen) == STEPS
    assert torch.allclose((seen[-1] / 2 + 0.5).clamp(0, 1), final, atol=1e-5)
