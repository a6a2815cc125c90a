"""StableDiffusionNexusPipeline: stock Stable Diffusion with an adapter, saved and loaded as one."""

import importlib
import inspect
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from fnmatch import fnmatch
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.utils import dynamic_modules_utils
from jaxtyping import config
from PIL import Image
from tests import tiny
from tests.refusals import refused
from torch.utils._python_dispatch import TorchDispatchMode

import nexus_adapters
from nexus_adapters.errors import MISSING
from nexus_adapters.injection import Control, attach
from nexus_adapters.pipelines import StableDiffusionNexusPipeline
from nexus_adapters.pipelines.call import check_counts, output_height_width

OPTIONS = {"num_inference_steps": 3, "output_type": "pt", "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def base():
    return tiny.sd15()


@pytest.fixture(scope="module")
def adapter(base):
    return tiny.adapter(base.unet)


@pytest.fixture(scope="module")
def pipe(base, adapter):
    made = StableDiffusionNexusPipeline(**base.components, adapter=adapter, requires_safety_checker=False)
    return tiny.quiet(made)


def generate(pipe, prompt="a red star", **options):
    return pipe(prompt, generator=tiny.generators(1)[0], **OPTIONS | options).images


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("value", [0, -8, "128", 64.0, True])
def test_sides_are_positive_integers(monkeypatch, side, value):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused(side, repr(value), expected="positive integer"):
        output_height_width(
            torch.zeros(1, 3, 64, 64), **{"height": None, "width": None, side: value}, native=512, multiple=8
        )


@pytest.mark.parametrize("sides", [(100_000, 100_000), (None, 100_000), (8008, 8000)])
def test_an_image_that_no_memory_holds_is_refused(sides):
    with refused("height, width", "x", expected="64 megapixels"):
        output_height_width(torch.zeros(1, 3, 64, 64), *sides, native=512, multiple=8)


def test_it_is_the_stock_pipeline_with_a_control_attached(base, adapter, pipe):
    maps = tiny.condition()
    plain = generate(base)
    with attach(base, Control(adapter, maps, 0.8)):
        expected = generate(base)
    assert torch.equal(generate(pipe, image=maps, adapter_conditioning_scale=0.8), expected)
    assert torch.equal(generate(pipe, image=maps, adapter_conditioning_scale=0), plain)
    assert (expected - plain).abs().max() > 0.05
    assert torch.equal(generate(base), plain)  # detached from the UNet that both share


class Operations(TorchDispatchMode):
    """Counts the operations that are run while it is open."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("image", "checks"), [(tiny.condition(), 1), (tiny.image(), 0)])
def test_a_conditions_values_are_read_once(base, pipe, image, checks):
    """Reading values waits for an accelerator. Of a PIL image they are known to be in range."""
    with Operations() as stock:
        generate(base, num_inference_steps=1, height=64, width=64)
    with Operations() as ours:
        generate(pipe, num_inference_steps=1, image=image)
    assert ours.counts["aminmax"] == checks
    assert ours.counts["_local_scalar_dense"] == stock.counts["_local_scalar_dense"]


def test_start_end_and_the_policy_are_passed_on(base, adapter, pipe):
    maps = tiny.condition()
    with attach(base, Control(adapter, maps, start=0.2, end=0.7, policy="per_branch")):
        expected = generate(base)
    interval = {"control_guidance_start": 0.2, "control_guidance_end": 0.7}
    assert torch.equal(generate(pipe, image=maps, policy="per_branch", **interval), expected)
    assert not torch.equal(generate(pipe, image=maps), expected)


def test_how_to_read_and_fit_a_map_is_passed_on(base, adapter, pipe):
    lines = np.full((128, 256), 255, np.uint8)
    lines[:, 90], lines[40] = 0, 0
    settings = {"kind": "lines", "resize_mode": "crop", "image_scales": [0.7]}
    with pytest.warns(UserWarning, match="inverted"):
        found = generate(pipe, image=lines, height=64, width=64, num_inference_steps=1, **settings)
    light = Image.fromarray(255 - lines)
    with attach(base, Control(adapter, light, invert=False, **settings)):
        assert torch.equal(generate(base, height=64, width=64, num_inference_steps=1), found)
    other = generate(pipe, image=lines, invert=False, height=64, width=64, num_inference_steps=1, **settings)
    assert not torch.equal(other, found)


def test_the_signature_is_the_stock_one_and_ours():
    shown = inspect.signature(StableDiffusionNexusPipeline.__call__).parameters
    stock = inspect.signature(StableDiffusionPipeline.__call__).parameters
    ours = [
        "image",
        "adapter_conditioning_scale",
        "control_guidance_start",
        "control_guidance_end",
        "policy",
        "kind",
        "resize_mode",
        "invert",
        "image_scales",
    ]
    names = list(stock)
    assert list(shown) == [*names[:-1], *ours, names[-1]]
    assert all(shown[name].default == stock[name].default for name in stock)
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)


def test_arguments_by_position(pipe):
    by_name = generate(pipe, image=tiny.image(), height=72, width=72, num_inference_steps=2)
    seed = tiny.generators(1)[0]
    by_position = pipe(
        "a red star",
        72,
        72,
        2,
        image=tiny.image(),
        generator=seed,
        output_type="pt",
        negative_prompt="blurry",
    )
    assert torch.equal(by_position.images, by_name)


def test_misspelled_arguments_are_refused(pipe):
    """The stock pipeline ignores them."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence_scale'"):
        generate(pipe, image=tiny.image(), guidence_scale=3)


