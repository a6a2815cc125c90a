"""Measure how strong a static adapter should be at each noise level, which is the basis of fading features.

    python benchmarks/fading.py

The embedded adapters' features are multiplied by a factor, the same for all levels, and the base's loss is
measured on scenes that are never trained on, at ten timesteps, with the same noise. Writes
results/fading.json: the loss by method, timestep and factor, the factor with the lowest loss, and the noise's
share of the variance. If the loss is higher for a factor above 0 than for 0, the adapter harms the base at
this timestep.
"""

from __future__ import annotations

import numpy as np
import torch
from machine import benchmark_parser, embedded_adapters, folder_hash, report
from tqdm import tqdm

from nexus_adapters import NexusAdapter, load_adapter, load_base
from nexus_adapters.bases.families import base_of
from nexus_adapters.bundled import weights_folder
from nexus_adapters.embedded.held_out import load_test_scenes
from nexus_adapters.evaluation.generation import encode
from nexus_adapters.injection import noise_factors, residuals
from nexus_adapters.training.loss import denoising_losses

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
TIMESTEPS = tuple(range(50, 1000, 100))
FIRST_SEED = 20_000  # as in balances.py: scenes that canny.py and the study do not use


@torch.no_grad()
def losses(method: str, count: int, timesteps: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Return timestep -> factor -> mean loss."""
    pipe = load_base()
    base, unet = base_of(pipe)
    scenes = load_test_scenes(count, first_seed=FIRST_SEED)
    tokens = pipe.tokenizer(
        [scene.prompt for scene in scenes], padding="max_length", truncation=True, return_tensors="pt"
    )
    text = pipe.text_encoder(tokens.input_ids)[0]
    latents = encode(pipe.vae, scenes) * pipe.vae.config["scaling_factor"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    maps = np.stack([np.asarray(scene.condition) for scene in scenes])
    condition = torch.from_numpy(maps).permute(0, 3, 1, 2).float() / 255
    adapter = load_adapter(embedded_adapters("canny")[method])
    features = adapter(condition, text) if isinstance(adapter, NexusAdapter) else adapter(condition)

    def loss(timestep: int, factor: float) -> float:
        at = torch.full((count,), timestep)
        found = denoising_losses(
            base, unet, latents, noise, at, text, lambda noisy: residuals(features, factor)
        )
        return found.mean().item()

    return {
        str(t): {f"{factor:g}": round(loss(t, factor), 5) for factor in FACTORS}
        for t in tqdm(timesteps, method, unit="timestep")
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    args = benchmark_parser(__doc__).parse_args(arguments)
    count, timesteps = (2, TIMESTEPS[:2]) if args.quick else (64, TIMESTEPS)
    found = {method: losses(method, count, timesteps) for method in embedded_adapters("canny")}
    best = {
        method: {t: float(min(row, key=lambda factor: row[factor])) for t, row in by_timestep.items()}
        for method, by_timestep in found.items()
    }
    shares = noise_factors(load_base().scheduler, torch.tensor(timesteps), 1).tolist()
    measured = {
        "loss": found,
        "best_factor": best,
        "noise_share": {str(t): round(share, 3) for t, share in zip(timesteps, shares, strict=True)},
    }
    settings = {
        "test_scenes": count,
        "first_seed": FIRST_SEED,
        "noise_seed": 0,
        "weights_sha256": {part: folder_hash(weights_folder() / part) for part in ("base", "canny")},
    }
    report("fading", args, settings, measured)


if __name__ == "__main__":
    main()
