"""What the embedded weights can do, on few scenes: whether they are whole and loaded as they were trained."""

import numpy as np
import pytest

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.embedded.held_out import load_test_scenes, score_images
from nexus_adapters.evaluation.generation import Sampling, generate, reconstruct
from nexus_adapters.methods import GenerationSettings
from nexus_adapters.metrics.structure import psnr_db

ADAPTERS = BUNDLED["embedded"].adapters


def test_the_autoencoder_keeps_what_is_scored():
    scenes = load_test_scenes(8)
    images = reconstruct(load_base().vae, scenes)
    psnr = [psnr_db(image, scene.rendering.image) for image, scene in zip(images, scenes, strict=True)]
    scores = {name: values.mean() for name, values in score_images(images, scenes).items()}
    assert np.mean(psnr) >= 28
    assert min(scores["binding_color"], scores["binding_material"], scores["background"]) >= 0.95
    assert scores["edge_f1"] >= 0.85


@pytest.mark.full
@pytest.mark.parametrize(
    ("condition", "scenes", "steps", "least"),
    [
        ("canny", 24, 10, 0.1),
        ("sketch", 24, 10, 0.05),
        ("segmentation", 24, 10, 0.1),
        ("depth", 24, 10, 0.02),
    ],
)
def test_prime_reads_the_prompt(condition, scenes, steps, least):
    """The base's prompt unchanged, the adapter given another scene's: fewer objects have their color."""
    samples = load_test_scenes(scenes, condition_name=condition)
    base = load_base()
    adapter = load_adapter("prime", condition)
    others = [scene.prompt for scene in samples[1:] + samples[:1]]
    own, swapped = (
        score_images(
            generate(
                base, adapter, samples, Sampling(steps=steps), GenerationSettings(adapter_prompts=prompts)
            ),
            samples,
        )
        for prompts in (None, others)
    )
    assert own["binding_color"].mean() > swapped["binding_color"].mean() + least


@pytest.mark.parametrize("condition", ADAPTERS)
def test_a_name_is_its_configuration_and_the_residual_form_has_eight_heads(condition):
    for name in ADAPTERS[condition]:
        if name == "t2i":
            continue
        adapter = load_adapter(name, condition)
        assert adapter.variant == name
        if name in ("prime", "slim"):
            config = adapter.config
            assert (config.residual, config.heads, config.head_width) == (True, 8, 8)