def test_return_dict_false(pipe):
    images, flagged = pipe(
        "a red star", image=tiny.image(), return_dict=False, num_inference_steps=1, output_type="np"
    )
    assert images.shape == (1, 64, 64, 3)
    assert flagged is None


@pytest.mark.parametrize(
    ("condition", "given", "size"),
    [
        ((64, 64), {}, (64, 64)),
        ((75, 90), {}, (72, 88)),
        ((8, 200), {}, (8, 200)),
        ((64, 96), {"height": 128}, (128, 192)),
        ((64, 96), {"width": 48}, (32, 48)),
        ((64, 96), {"height": 32, "width": 48}, (32, 48)),
    ],
)
def test_the_size_follows_from_the_condition(condition, given, size):
    sides = {"height": None, "width": None} | given
    assert output_height_width(torch.zeros(1, 3, *condition), **sides, native=512, multiple=8) == size


def test_a_map_far_above_the_bases_own_size(base, adapter, pipe):
    """Also in a pipeline that `from_pipe` made, and the same as on the command line."""
    made = tiny.quiet(StableDiffusionNexusPipeline.from_pipe(base, adapter=adapter))
    for each in (pipe, made):
        with pytest.warns(UserWarning, match="image: 128x104 pixels .* 64, so the image is 72x56") as warned:
            found = generate(each, image=tiny.image(104, 128), num_inference_steps=1)
        assert found.shape == (1, 3, 56, 72)
        assert len(warned) == 1
        with pytest.warns(UserWarning, match="height and width: 128x104 pixels .* 64"):
            explicit = generate(
                each, image=tiny.image(104, 128), height=104, width=128, num_inference_steps=1
            )
        assert explicit.shape == (1, 3, 104, 128)


