"""Compute the cost of the study on Stable Diffusion 1.5 and COCO, by counting multiplications.

    python benchmarks/sd15_cost.py

For every method: trained weights, and billions of multiply-accumulates per training sample (512x512, forward
and backward, latents and embeddings read from a cache) and per generated image (20 steps with guidance,
decoded). They are counted by torch from shapes alone, which takes seconds and needs no weights. The hours per
cell, for training and images, follow from measured times. On a CPU, this is Prime's step in
results/training_cost.json, which gives the multiplications per second. On a GPU, it is every method's step in
results/sd15_step.json, and the base's time per image, scaled by the multiplications that a method adds.
Writes results/sd15_cost.json, from which benchmarks/README.md has a table.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from machine import RESULTS, benchmark_parser, report
from sd15_step import METHODS
from torch import Tensor
from tqdm import tqdm
from training_cost import sd15_encoders, sd15_unet

from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import Method, find_method
from nexus_adapters.methods.cost import counted_gmacs
from nexus_adapters.methods.method import FEATURES

PIXELS, TOKENS = 512, 77
SAMPLER_STEPS = 20
# The paper's budget: 200,000 steps of 2 x 4 samples. COCO's val2017 has 5,000 images.
TRAINED_SAMPLES, DRAWN_PICTURES = 1_600_000, 5_000


def training_gmacs(method: Method, adapter: Any, base: UNetBase, unet: Any) -> float:
    """Return the GMACs of one sample in a training step, forward and backward."""
    with torch.device("meta"):
        network, places = method.network(adapter, unet), FeaturePlaces(unet, base.places())
        time, text = torch.zeros(1, dtype=torch.long), torch.empty(1, TOKENS, 768)
        latents, condition = torch.empty(1, 4, 64, 64), torch.empty(1, 3, PIXELS, PIXELS)
        given, number = torch.ones(1, dtype=torch.bool), torch.zeros(1)
        batch = Batch(time, latents, latents, number, condition, given, text)

        @torch.enable_grad()
        def step() -> None:
            arguments = method.denoiser_arguments(network, batch, latents, time, base)
            features = arguments.pop(FEATURES, None)
            if features is not None:
                arguments |= places.arguments(features)
            called: Any = network if method.is_fused else unet
            predicted: Tensor = base.predict(called, latents, time, text, arguments)
            predicted.sum().backward()

        return counted_gmacs(step)


def base_gmacs(unet: Any, vae: Any) -> tuple[float, float]:
    """Return the GMACs of one UNet call for one image, and of decoding it."""
    with torch.device("meta"):
        latents, text = torch.empty(1, 4, 64, 64), torch.empty(1, TOKENS, 768)
        call = counted_gmacs(lambda: unet(latents, torch.zeros(1), encoder_hidden_states=text))
        return call, counted_gmacs(lambda: vae.decode(latents))


def timed_step() -> dict[str, Any] | None:
    """Return the `seconds` of Prime's timed step at this size and the `machine`; None without a result."""
    file = RESULTS / "training_cost.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return {"seconds": found["measured"]["sd15"]["ours_s"]["median"], "machine": found["machine"]}


def on_gpu() -> dict[str, Any] | None:
    """Return `settings` and `measured` of `sd15_step.py`; None without a result."""
    file = RESULTS / "sd15_step.json"
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    return {"settings": found["settings"], "measured": found["measured"]}


def gpu_hours(method: str, gpu: dict[str, Any], gmacs_to_base: float) -> float:
    """Return the hours of a cell: its steps, and its images at `gmacs_to_base` times the base's cost each."""
    batch_size, measured = gpu["settings"]["batch_size"], gpu["measured"]
    training = TRAINED_SAMPLES * measured["step_s"][method]["median"]
    picture = SAMPLER_STEPS * measured["predict_s"]["median"] + measured["decode_s"]["median"]
    return float((training + DRAWN_PICTURES * picture * gmacs_to_base) / batch_size / 3600)


def main(arguments: list[str] | None = None) -> None:
    """Count and write the result."""
    args = benchmark_parser(__doc__).parse_args(arguments)
    with torch.device("meta"):
        unet = sd15_unet(tiny=False)
        vae, _ = sd15_encoders(tiny=False)
    unet.requires_grad_(False)
    base = UNetBase(unet.config, vae.config)
    call, decoding = base_gmacs(unet, vae)
    base_picture = 2 * SAMPLER_STEPS * call + decoding
    found: dict[str, Any] = {}
    for label in tqdm(list(METHODS)[:1] if args.quick else METHODS, unit="method"):
        method = find_method(METHODS[label])
        with torch.device("meta"):
            adapter = method.build(base, unet, method.Options(method.name))
        trained = training_gmacs(method, adapter, base, unet)
        cost = method.cost(adapter, base, PIXELS, SAMPLER_STEPS)
        # A control that runs in every step adds its cost to both branches of guidance.
        added = cost.gmacs_once + 2 * SAMPLER_STEPS * cost.gmacs_per_step
        found[label] = {
            "parameters": cost.parameters,
            "gmacs_per_trained_sample": round(trained, 1),
            "gmacs_per_picture": round(base_picture + added, 1),
        }
    timed, gpu = timed_step(), on_gpu()
    rate = (
        found["prime"]["gmacs_per_trained_sample"] / timed["seconds"] if timed and "prime" in found else None
    )
    for label, costs in found.items():
        costs["gmacs_per_cell"] = round(
            TRAINED_SAMPLES * costs["gmacs_per_trained_sample"] + DRAWN_PICTURES * costs["gmacs_per_picture"]
        )
        if rate:
            costs["hours_per_cell"] = round(costs["gmacs_per_cell"] / rate / 3600)
        if gpu:
            hours = gpu_hours(label, gpu, costs["gmacs_per_picture"] / base_picture)
            costs["gpu_hours_per_cell"] = round(hours, 1)
    settings = {
        "pixels": PIXELS,
        "sampler_steps": SAMPLER_STEPS,
        "trained_samples": TRAINED_SAMPLES,
        "drawn_pictures": DRAWN_PICTURES,
        "timed_step": timed,
        "timed_on_gpu": gpu and gpu["settings"],
    }
    measured = {
        "unet_call_gmacs": round(call, 1),
        "gmacs_per_s": None if rate is None else round(rate, 1),
        "methods": found,
    }
    report("sd15_cost", args, settings, measured)


if __name__ == "__main__":
    main()
