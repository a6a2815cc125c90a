"""What the embedded base and its adapters train on: scenes as latents, token ids and canny maps, in files."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from nexus_adapters.conditions import extract
from nexus_adapters.scenes.caption import caption
from nexus_adapters.scenes.render import render
from nexus_adapters.scenes.scene import SIZE, draw_scene

SHARD = 2000  # scenes a file
PHRASINGS = 3  # captions a scene
_BATCH = 50
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nexus-adapters"


def train_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding, trained on captions: one token a word, letters for every other word."""
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
    corpus = (caption(draw_scene(seed), phrasing) for seed in range(2000) for phrasing in range(PHRASINGS))
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
    """As the stock pipelines do: 77 ids, cut or padded with the end token."""
    encoded = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return encoded.input_ids


@dataclass(frozen=True)
class SceneCache:
    """`latents`: scaled to unit variance. `tokens`: ids of each scene's captions. `canny`: packed bits."""

    latents: Float[Tensor, "n c h w"]
    tokens: Int[Tensor, "n phrasings 77"]
    canny: Int[Tensor, "n bytes"]

    def __len__(self) -> int:
        return len(self.latents)

    def condition(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 3 128 128"]:
        """The canny maps of these scenes, in [0, 1], as three equal channels."""
        bits = np.unpackbits(self.canny[indices].numpy(), axis=1).reshape(-1, 1, SIZE, SIZE)
        return torch.from_numpy(bits).float().expand(-1, 3, -1, -1)


def load_scenes(vae_dir: Path, tokenizer: CLIPTokenizer, count: int, cache: Path) -> SceneCache:
    """The first `count` training scenes; shards that are missing in `cache` are made first."""
    weights = vae_dir / "diffusion_pytorch_model.safetensors"
    # Latents of another autoencoder would train a UNet for nothing: the weights name the folder.
    folder = cache / f"scenes-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_dir).eval()
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


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, tokenizer: CLIPTokenizer, first: int) -> dict[str, Tensor]:
    """One shard: the scenes from seed `first` on."""
    latents, tokens, canny = [], [], []
    for start in range(first, first + SHARD, _BATCH):
        scenes = [draw_scene(seed) for seed in range(start, start + _BATCH)]
        images = [render(scene).image for scene in scenes]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(pixels).latent_dist.mean.float() * vae.config.scaling_factor
        latents.append(encoded.half().contiguous())
        prompts = [caption(scene, phrasing) for scene in scenes for phrasing in range(PHRASINGS)]
        tokens.append(token_ids(tokenizer, prompts).view(_BATCH, PHRASINGS, 77).short())
        maps = [np.asarray(extract("canny", Image.fromarray(image)))[..., 0] > 0 for image in images]
        canny.append(torch.from_numpy(np.packbits(np.stack(maps).reshape(_BATCH, -1), axis=1)))
    return {"latents": torch.cat(latents), "tokens": torch.cat(tokens), "canny": torch.cat(canny)}
