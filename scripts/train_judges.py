"""Train two small models that extract maps from images of the embedded world: segmentation and depth.

    python scripts/train_judges.py segmentation
    python scripts/train_judges.py depth --steps 700

The structure of a generated image is judged by extracting its map. The maps of scenes are computed from the
scene itself, which is not known for a generated image. So these models learn to predict them, on scenes of
the training split with noise, blur and changed contrast, because generated images are never quite clean. They
are `transformers` models, which `extract` and `nexus evaluate` load by folder. The same command resumes an
interrupted run. It writes the model and its accuracy on test scenes; benchmarks/results/judges.json contains
the results of the two commands above.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessorPil,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from embedded_data import Loss, run_training, training_parser
from nexus_adapters.embedded.maps import BACKGROUND_COLOR, SHAPE_COLORS, depth_map, segmentation_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import SIZE, Split, draw_scene
from nexus_adapters.metrics.structure import depth_rmse, mean_iou
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.precision import autocast

TASKS = ("segmentation", "depth")
CLASSES = (BACKGROUND_COLOR, *SHAPE_COLORS.values())
TEST_SCENES = 500
_FARTHEST = 10  # distance for nearness 0, where distance = 1 / (nearness + 0.1)
_ENCODER: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [32, 64, 96, 128],
    "num_attention_heads": [1, 2, 3, 4],
    "sr_ratios": [8, 4, 2, 1],
}


def build_judge(task: str, device: str = "cpu") -> Any:
    """Return the untrained model."""
    if task == "depth":
        config = GLPNConfig(**_ENCODER, decoder_hidden_size=32, max_depth=_FARTHEST)
        return GLPNForDepthEstimation(config).to(device)
    config = SegformerConfig(**_ENCODER, decoder_hidden_size=128, num_labels=len(CLASSES))
    return SegformerForSemanticSegmentation(config).to(device)


def draw_batch(
    seeds: list[int], split: Split, is_spoiled: bool
) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b h w"], Float[Tensor, "b h w"]]:
    """Return images in [0, 1], the class of each pixel, and its nearness in [0, 1]."""
    images, labels, near = [], [], []
    for seed in seeds:
        scene = draw_scene(seed, split)
        rendering = render(scene)
        rng = np.random.default_rng(seed)
        images.append(
            _spoiled(rendering.image, rng) if is_spoiled else rendering.image.astype(np.float32) / 255
        )
        colors = segmentation_map(scene, rendering)
        labels.append(sum(n * (colors == color).all(axis=2) for n, color in enumerate(CLASSES)))
        near.append(depth_map(rendering)[..., 0].astype(np.float32) / 255)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(np.stack(labels)).long(), torch.from_numpy(np.stack(near))


def _spoiled(image: np.ndarray, rng: np.random.Generator) -> Float[np.ndarray, "h w 3"]:
    pixels = image.astype(np.float32) / 255
    if rng.random() < 0.5:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.6))
    pixels = (pixels - 0.5) * rng.uniform(0.8, 1.1) + 0.5 + rng.uniform(-0.05, 0.05)
    return np.clip(pixels + rng.normal(0, rng.uniform(0, 0.06), pixels.shape), 0, 1).astype(np.float32)


def build_loss(model: nn.Module, task: str, batch_size: int, seed: int, device: str) -> Loss:
    """Return step -> cross-entropy of the classes, or mean error of the nearness."""

    def loss_of_step(step: int) -> Tensor:
        first = (seed * 1_000_003 + step) * batch_size
        batch = draw_batch(list(range(first, first + batch_size)), "train", is_spoiled=True)
        images, labels, near = (part.to(device) for part in batch)
        with autocast(device):
            found = model(pixel_values=images)
        if task == "depth":
            return (1 / found.predicted_depth.float().clamp(min=1e-3) - 1 / _FARTHEST - near).abs().mean()
        logits = F.interpolate(found.logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels)

    return loss_of_step


@torch.inference_mode()
def measure(model: nn.Module, task: str, count: int) -> dict[str, float]:
    """Measure how well the model predicts the maps of test scenes."""
    model.eval()
    scores = []
    for seed in range(count):
        images, labels, near = draw_batch([seed], "test", is_spoiled=False)
        found = model(pixel_values=images)
        if task == "depth":
            drawn = (1 / found.predicted_depth[0].clamp(min=1e-3) - 1 / _FARTHEST).clamp(0, 1)
            scores.append(depth_rmse(drawn, near[0]))
        else:
            logits = F.interpolate(found.logits, (SIZE, SIZE), mode="bilinear", align_corners=False)
            scores.append(mean_iou(logits[0].argmax(0), labels[0], len(CLASSES)))
    name = "depth_rmse" if task == "depth" else "mean_iou"
    return {"test_scenes": count, name: float(np.mean(scores)), f"{name}_worst_tenth": _worst(scores, task)}


def _worst(scores: list[float], task: str) -> float:
    return float(np.quantile(scores, 0.9 if task == "depth" else 0.1))


def save(model: Any, task: str, folder: Path) -> None:
    """Save in the layout of `transformers` and half precision; images are read unchanged, in [0, 1]."""
    model.half().save_pretrained(folder)
    if task == "depth":
        GLPNImageProcessorPil(do_resize=False).save_pretrained(folder)
        return
    SegformerImageProcessorPil(do_resize=False, do_normalize=False).save_pretrained(folder)


def main() -> None:
    parser = training_parser(__doc__, "judges", steps=1200, batch_size=32, learning_rate=1e-2)
    parser.add_argument("task", choices=TASKS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, out = build_judge(args.task, args.device), args.out / args.task
    options = TrainingOptions(
        batch_size=args.batch_size,
        gradient_accumulation_steps=1,
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup_steps=50,
        optimizer="muon",
    )
    loss = build_loss(model.train(), args.task, args.batch_size, args.seed, args.device)
    identity = {"task": args.task, "batch_size": args.batch_size, "seed": args.seed, "encoder": _ENCODER}
    identity |= {"steps": args.steps, "optimizer": options.optimizer, "learning_rate": args.learning_rate}
    run_training(nn.ModuleDict({"judge": model}), loss, options, out, args.task, identity)
    measured = measure(model.cpu(), args.task, TEST_SCENES)
    save(model, args.task, out / "model")
    (out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured), f"saved {out / 'model'}", sep="\n")


if __name__ == "__main__":
    main()
