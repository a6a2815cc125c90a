"""The input of a training step on one device: latents, structure maps, prompts and random numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from nexus_adapters.bases.base import Base
from nexus_adapters.data.conditioned import FittedSample
from nexus_adapters.data.inspection import caption_lengths
from nexus_adapters.errors import InvalidArgument


@dataclass(frozen=True)
class SampleDraws:
    """The random numbers of one sample in one step. Uniform ones are in [0, 1).

    Attributes:
        noise: standard normal, with the shape of the latents: the noise added to them.
        latent_noise: standard normal; samples the latents from their mean and standard deviation.
        timestep: uniform; selects the timestep, through `loss.timesteps`.
        caption: uniform; selects one of the sample's captions.
        prompt_dropout: uniform; the prompt is empty if this is below the dropout fraction.
        condition_dropout: uniform; the features are dropped if this is below the dropout fraction.
    """

    noise: Float[Tensor, "c h w"]
    latent_noise: Float[Tensor, "c h w"]
    timestep: float
    caption: float
    prompt_dropout: float
    condition_dropout: float


def draw_for_sample(seed: int, step: int, place: int, latent_shape: Sequence[int]) -> SampleDraws:
    """Draw the random numbers of the sample at `place` in the global batch.

    They do not depend on the number of processes. They are drawn on the CPU, so they are the same on every
    device.
    """
    mixed = np.random.SeedSequence((seed, step, place, 1)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed) >> 1)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    noise, latent_noise = torch.randn((2, *latent_shape), generator=generator)
    return SampleDraws(noise, latent_noise, *uniform)


@dataclass(frozen=True)
class Batch:
    """Samples with the same shape, on one device.

    Attributes:
        indices: indices of the samples in the dataset.
        latents: latents, scaled to unit variance.
        noise: standard normal noise.
        u: uniform random numbers in [0, 1), from which timesteps are computed.
        condition: structure maps in [0, 1].
        has_condition: False for samples whose features are dropped.
        prompt_embeds: embeddings of one caption per sample, or of the empty prompt if it is dropped.
        added: additional inputs of the base's denoiser, such as SDXL's `text_embeds` and `time_ids`; empty
            for SD 1.x.
    """

    indices: Int[Tensor, " b"]
    latents: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    u: Float[Tensor, " b"]
    condition: Float[Tensor, "b 3 y x"]
    has_condition: Bool[Tensor, " b"]
    prompt_embeds: Float[Tensor, "b n d"]
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "added"}
        return Batch(**moved, added={name: tensor.to(device) for name, tensor in self.added.items()})


@dataclass(frozen=True)
class Entry:
    """One encoded sample.

    Attributes:
        mean: mean of its latents, scaled to unit variance.
        std: standard deviation of its latents.
        condition: its structure map.
        prompts: what `Base.encode_prompts` returns for its k captions, with k rows each: `prompt_embeds`
            (k, n, d), and for SDXL `text_embeds` (k, p); float16 if read from a cache.
        time_ids: SDXL's size conditioning: original height and width, top and left of the crop, height and
            width.
        caption_lengths: lengths of the k captions in tokens, from `inspection.caption_lengths`.
    """

    mean: Float[Tensor, "c h w"]
    std: Float[Tensor, "c h w"]
    condition: UInt8[Tensor, "3 y x"]
    prompts: Mapping[str, Tensor]
    time_ids: Float[Tensor, " 6"]
    caption_lengths: Int[Tensor, " k"]

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the tensors for a cache: float16 encodings, and the map as the bytes of a PNG file."""
        stream = io.BytesIO()
        Image.fromarray(self.condition.permute(1, 2, 0).numpy()).save(stream, format="PNG")
        halved = {"mean": self.mean.half(), "std": self.std.half()}
        halved |= {name: tensor.half() for name, tensor in self.prompts.items()}
        for name, tensor in halved.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidArgument(
                    "cache.enabled",
                    "encodings that float16 can hold",
                    f"values in {name} that are too large or not finite",
                    "Set it to false",
                )
        png = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
        whole = {"time_ids": self.time_ids, CAPTION_LENGTHS: self.caption_lengths}
        return {**halved, "condition": png, **whole}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Entry:
        """Return the entry that `as_tensors` was called on, except for rounding to float16."""
        with Image.open(io.BytesIO(tensors["condition"].numpy().tobytes()), formats=("PNG",)) as png:
            condition = torch.from_numpy(np.array(png)).permute(2, 0, 1).contiguous()
        prompts = {name: tensor for name, tensor in tensors.items() if name not in _OTHER_TENSORS}
        return cls(
            tensors["mean"].float(),
            tensors["std"].float(),
            condition,
            prompts,
            tensors["time_ids"],
            tensors[CAPTION_LENGTHS],
        )