def test_the_image_has_the_conditions_size(pipe):
    assert generate(pipe, image=tiny.image(75, 90), num_inference_steps=1).shape == (1, 3, 72, 88)
    assert generate(pipe, image=tiny.image(64, 96), width=48, num_inference_steps=1).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("options", "name", "received"),
    [
        ({}, "image", MISSING),
        ({"image": "map.png"}, "image", "str"),
        ({"image": torch.zeros(1, 3, 7, 64)}, "image", "64x7"),
        ({"image": torch.zeros(1, 3, 64, 64) + 2}, "image", "2 to 2"),
        ({"height": 64, "width": 128}, "image", "64x64 pixels for an image of 128x64"),
        ({"adapter_conditioning_scale": float("nan")}, "adapter_conditioning_scale", "nan"),
        ({"adapter_conditioning_scale": [1, "2"]}, "adapter_conditioning_scale[1]", "'2'"),
        (
            {"control_guidance_start": 0.8, "control_guidance_end": 0.2},
            "control_guidance_start, control_guidance_end",
            "0.8, 0.2",
        ),
        ({"control_guidance_start": float("nan")}, "control_guidance_start", "nan"),
        ({"policy": "both"}, "policy", "both"),
        ({"kind": "edges"}, "kind", "edges"),
        ({"resize_mode": "fit"}, "resize_mode", "fit"),
        ({"image_scales": [1, "2"]}, "image_scales[1]", "'2'"),
        ({"image_scales": [1, 2]}, "image_scales", "2"),
        ({"image": tiny.condition(2)}, "image", "2"),
    ],
)
def test_bad_input_is_named(pipe, options, name, received):
    with refused(name, received):
        generate(pipe, **({"image": tiny.image()} if options else {}) | options)


def test_a_size_that_the_stock_pipeline_refuses(base, pipe):
    plain = generate(base, num_inference_steps=1)
    with pytest.raises(ValueError, match="divisible by 8 but are 65 and 65"):
        generate(pipe, image=tiny.image(), height=65, width=65)
    assert torch.equal(generate(base, num_inference_steps=1), plain)  # detached


def test_no_prompt_is_the_stock_pipelines_error(pipe):
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
        pipe(image=tiny.image(), num_inference_steps=1)


@pytest.mark.parametrize(
    ("conditions", "prompts", "images", "fits"),
    [
        (1, 3, 2, True),
        (3, 3, 2, True),
        (2, 4, 1, True),
        (6, 3, 2, True),
        (4, 1, 4, True),
        (2, 1, 4, True),
        (2, 1, 1, False),
        (2, 3, 2, False),  # would split the second prompt's images
        (3, 1, 4, False),
        (6, 3, 3, False),
        (4, 3, 4, False),
    ],
)
def test_conditions_against_prompts(conditions, prompts, images, fits):
    if fits:
        check_counts(conditions, prompts, images)
    else:
        with refused("image", conditions, expected=f"all {prompts} prompts with {images} images"):
            check_counts(conditions, prompts, images)


