"""Measure the overhead of `attach` in a UNet step of SD 1.5's shape: 512x512, guidance, random weights.

    python benchmarks/hook.py

A stock StableDiffusionPipeline runs a few steps with and without an attached Prime, alternately. PyTorch
hooks before and after ours take timestamps, which separate the hook's time in a step from the UNet's. The
first step of a generation also runs the adapter; it is reported separately, and only the others are compared.
Writes results/hook.json. The target is a share under 1 %.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import benchmark_parser, median_and_spread, report
from torch import Tensor, nn

from nexus_adapters import Control, NexusAdapter, attach
from nexus_adapters.training.precision import multiplies_bf16

POLICIES = ("positive", "per_branch")
TOKENS = 77
# Differences from UNet2DConditionModel's defaults, which are SD 1.5's except for the text width.
SD15_UNET: dict[str, Any] = {"cross_attention_dim": 768}
TINY_UNET: dict[str, Any] = {
    "cross_attention_dim": 16,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}


@dataclass
class Marks:
    """When the parts of each step began and ended, in seconds."""

    before_hook: list[float] = field(default_factory=list)
    before_unet: list[float] = field(default_factory=list)
    behind_unet: list[float] = field(default_factory=list)
    behind_hook: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> list[float]:
        """Return the time of each step, including the hook's."""
        return [end - start for start, end in zip(self.before_hook, self.behind_hook, strict=True)]

    @property
    def hook_s(self) -> list[float]:
        """Return the hook's time in each step: everything except the UNet."""
        inside = zip(self.before_unet, self.behind_unet, strict=True)
        return [step - (end - start) for step, (start, end) in zip(self.step_s, inside, strict=True)]


def mark(unet: nn.Module, before: list[float], behind: list[float]) -> list[Any]:
    """Register PyTorch hooks that note the time. Hooks run in the order in which they were registered."""
    return [
        unet.register_forward_pre_hook(lambda *_: before.append(time.perf_counter())),
        unet.register_forward_hook(lambda *_: behind.append(time.perf_counter())),
    ]


def generate(pipe: Any, control: Control | None, text: Tensor, steps: int, side: int) -> Marks:
    """Run one generation, always from the same latents."""
    marks = Marks()
    handles = mark(pipe.unet, marks.before_hook, marks.behind_unet)
    with nullcontext() if control is None else attach(pipe, control):
        handles += mark(pipe.unet, marks.before_unet, marks.behind_hook)
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=-text,
            num_inference_steps=steps,
            height=side,
            width=side,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    for handle in handles:
        handle.remove()
    return marks


def build_pipeline(config: dict[str, Any]) -> Any:
    """Return a stock pipeline with only a UNet: prompts are embeddings, and images are latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(config: dict[str, Any], side: int, steps: int, rounds: int) -> dict[str, object]:
    """Return the milliseconds of a step alone and with each policy, and the time and share of the hook."""
    pipe = build_pipeline(config)
    adapter = NexusAdapter.for_unet(pipe.unet, "prime-paper").eval()
    text = torch.randn(1, TOKENS, config["cross_attention_dim"], generator=torch.Generator().manual_seed(0))
    condition = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)).round()
    controls = {policy: Control(adapter, condition, policy=policy) for policy in POLICIES}
    runs: dict[str, list[Marks]] = {"alone": [], **{policy: [] for policy in POLICIES}}
    generate(pipe, None, text, 1, side)  # the first run also allocates
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(generate(pipe, controls.get(name), text, steps, side))
    alone = [s for marks in runs["alone"] for s in marks.step_s[1:]]
    measured: dict[str, object] = {"step_alone_ms": in_ms(alone)}
    for policy in POLICIES:
        hook = [s for marks in runs[policy] for s in marks.hook_s[1:]]
        step = [s for marks in runs[policy] for s in marks.step_s[1:]]
        measured[policy] = {
            "hook_ms": in_ms(hook),
            "hook_share_of_step": round(median(hook) / median(alone), 5),
            "step_ms": in_ms(step),
            "step_ratio_to_alone": round(median(step) / median(alone), 4),
            "hook_with_adapter_in_first_step_ms": in_ms([marks.hook_s[0] for marks in runs[policy]]),
        }
    return measured


def in_ms(seconds: list[float]) -> dict[str, float]:
    """Return median and spread in milliseconds."""
    return median_and_spread([1000 * s for s in seconds], digits=3)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps per generation; the first is not compared"
    )
    parser.add_argument(
        "--precision",
        choices=("bf16-autocast", "float32"),
        default="bf16-autocast" if multiplies_bf16("cpu") else "float32",
        help="precision (default here: %(default)s)",
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config, side = (TINY_UNET, 64) if args.quick else (SD15_UNET, 512)
    rounds = min(args.rounds, 2) if args.quick else args.rounds
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16-autocast"):
        measured = measure(config, side, args.steps, rounds)
    settings = {
        "rounds": rounds,
        "steps": args.steps,
        "precision": args.precision,
        "batch": 2,
        "side": side,
        "unet": config,
        "adapter": "prime",
    }
    report("hook", args, settings, measured)


if __name__ == "__main__":
    main()
