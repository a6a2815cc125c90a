"""Train a small CLIP on scenes, which judges how well images of the embedded world fit their prompts.

    python scripts/train_clip.py

The training is contrastive as for CLIP (Radford et al. 2021), on scenes of the training split that are
generated on demand. Among other scenes' captions, the background alone nearly identifies the correct one. So
each image must also distinguish its caption from one in which two objects have swapped their colors or
materials (Yuksekgonul et al. 2023). The text encoder starts from that of the embedded base. The same command
resumes an interrupted run. It writes a `CLIPModel` with processor and tokenizer, and its retrieval accuracy
on unseen scenes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from embedded_data import Loss, run_training, token_ids, training_parser
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import SIZE, Scene, Split, draw_scene
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.precision import autocast

VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
PATCH = 16
PROJECTION = 64
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TEST_SCENES = 500


def build_clip(device: str = "cpu") -> tuple[CLIPModel, CLIPTokenizer]:
    """Return the untrained model, with the text encoder of the embedded base."""
    text = CLIPTextModel.from_pretrained(BUNDLED["embedded"].folder / "text_encoder")
    text_config = text.config.to_dict()
    text_config.pop("_name_or_path")  # a local path
    config = CLIPConfig(
        text_config=text_config,
        vision_config=VISION | {"image_size": SIZE, "patch_size": PATCH},
        projection_dim=PROJECTION,
    )
    model = CLIPModel(config)
    model.text_model.load_state_dict(text.state_dict(), strict=False)
    return model.to(device), CLIPTokenizer.from_pretrained(BUNDLED["embedded"].folder / "tokenizer")


def exchanged(scene: Scene, rng: Random) -> Scene | None:
    """Return the scene with colors or materials of two objects swapped; None if that changes nothing."""
    first, second = rng.sample(range(len(scene.objects)), 2)
    objects = list(scene.objects)
    a, b = objects[first], objects[second]
    differs = [name for name in ("color", "material") if getattr(a, name) != getattr(b, name)]
    if not differs:
        return None
    name = rng.choice(differs)
    objects[first] = replace(a, **{name: getattr(b, name)})
    objects[second] = replace(b, **{name: getattr(a, name)})
    return replace(scene, objects=tuple(objects))


def draw_batch(
    seeds: list[int], split: Split, tokenizer: CLIPTokenizer, phrasing: int
) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b 77"], Int[Tensor, "b 77"]]:
    """Return images, their captions, and captions that are almost correct (or correct if there are none)."""
    pixels, right, nearly = [], [], []
    for seed in seeds:
        scene = draw_scene(seed, split)
        pixels.append(render(scene).image)
        right.append(caption(scene, phrasing))
        other = exchanged(scene, Random(f"exchange {seed} {phrasing}"))
        nearly.append(right[-1] if other is None else caption(other, phrasing))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return normalised, token_ids(tokenizer, right), token_ids(tokenizer, nearly)


def embed(
    model: CLIPModel, images: Tensor, tokens: Tensor, eos: int
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "n d"]]:
    """Return embeddings of length 1."""
    length = int((tokens != eos).sum(1).max()) + 1  # without columns that are padding in every row
    image = model.get_image_features(pixel_values=images).pooler_output
    text = model.get_text_features(input_ids=tokens[:, :length]).pooler_output
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def build_loss(model: CLIPModel, tokenizer: CLIPTokenizer, batch_size: int, seed: int, device: str) -> Loss:
    """Return step -> mean of image-to-text (with almost correct captions) and text-to-image cross-entropy."""
    eos = int(tokenizer.eos_token_id)

    def loss_of_step(step: int) -> Tensor:
        first = (seed * 1_000_003 + step) * batch_size
        batch = draw_batch(list(range(first, first + batch_size)), "train", tokenizer, step % 3)
        images, right, nearly = (part.to(device) for part in batch)
        with autocast(device):
            image, text = embed(model, images, torch.cat([right, nearly]), eos)
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * image.float() @ text.float().T
        of_others, of_exchanged = logits[:, :batch_size], logits[:, batch_size:].diagonal()
        same = (right == nearly).all(1)
        hard = of_exchanged.masked_fill(same, -torch.inf)[:, None]
        labels = torch.arange(batch_size, device=device)
        to_text = F.cross_entropy(torch.cat([of_others, hard], dim=1), labels)
        return (to_text + F.cross_entropy(of_others.T, labels)) / 2

    return loss_of_step


@torch.inference_mode()
def measure(model: CLIPModel, tokenizer: CLIPTokenizer, count: int) -> dict[str, float]:
    """Measure the retrieval of captions and images of test scenes, and how often swaps are detected."""
    model.eval()
    images, right, nearly = draw_batch(list(range(count)), "test", tokenizer, 0)
    eos = int(tokenizer.eos_token_id)
    image, text = embed(model, images, torch.cat([right, nearly]), eos)
    logits = image @ text[:count].T
    places = torch.arange(count)
    has_other = (right != nearly).any(1)
    noticed = (image * text[:count]).sum(1) > (image * text[count:]).sum(1)
    return {
        "test_scenes": count,
        "caption_of_image_at_1": float((logits.argmax(1) == places).float().mean()),
        "image_of_caption_at_1": float((logits.argmax(0) == places).float().mean()),
        "exchange_noticed": float(noticed[has_other].float().mean()),
    }


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in the layout of `transformers` and half precision, in which features agree to three digits."""
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(
        size=size,
        do_center_crop=False,
        image_mean=list(MEAN),
        image_std=list(STD),
        resample=Image.Resampling.BICUBIC,
    )
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = training_parser(__doc__, "clip", steps=3000, batch_size=64, learning_rate=1e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = build_clip(args.device)
    options = TrainingOptions(
        batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.1,
    )
    loss = build_loss(model, tokenizer, args.batch_size, args.seed, args.device)
    identity = {"batch_size": args.batch_size, "seed": args.seed, "vision": VISION, "patch": PATCH}
    model.train()
    run_training(nn.ModuleDict({"clip": model}), loss, options, args.out, "CLIP", identity)
    measured = measure(model.cpu(), tokenizer, TEST_SCENES)
    save(model, tokenizer, args.out / "model")
    (args.out / "retrieval.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured), f"saved {args.out / 'model'}", sep="\n")


if __name__ == "__main__":
    main()
