"""Take three measurements behind the design of the embedded model.

    python benchmarks/embedded_design.py

- Redundancy of the latents: edge F1 of test scenes decoded from noisy latents.
- Timesteps at which the prompt matters: the base's loss on test scenes with their own prompts, with other
  prompts, and with the empty prompt.
- Attribute binding in the text encoder: the fraction of objects whose color a linear probe reads at their
  shape's token.

Writes results/embedded_design.json.
"""

from __future__ import annotations

import torch
from machine import benchmark_parser, folder_hash, report
from torch import nn

from nexus_adapters import load_base
from nexus_adapters.bases.families import base_of
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.held_out import TestScene, load_test_scenes, score_images
from nexus_adapters.embedded.scene import COLORS, draw_scene
from nexus_adapters.evaluation.generation import decode, encode
from nexus_adapters.training.loss import denoising_losses

NOISE_SHARES = (0.0, 0.1, 0.2, 0.3)  # fractions of the latents' standard deviation
TIMESTEPS = (200, 400, 600, 800, 900, 980, 999)


def edge_f1_under_noise(scenes: list[TestScene]) -> dict[str, float]:
    """Return noise as a fraction of the latents' standard deviation -> mean edge F1 of decoded scenes."""
    vae = load_base().vae
    latents = encode(vae, scenes)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * latents.std()
    found = {}
    for share in NOISE_SHARES:
        edges = score_images(decode(vae, latents + share * noise), scenes)["edge_f1"]
        found[str(share)] = round(float(edges.mean()), 4)
    return found


@torch.no_grad()
def loss_by_timestep(scenes: list[TestScene]) -> dict[str, dict[str, float]]:
    """Return timestep -> mean loss with each scene's own prompt, the next scene's, and the empty one."""
    pipe = load_base()
    base, unet = base_of(pipe)
    latents = encode(pipe.vae, scenes) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    own, none = pipe.encode_prompt([scene.prompt for scene in scenes], "cpu", 1, True)
    found = {}
    for timestep in TIMESTEPS:
        steps = torch.full((len(scenes),), timestep)
        found[str(timestep)] = {
            name: round(denoising_losses(base, unet, latents, noise, steps, text).mean().item(), 4)
            for name, text in {"own": own, "other": own.roll(1, 0), "none": none}.items()
        }
    return found


def color_at_shape_token(scenes: int) -> float:
    """Return the accuracy on unseen captions of a linear probe from a shape's token to its object's color."""
    pipe = load_base()
    tokens, colors = [], []
    for seed in range(scenes):
        scene = draw_scene(seed)
        prompt = caption(scene)
        ids = pipe.tokenizer(prompt).input_ids
        with torch.no_grad():
            text, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        for item in scene.objects:
            word = pipe.tokenizer.convert_tokens_to_ids(f"{item.shape}</w>")
            tokens.append(text[0, ids.index(word)])
            colors.append(list(COLORS).index(item.color))
    inputs, labels = torch.stack(tokens), torch.tensor(colors)
    seen = len(labels) * 4 // 5
    inputs = (inputs - inputs[:seen].mean(0)) / inputs[:seen].std(0)
    probe = nn.Linear(inputs.shape[1], len(COLORS))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(probe(inputs[:seen]), labels[:seen]).backward()
        optimizer.step()
    return round((probe(inputs[seen:]).argmax(1) == labels[seen:]).float().mean().item(), 4)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--first-seed", type=int, default=0, help="first seed of the test scenes (default 0)")
    parser.add_argument("--probed-scenes", type=int, default=3000)
    args = parser.parse_args(arguments)
    count, probed = (2, 20) if args.quick else (args.scenes, args.probed_scenes)
    scenes = load_test_scenes(count, first_seed=args.first_seed)
    measured = {
        "edge_f1_by_latent_noise": edge_f1_under_noise(scenes),
        "base_loss_by_timestep_and_prompt": loss_by_timestep(scenes),
        "probe_accuracy_color_at_shape_token": color_at_shape_token(probed),
    }
    settings = {
        "test_scenes": count,
        "first_seed": args.first_seed,
        "probed_scenes": probed,
        "seed": 0,
        "base_sha256": folder_hash(BUNDLED["embedded"].folder),
    }
    report("embedded_design", args, settings, measured)


if __name__ == "__main__":
    main()
