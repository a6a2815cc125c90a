import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.refusals import refused

from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.data.batch import Entry, SampleDraws, as_batch, encode
from nexus_adapters.data.conditioned import FittedSample


def fitted(seed=0, captions=("a red star",), size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return FittedSample(f"{seed}", image, Image.fromarray(255 - pixels), captions, (100, 80), (3, 5))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def encoders(request):
    return encoding(getattr(tiny, request.param)(unet=None))


def encoding(pipe):
    """A base that only encodes: as in training, its pipeline has no UNet."""
    return UNetBase({}, pipe.vae.config, pipe.scheduler, pipe)


def close(a, b, atol):
    return torch.allclose(a.float(), b.float(), atol=atol)


def test_samples_of_several_sizes_and_captions(encoders):
    samples = [fitted(0), fitted(1, ("a cat", "a dog", ""), (128, 64)), fitted(2)]
    entries = encode(samples, encoders)
    assert [tuple(entry.mean.shape) for entry in entries] == [(4, 8, 8), (4, 8, 16), (4, 8, 8)]
    assert [len(entry.prompts["prompt_embeds"]) for entry in entries] == [1, 3, 1]
    for sample, entry in zip(samples, entries, strict=True):
        (alone,) = encode([sample], encoders)
        assert close(entry.mean, alone.mean, 1e-5)
        assert close(entry.prompts["prompt_embeds"], alone.prompts["prompt_embeds"], 1e-5)
        assert np.array_equal(entry.condition.permute(1, 2, 0).numpy(), np.asarray(sample.condition))
        assert entry.time_ids.tolist() == [100, 80, 3, 5, sample.image.height, sample.image.width]


def test_latents_are_those_of_the_pipeline(encoders):
    """Scaled mode and deviation, by hand."""
    sample = fitted(4)
    (entry,) = encode([sample], encoders)
    vae = encoders.pipe.vae
    pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    assert close(entry.mean, expected.mode()[0] * vae.config.scaling_factor, 1e-6)
    assert close(entry.std, expected.std[0] * vae.config.scaling_factor, 1e-6)


def test_a_cache_rounds_to_half_precision_and_loses_nothing_else(encoders):
    (entry,) = encode([fitted(5, ("a cat", "a dog"))], encoders)
    again = Entry.from_tensors(entry.as_tensors())
    assert torch.equal(again.condition, entry.condition)
    assert torch.equal(again.time_ids, entry.time_ids)
    assert again.prompts.keys() == entry.prompts.keys()
    assert torch.equal(again.mean, entry.mean.half().float())
    assert close(again.prompts["prompt_embeds"].float(), entry.prompts["prompt_embeds"], 2e-3)
    empty = encoders.encode_empty_prompt()
    batch = as_batch([0], [again], [draws(caption=0.9)], empty, prompt_dropout=0.0, condition_dropout=0.0)
    assert torch.equal(batch.prompt_embeds[0], again.prompts["prompt_embeds"][1].float())


def test_a_cache_keeps_whatever_a_base_reads_of_a_prompt():
    prompts = {
        name: torch.rand(2, 3) for name in ("prompt_embeds", "pooled_projections", "of_a_third_encoder")
    }
    one, lengths = torch.ones(1, 1, 1), torch.tensor([5, 0])
    entry = Entry(one, one, torch.zeros(3, 8, 8).byte(), prompts, torch.zeros(6), lengths)
    again = Entry.from_tensors(entry.as_tensors())
    assert again.prompts.keys() == prompts.keys()
    assert torch.equal(again.caption_lengths, lengths)
    assert all(torch.equal(again.prompts[name], tensor.half()) for name, tensor in prompts.items())


def test_what_half_precision_does_not_hold_is_refused():
    large, lengths = torch.full((1, 1, 1), 1e6), torch.tensor([5])
    entry = Entry(large, torch.ones(1, 1, 1), torch.zeros(3, 8, 8).byte(), {}, torch.zeros(6), lengths)
    with refused("cache.enabled", "in mean", expected="float16", hint="false"):
        entry.as_tensors()


def test_no_prompt_is_what_the_pipeline_takes_for_it(encoders):
    empty = encoders.encode_empty_prompt()
    if "text_embeds" in empty:  # SDXL's config says zeros
        assert all(not tensor.any() for tensor in empty.values())
    else:
        assert torch.equal(empty["prompt_embeds"], encoders.encode_prompts([""])["prompt_embeds"])


def draws(**changes):
    given = {"timestep": 0.5, "caption": 0.0, "prompt_dropout": 0.5, "condition_dropout": 0.5} | changes
    generator = torch.Generator().manual_seed(0)
    noise, latent_noise = torch.randn(2, 4, 8, 8, generator=generator)
    return SampleDraws(noise, latent_noise, **given)


def test_a_batch_follows_its_draws(encoders):
    (entry,) = encode([fitted(6, ("a cat", "a dog", "a ring"))], encoders)
    empty = encoders.encode_empty_prompt()
    drawn = [draws(caption=0.4), draws(prompt_dropout=0.09), draws(condition_dropout=0.19, caption=0.99)]
    batch = as_batch([7, 8, 9], [entry] * 3, drawn, empty, prompt_dropout=0.1, condition_dropout=0.2)
    texts = entry.prompts["prompt_embeds"]
    assert torch.equal(batch.prompt_embeds[0], texts[1])
    assert torch.equal(batch.prompt_embeds[1], empty["prompt_embeds"][0])
    assert torch.equal(batch.prompt_embeds[2], texts[2])
    assert batch.has_condition.tolist() == [True, True, False]
    assert batch.indices.tolist() == [7, 8, 9]
    assert torch.equal(batch.latents[0], entry.mean + entry.std * drawn[0].latent_noise)
    assert torch.equal(batch.noise[1], drawn[1].noise)
    assert batch.u.tolist() == [0.5] * 3
    assert torch.equal(batch.condition[0] * 255, entry.condition.float())
    assert set(batch.added) == ({"text_embeds", "time_ids"} if "text_embeds" in empty else set())


def test_other_weights_or_words_have_another_hash():
    def made(**changes):
        return encoding(tiny.sd15(unet=None, **changes)).content_hash()

    changed = tiny.text_encoder()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1
    assert made() == made()
    assert len({made(), made(text_encoder=changed)}) == 2
