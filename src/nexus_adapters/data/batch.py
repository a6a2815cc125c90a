"""What a training step reads on one device: latents, structure maps, prompts, and random numbers."""

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
    """The random numbers of one sample in one step. The uniform ones lie in [0, 1).

    Attributes:
        noise: standard normal, of the latents' shape: what is added to them.
        latent_noise: standard normal: samples the latents from their mean and standard deviation.
        timestep: uniform; where in the schedule, through `loss.timesteps`.
        caption: uniform; which of the sample's captions.
        prompt_dropout: uniform; below the dropout's fraction, the prompt is empty.
        condition_dropout: uniform; below the dropout's fraction, there are no features.
    """

    noise: Float[Tensor, "c h w"]
    latent_noise: Float[Tensor, "c h w"]
    timestep: float
    caption: float
    prompt_dropout: float
    condition_dropout: float


def draw_for_sample(seed: int, step: int, place: int, latent_shape: Sequence[int]) -> SampleDraws:
    """Draw the numbers of the sample at `place` of the global batch, however many processes share it.

    They are drawn on the CPU, so that every device trains on the same ones.
    """
    mixed = np.random.SeedSequence((seed, step, place, 1)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed) >> 1)
    uniform = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    noise, latent_noise = torch.randn((2, *latent_shape), generator=generator)
    return SampleDraws(noise, latent_noise, *uniform)


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, on one device.

    Attributes:
        indices: of the samples in the dataset.
        latents: scaled to unit variance.
        noise: standard normal.
        u: uniform in [0, 1), what timesteps are made of.
        condition: structure maps in [0, 1].
        has_condition: False where the features are dropped.
        prompt_embeds: of a caption each, or of the empty prompt where it is dropped.
        added: what else the base's denoiser reads: SDXL's `text_embeds` and `time_ids`; empty for SD 1.x.
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
        """The same on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "added"}
        return Batch(**moved, added={name: tensor.to(device) for name, tensor in self.added.items()})


@dataclass(frozen=True)
class Entry:
    """One sample, encoded.

    Attributes:
        mean: of its latents, scaled to unit variance.
        std: of its latents.
        condition: its structure map.
        prompts: what `Base.encode_prompts` gives for its k captions, k rows each: `prompt_embeds` (k, n, d),
            and for SDXL `text_embeds` (k, p); from a cache in float16, since only one of k is read.
        time_ids: SDXL's size conditioning: original height and width, top and left of the crop, height and
            width.
        caption_lengths: of the k captions, in tokens, from `inspection.caption_lengths`.
    """

    mean: Float[Tensor, "c h w"]
    std: Float[Tensor, "c h w"]
    condition: UInt8[Tensor, "3 y x"]
    prompts: Mapping[str, Tensor]
    time_ids: Float[Tensor, " 6"]
    caption_lengths: Int[Tensor, " k"]

    def as_tensors(self) -> dict[str, Tensor]:
        """For a cache: encodings in float16, and the map as the bytes of a PNG, which loses nothing."""
        stream = io.BytesIO()
        Image.fromarray(self.condition.permute(1, 2, 0).numpy()).save(stream, format="PNG")
        halved = {"mean": self.mean.half(), "std": self.std.half()}
        halved |= {name: tensor.half() for name, tensor in self.prompts.items()}
        for name, tensor in halved.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidArgument(
                    "cache.enabled",
                    "encodings that float16 can hold",
                    f"larger values, or values that are not finite, in {name}",
                    "Set it to false",
                )
        png = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
        whole = {"time_ids": self.time_ids, CAPTION_LENGTHS: self.caption_lengths}
        return {**halved, "condition": png, **whole}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Entry:
        """The inverse of `as_tensors`, but for what float16 has rounded."""
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
    """The entries of samples, whose images may differ in size; those of one size are encoded at once."""
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
    """The entries with their random numbers applied. `empty`: as `Base.encode_empty_prompt` gives it."""
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