def test_prompts_with_several_images_each(pipe):
    maps = tiny.condition(2)
    prompts = ["a red star", "photo of a dog"]
    options = OPTIONS | {"negative_prompt": None}
    batch = pipe(prompts, image=maps, num_images_per_prompt=2, generator=tiny.generators(4), **options).images
    for index in range(4):
        seed = tiny.generators(1, first=index)
        single = pipe(prompts[index // 2], image=maps[index // 2][None], generator=seed, **options).images
        assert (batch[index] - single[0]).abs().max() < 1e-4


def test_prompt_embeds_in_place_of_a_prompt(pipe):
    positive, negative = pipe.encode_prompt("a red star", "cpu", 1, True, "blurry")
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "negative_prompt": None}
    found = generate(pipe, None, image=tiny.image(), **embeds)
    assert torch.equal(found, generate(pipe, image=tiny.image()))


def test_callback_on_step_end(pipe):
    steps = []

    def callback(called, step, timestep, kwargs):
        steps.append(step)
        called._interrupt = step == 1
        return {"latents": kwargs["latents"] * 0}

    generate(pipe, image=tiny.image(), callback_on_step_end=callback)
    assert steps == [0, 1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_deprecated_callback_still_works(pipe):
    steps = []
    generate(pipe, image=tiny.image(), callback=lambda i, t, latents: steps.append(i), callback_steps=1)
    assert steps == [0, 1, 2]


def test_an_adapter_that_does_not_fit_is_refused_when_put_together(base):
    wrong = tiny.adapter(base.unet, text_width=20)
    with refused("adapter", "20", expected="text_width 16"):
        StableDiffusionNexusPipeline(**base.components, adapter=wrong)


def test_a_further_control_can_be_attached(base, adapter, pipe):
    maps = tiny.condition(2)
    controls = [Control(adapter, maps[i : i + 1], 0.5) for i in range(2)]
    with attach(base, *controls):
        expected = generate(base)
    with attach(pipe, controls[1]):
        found = generate(pipe, image=maps[:1], adapter_conditioning_scale=0.5)
    assert torch.allclose(found, expected, atol=1e-4)


def assert_close(found, expected):
    """Weights mapped from a file lie at other addresses, for which a CPU sums in another order."""
    assert (found - expected).abs().max() < 1e-5


def test_from_pipe(base, adapter, pipe):
    made = tiny.quiet(StableDiffusionNexusPipeline.from_pipe(base, adapter=adapter))
    assert made.unet is base.unet
    assert made.adapter is adapter
    assert torch.equal(generate(made, image=tiny.image()), generate(pipe, image=tiny.image()))
    back = tiny.quiet(StableDiffusionPipeline.from_pipe(made))
    assert torch.equal(generate(back), generate(base))
    with pytest.raises(ValueError, match="adapter"):
        StableDiffusionNexusPipeline.from_pipe(base)


@pytest.mark.parametrize("made_from", ["pipe", "folder"])
def test_another_kind_of_base_is_refused_by_name(made_from, tmp_path):
    xl = tiny.sdxl()
    adapter = tiny.adapter(xl.unet)
    if made_from == "pipe":
        kind = "StableDiffusionXLPipeline"
        make = lambda: StableDiffusionNexusPipeline.from_pipe(xl, adapter=adapter)  # noqa: E731
    else:
        kind = "UNet2DConditionModel"
        xl.save_pretrained(tmp_path)
        make = lambda: StableDiffusionNexusPipeline.from_pretrained(tmp_path, adapter=adapter)  # noqa: E731
    with refused("unet", f"in a {kind}", expected="Stable Diffusion 1.x or 2.x", hint="attach()"):
        make()


def test_from_pipe_of_what_has_no_unet(adapter):
    without = tiny.sd15(unet=None)
    with refused("pipeline", "a StableDiffusionPipeline"):
        StableDiffusionNexusPipeline.from_pipe(without, adapter=adapter)


def test_an_image_by_position_is_refused(pipe):
    with refused("image", "positional", expected="keyword"):
        pipe("a red star", tiny.image())


def test_a_pipeline_on_the_hub(pipe, tmp_path, monkeypatch):
    """Saved with the adapter, and what the Hub's client fetches replaced by copies of the files."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    pipe.save_pretrained(hub)
    files = [file.relative_to(hub).as_posix() for file in hub.rglob("*") if file.is_file()]

    def fetch(_, filename, **__):
        (cache / filename).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(hub / filename, cache / filename)

    def fetch_all(_, allow_patterns, **__):
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                fetch(_, file)
        return str(cache)

    siblings = [SimpleNamespace(rfilename=file) for file in files]
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", fetch)
    monkeypatch.setattr(pipeline_utils, "snapshot_download", fetch_all)
    made = tiny.quiet(StableDiffusionNexusPipeline.from_pretrained("someone/pipe"))
    assert_close(generate(made, image=tiny.image()), generate(pipe, image=tiny.image()))


def test_from_pipe_keeps_the_bases_precision():
    base = tiny.sd15().to(dtype=torch.bfloat16)
    adapter = tiny.adapter(base.unet)
    made = StableDiffusionNexusPipeline.from_pipe(base, adapter=adapter)
    dtypes = {part.dtype for part in (made.unet, made.vae, made.text_encoder, adapter)}
    assert dtypes == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of newer diffusers, which call it dtype
        made = StableDiffusionNexusPipeline.from_pipe(base, adapter=adapter, torch_dtype=torch.float32)
    assert made.unet.dtype == adapter.dtype == torch.float32


def test_generations_that_take_turns_on_one_unet_do_not_mix(base, adapter):
    """As previews do, or the requests to a server: each follows its own map, or none."""
    first, second = (
        tiny.quiet(
            StableDiffusionNexusPipeline(
                **base.components | {"scheduler": deepcopy(base.scheduler)},
                adapter=adapter,
                requires_safety_checker=False,
            )
        )
        for _ in range(2)
    )
    stock = tiny.quiet(
        StableDiffusionPipeline(
            **base.components | {"scheduler": deepcopy(base.scheduler)}, requires_safety_checker=False
        )
    )
    maps = tiny.condition(2)
    expected = [generate(first, image=maps[:1]), generate(second, image=maps[1:]), generate(stock)]
    found = []

    def meanwhile(_pipe, step, _timestep, values):
        if step == 1:
            with ThreadPoolExecutor(1) as other:
                found.append(other.submit(generate, second, image=maps[1:]).result())
            found.append(generate(second, image=maps[1:]))
            found.append(generate(stock))
        return values

    outer = generate(first, image=maps[:1], callback_on_step_end=meanwhile)
    assert torch.equal(outer, expected[0])
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert not torch.equal(expected[0], expected[1])


def test_a_bases_folder_with_an_adapter(base, adapter, pipe, tmp_path):
    base.save_pretrained(tmp_path)
    made = tiny.quiet(StableDiffusionNexusPipeline.from_pretrained(tmp_path, adapter=adapter))
    assert_close(generate(made, image=tiny.image()), generate(pipe, image=tiny.image()))


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    made = tiny.quiet(StableDiffusionNexusPipeline.from_pretrained(tmp_path))
    assert_close(generate(made, image=tiny.image()), generate(pipe, image=tiny.image()))
    weights, mine = made.adapter.state_dict(), pipe.adapter.state_dict()
    assert list(weights) == list(mine)
    assert all(torch.equal(weights[name], mine[name]) for name in mine)


@pytest.mark.full
def test_saved_and_loaded_in_a_fresh_process(pipe, tmp_path):
    expected = generate(pipe, image=tiny.condition())
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(tiny.condition(), tmp_path / "condition.pt")
    code = f"""
import torch
import nexus_adapters
pipe = nexus_adapters.StableDiffusionNexusPipeline.from_pretrained({str(tmp_path / "pipe")!r})
torch.set_num_threads(1)
images = pipe(
    "a red star", image=torch.load({str(tmp_path / "condition.pt")!r}), num_inference_steps=3,
    generator=torch.Generator().manual_seed(0), output_type="pt", negative_prompt="blurry",
).images
torch.save((images, pipe.adapter.state_dict()), {str(tmp_path / "found.pt")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    images, weights = torch.load(tmp_path / "found.pt")
    assert_close(images, expected)
    mine = pipe.adapter.state_dict()
    assert list(weights) == list(mine)
    assert all(torch.equal(weights[name], mine[name]) for name in mine)


@pytest.mark.parametrize("load", [DiffusionPipeline, AutoPipelineForText2Image, "custom_pipeline"])
def test_a_saved_pipeline_is_loaded_by_diffusers_own_classes(pipe, tmp_path, load, monkeypatch):
    pipe.save_pretrained(tmp_path)
    if load == "custom_pipeline":
        monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
        options = {"custom_pipeline": "pipeline", "trust_remote_code": True}
        made = DiffusionPipeline.from_pretrained(tmp_path, **options)
    else:
        made = load.from_pretrained(tmp_path)
    assert type(made) is StableDiffusionNexusPipeline
    assert_close(generate(tiny.quiet(made), image=tiny.image()), generate(pipe, image=tiny.image()))


def test_the_pipelines_are_registered_in_diffusers_once(pipe):
    for _ in range(2):
        importlib.reload(nexus_adapters.pipelines)
        nexus_adapters._register_in_diffusers()
    assert diffusers.StableDiffusionNexusPipeline is StableDiffusionNexusPipeline
    named = [kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()]
    assert named.count("StableDiffusionNexusPipeline") == named.count("StableDiffusionXLNexusPipeline") == 1
    assert type(AutoPipelineForText2Image.from_pipe(pipe)) is StableDiffusionNexusPipeline


@pytest.mark.full
@pytest.mark.parametrize(
    ("first", "then", "is_light"),
    [
        ("import diffusers", "import nexus_adapters", True),
        ("from diffusers import DiffusionPipeline", "import nexus_adapters", True),
        ("from diffusers import AutoPipelineForText2Image", "import nexus_adapters", False),
        ("import nexus_adapters.pipelines", "import diffusers", False),
        ("from nexus_adapters import StableDiffusionNexusPipeline", "import diffusers", False),
    ],
)
def test_registered_in_a_fresh_process_whatever_comes_first(pipe, tmp_path, first, then, is_light):
    pipe.save_pretrained(tmp_path)
    code = f"""
import sys
{first}
{then}
if {is_light}:
    assert "nexus_adapters.pipelines" not in sys.modules
import diffusers
for name in sys.argv[1:]:
    print(type(getattr(diffusers, name).from_pretrained({str(tmp_path)!r})).__name__)
"""
    for kind in ("DiffusionPipeline", "AutoPipelineForText2Image"):
        command = [sys.executable, "-c", code, kind]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "StableDiffusionNexusPipeline"


def test_a_users_pipeline_file_is_kept(pipe, tmp_path):
    (tmp_path / "pipeline.py").write_text("mine = 1\n")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").read_text() == "mine = 1\n"


def test_the_packages_own_pipeline_file_is_replaced(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "pipeline.py"
    text = file.read_text()
    file.write_text(text.replace("StableDiffusionNexus", "StableDiffusionXLNexus"))
    pipe.save_pretrained(tmp_path)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "diffusion_pytorch_model.safetensors"),
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        ({"safe_serialization": False}, "diffusion_pytorch_model.safetensors"),
        ({"variant": "fp16", "safe_serialization": False}, "diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_the_adapter_is_always_saved_and_safely(pipe, tmp_path, options, name):
    is_unsafe = "safe_serialization" in options
    with pytest.warns(UserWarning, match="safetensors") if is_unsafe else nullcontext():
        pipe.save_pretrained(tmp_path, **options)
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"config.json", name}
    variant = {"variant": options["variant"]} if "variant" in options else {}
    made = StableDiffusionNexusPipeline.from_pretrained(tmp_path, **variant)
    mine = pipe.adapter.state_dict()
    assert all(torch.equal(weight, mine[key]) for key, weight in made.adapter.state_dict().items())


@pytest.mark.parametrize("missing", [("unet",), ("adapter",), ("unet", "vae", "scheduler", "adapter")])
def test_without_some_parts_it_encodes_prompts(base, adapter, missing, tmp_path):
    parts = base.components | {"adapter": adapter} | dict.fromkeys(missing)
    made = StableDiffusionNexusPipeline(**parts, requires_safety_checker=False)
    found, _ = made.encode_prompt("a red star", "cpu", 1, False)
    assert torch.equal(found, base.encode_prompt("a red star", "cpu", 1, False)[0])
    with refused(missing[0], MISSING):
        made("a red star", image=tiny.image())
    made.unet, made.adapter, made.vae, made.scheduler = base.unet, adapter, base.vae, base.scheduler
    assert generate(tiny.quiet(made), image=tiny.image(), num_inference_steps=1).shape == (1, 3, 64, 64)


def test_names_survive_moves_of_files(pipe):
    assert StableDiffusionNexusPipeline.__module__ == "nexus_adapters"
    assert nexus_adapters.StableDiffusionNexusPipeline is StableDiffusionNexusPipeline
    assert pipe.config["adapter"] == ("nexus_adapters", "NexusAdapter")
    assert pipe.model_cpu_offload_seq == "text_encoder->image_encoder->adapter->unet->vae"
    assert set(pipe.model_cpu_offload_seq.split("->")) >= set(
        StableDiffusionPipeline.model_cpu_offload_seq.split("->")
    )


@pytest.mark.parametrize(
    ("given", "meant"), [("scale", "adapter_conditioning_scale"), ("start", "control_guidance_start")]
)
def test_a_setting_of_a_control_is_refused_with_the_pipelines_own_name(pipe, given, meant):
    with pytest.raises(TypeError, match=f"'{given}'.*'{meant}'"):
        pipe("a", image=tiny.image(64, 64), **{given: 0.5})