CAPTION_LENGTHS = "caption_lengths"
_OTHER_TENSORS = ("mean", "std", "condition", "time_ids", CAPTION_LENGTHS)  # all others are of the prompts


def encode(samples: Sequence[FittedSample], base: Base) -> list[Entry]:
    """Encode samples. Their images may differ in size; those with the same size are encoded together."""
    latents = _encode_images([sample.image for sample in samples], base)
    captions = [caption for sample in samples for caption in sample.captions]
    prompts = base.encode_prompts(captions)
    lengths = torch.tensor(caption_lengths(captions, getattr(base.pipe, "tokenizer", None)))
    entries, first = [], 0
    for sample, (mean, std) in zip(samples, latents, strict=True):
        rows = slice(first, first + len(sample.captions))
        first = rows.stop
        own = {name: tensor[rows].cpu() for name, tensor in prompts.items()}
        condition = torch.from_numpy(np.array(sample.condition)).permute(2, 0, 1).contiguous()
        time_ids = torch.tensor(sample.time_ids)
        entries.append(Entry(mean.cpu(), std.cpu(), condition, own, time_ids, lengths[rows]))
    return entries


def _encode_images(images: Sequence[Image.Image], base: Base) -> list[tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for size in dict.fromkeys(image.size for image in images):
        places = [place for place, image in enumerate(images) if image.size == size]
        pixels = torch.from_numpy(np.stack([np.asarray(images[place]) for place in places]))
        encoded = base.encode_images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        found |= dict(zip(places, zip(*encoded, strict=True), strict=True))
    return [found[place] for place in range(len(images))]


def as_batch(
    indices: Sequence[int],
    entries: Sequence[Entry],
    draws: Sequence[SampleDraws],
    empty: Mapping[str, Tensor],
    prompt_dropout: float,
    condition_dropout: float,
) -> Batch:
    """Return a batch of the entries with their random numbers applied.

    `empty` is what `Base.encode_empty_prompt` returns.
    """
    rows = [_prompt(entry, drawn, empty, prompt_dropout) for entry, drawn in zip(entries, draws, strict=True)]
    text = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    prompt_embeds = text.pop("prompt_embeds")
    return Batch(
        indices=torch.tensor(list(indices)),
        latents=torch.stack([e.mean + e.std * d.latent_noise for e, d in zip(entries, draws, strict=True)]),
        noise=torch.stack([drawn.noise for drawn in draws]),
        u=torch.tensor([drawn.timestep for drawn in draws], dtype=torch.float64),
        condition=torch.stack([entry.condition for entry in entries]).float() / 255,
        has_condition=torch.tensor([drawn.condition_dropout >= condition_dropout for drawn in draws]),
        prompt_embeds=prompt_embeds,
        added={**text, "time_ids": torch.stack([e.time_ids for e in entries])} if text else {},
    )


def _prompt(
    entry: Entry, drawn: SampleDraws, empty: Mapping[str, Tensor], dropout: float
) -> dict[str, Tensor]:
    if drawn.prompt_dropout < dropout:
        return {name: tensor[0] for name, tensor in empty.items()}
    count = len(entry.prompts["prompt_embeds"])
    return {name: tensor[int(drawn.caption * count)].float() for name, tensor in entry.prompts.items()}
