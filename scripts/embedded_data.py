"""The training data of the embedded base: scenes as latents and token ids, in files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import draw_scene
from nexus_adapters.training.checkpoint import TrainState
from nexus_adapters.training.config import CheckpointOptions, LogOptions, TrainingOptions
from nexus_adapters.training.loop import train
from nexus_adapters.training.optimizer import build_optimizer
from nexus_adapters.training.precision import autocast

Loss = Callable[[int], Tensor]  # finished steps -> the loss of the next one
SHARD = 2000  # scenes per file
ENCODE_BATCH = 50  # scenes encoded at a time; divides SHARD
CORPUS = 2000  # scenes whose captions the tokenizer is trained on
PHRASINGS = 3  # captions per scene
PROMPT_DROPOUT = 0.1  # guidance and the negative branch under `per_branch` read the empty prompt
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nexus-adapters"


def training_parser(
    description: str | None, out: str, steps: int, batch_size: int, learning_rate: float
) -> argparse.ArgumentParser:
    """Return a parser with the options that all trainings share; `out` is a folder in the cache."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_CACHE / out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE, help=f"cpu, cuda, ... (default here: {DEVICE})")
    return parser


def add_scene_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of trainings that read cached scenes."""
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--vae", type=Path, default=DEFAULT_CACHE / "autoencoder" / "vae")
    parser.add_argument("--scenes", type=int, default=24_000)


def scene_identity(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> dict[str, object]:
    """Return the identity, for `train`, of a run that reads cached scenes."""
    return {
        "scenes": scenes_hash(args.vae, tokenizer),
        "count": args.scenes,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }


def run_training(
    module: nn.Module,
    loss_of_step: Loss,
    training: TrainingOptions,
    out: Path,
    name: str,
    identity: Mapping[str, object],
) -> None:
    """Train in this process only, on the module's device."""
    is_cpu = next(module.parameters()).device.type == "cpu"
    train(
        TrainState.of(module, build_optimizer(training, module)),
        lambda step: (loss_of_step(step),),
        training,
        CheckpointOptions(every_steps=200),
        LogOptions(),
        out,
        name,
        identity,
        Accelerator(cpu=is_cpu, mixed_precision="no"),
    )


def train_tokenizer() -> CLIPTokenizer:
    """Train CLIP's byte-pair encoding on captions: one token per known word, letters for all others."""
    blank = CLIPTokenizer()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = blank.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # far more than the captions have: every word becomes one token
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    corpus = (caption(draw_scene(seed), phrasing) for seed in range(CORPUS) for phrasing in range(PHRASINGS))
    tokenizer.train_from_iterator(corpus, trainer)
    return _as_clip(tokenizer, alphabet)


def _as_clip(trained: Tokenizer, alphabet: list[str]) -> CLIPTokenizer:
    """The trained merges in CLIP's vocabulary order: bytes, bytes that end a word, merges, specials."""
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += [w for w in dict.fromkeys("".join(pair) for pair in merges) if w not in set(words)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Int[Tensor, "b 77"]:
    """Tokenize as the stock pipelines do: 77 ids, truncated or padded with the end token."""
    encoded = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return encoded.input_ids


@dataclass(frozen=True)
class SceneCache:
    """Cached scenes: `latents` are scaled to unit variance; `tokens` are the ids of each scene's captions."""

    latents: Float[Tensor, "n c h w"]
    tokens: Int[Tensor, "n phrasings 77"]

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class Batch:
    """The input of a training step on its device. `tokens` are those of one caption each, or of no prompt."""

    tokens: Int[Tensor, "b 77"]
    latents: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]


def draw_batch(
    scenes: SceneCache, empty: Int[Tensor, "1 77"], batch_size: int, generator: torch.Generator, device: str
) -> Batch:
    """Sample scenes, phrasings, dropped prompts and noise. `empty` are the ids of the empty prompt.

    They are sampled on the CPU, so that they are the same on every device.
    """
    indices = torch.randint(len(scenes), (batch_size,), generator=generator)
    phrasing = torch.randint(PHRASINGS, (batch_size,), generator=generator)
    dropped = torch.rand(batch_size, 1, generator=generator) < PROMPT_DROPOUT
    tokens = torch.where(dropped, empty, scenes.tokens[indices, phrasing].long())
    latents = scenes.latents[indices].float()
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(tokens.to(device), latents.to(device), noise.to(device))


def load_scenes(vae_dir: Path, tokenizer: CLIPTokenizer, count: int, cache: Path, device: str) -> SceneCache:
    """Load the first `count` training scenes. Shards that are missing in `cache` are made first."""
    folder = cache / f"scenes-{scenes_hash(vae_dir, tokenizer)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_dir).eval().to(device)
    shards = []
    for first in tqdm(range(0, count, SHARD), desc="scenes", unit="shard"):
        path = folder / f"{first:07d}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(encode_scenes(vae, tokenizer, first), partial)
            os.replace(partial, path)
        shards.append(load_file(path))
    joined = {key: torch.cat([shard[key] for shard in shards])[:count] for key in shards[0]}
    return SceneCache(**joined)


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 of names and contents of all files inside `folder`."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def scenes_hash(vae_dir: Path, tokenizer: CLIPTokenizer) -> str:
    """Return the SHA-256 of the autoencoder and of the images and ids of a few scenes.

    It identifies what the shards were made from, so that a UNet is not trained on wrong latents or tokens.
    """
    digest = hashlib.sha256((vae_dir / "diffusion_pytorch_model.safetensors").read_bytes())
    for seed in range(8):
        scene = draw_scene(seed)
        digest.update(render(scene).image.tobytes())
        digest.update(token_ids(tokenizer, [caption(scene, p) for p in range(PHRASINGS)]).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, tokenizer: CLIPTokenizer, first: int) -> dict[str, Tensor]:
    """Encode one shard: the scenes starting at seed `first`."""
    latents, tokens = [], []
    for start in range(first, first + SHARD, ENCODE_BATCH):
        scenes = [draw_scene(seed) for seed in range(start, start + ENCODE_BATCH)]
        images = [render(scene).image for scene in scenes]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(vae.device.type):
            encoded = vae.encode(pixels.to(vae.device)).latent_dist.mean.float() * vae.config.scaling_factor
        latents.append(encoded.half().cpu().contiguous())
        prompts = [caption(scene, phrasing) for scene in scenes for phrasing in range(PHRASINGS)]
        tokens.append(token_ids(tokenizer, prompts).view(ENCODE_BATCH, PHRASINGS, 77).short())
    return {"latents": torch.cat(latents), "tokens": torch.cat(tokens)}
