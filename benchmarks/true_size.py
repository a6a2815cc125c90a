"""Measure time and memory of a control on SD 1.5 and SDXL at their true size, with random weights.

    python benchmarks/true_size.py

For each base and adapter, a fresh process builds the UNet, takes one step with two rows without a control and
two with it (SD 1.5 at 512x512, SDXL at 1024x1024 or `--xl-side`), and checks that scale 0 gives exactly the
base's latents. Writes results/true_size.json. Each time is from a single run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from machine import benchmark_parser, report

from nexus_adapters import Control, NexusAdapter, attach

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET: dict[str, Any] = {
    "cross_attention_dim": 16,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}
UNETS = {"sd15": {"cross_attention_dim": 768}, "sdxl": SDXL_UNET, "tiny": TINY_UNET}
VARIANTS = ("prime", "slim")  # the paper configurations
TOKENS = 77


def build_unet(base: str) -> Any:
    """Build a UNet with random weights, small enough that nothing overflows."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[base])
    unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.fill_(1.0) if is_norm else parameter.normal_(0, 0.02, generator=generator)
    return unet.eval()


@torch.no_grad()
def measure(base: str, variant: str, side: int) -> dict[str, object]:
    """Return the seconds of a step alone, of the first and second with a control, and of the adapter."""
    unet = build_unet(base)
    adapter = NexusAdapter.for_unet(unet, f"{variant}-paper").eval()
    config = unet.config
    latents = torch.randn(2, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, TOKENS, config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    added = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)}
    condition = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3)).round()

    def step(control: Control | None, steps: int) -> tuple[list[float], list[Any]]:
        seconds, outs = [], []
        with nullcontext() if control is None else attach(unet, control):
            for number in range(steps):
                started = time.perf_counter()
                outs.append(unet(latents, 500 - number, text, added_cond_kwargs=added).sample)
                seconds.append(time.perf_counter() - started)
        return seconds, outs

    started = time.perf_counter()
    adapter(condition, text[1:])
    adapter_s = time.perf_counter() - started
    alone, expected = step(None, 1)
    under, found = step(Control(adapter, condition, policy="per_branch"), 2)
    _, off = step(Control(adapter, condition, scale=0, policy="per_branch"), 1)
    return {
        "unet_parameters": sum(p.numel() for p in unet.parameters()),
        "adapter_parameters": sum(p.numel() for p in adapter.parameters()),
        "adapter_s": round(adapter_s, 2),
        "step_alone_s": round(alone[0], 2),
        "first_step_with_control_s": round(under[0], 2),
        "second_step_with_control_s": round(under[1], 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "scale_0_is_the_base": bool(torch.equal(off[0], expected[0])),
        "control_changes_the_output": bool((found[0] - expected[0]).abs().max() > 0),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure each case in a separate process, and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--xl-side", type=int, default=1024, help="side of SDXL's images in pixels (default 1024)"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument(
        "--case", nargs=3, metavar=("BASE", "VARIANT", "SIDE"), help="used for fresh processes"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.case:
        base, variant, side = args.case
        print(json.dumps(measure(base, variant, int(side))))
        return
    sides = {"tiny": 64} if args.quick else {"sd15": 512, "sdxl": args.xl_side}
    cases = [(base, variant) for base in sides for variant in args.variants]
    measured: dict[str, object] = {}
    for base, variant in cases:
        print(f"{base}, {variant} ...", file=sys.stderr, flush=True)
        command = [
            sys.executable,
            __file__,
            "--threads",
            str(args.threads),
            "--case",
            base,
            variant,
            str(sides[base]),
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        measured[f"{base} {variant}"] = json.loads(found.stdout.splitlines()[-1])
    settings = {"sides": sides, "batch": 2, "dtype": "float32", "policy": "per_branch", "tokens": TOKENS}
    report("true_size", args, settings, measured)


if __name__ == "__main__":
    main()
