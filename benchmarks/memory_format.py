"""Compare the time of a UNet step of the embedded base in channels-last and in contiguous layout.

    python benchmarks/memory_format.py

With 2 rows (one image with guidance), 8 (a row of the demo's sheet) and 100 (a batch of canny.py), in
float32, on random inputs. Both layouts run in every round. Writes results/memory_format.json.
"""

from __future__ import annotations

import time

import torch
from diffusers import UNet2DConditionModel
from machine import benchmark_parser, median_and_spread, report

from nexus_adapters import load_base

ROWS = (2, 8, 100)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@torch.inference_mode()
def step_times(rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds per step in each layout, and the ratio within a round."""
    unets: dict[str, UNet2DConditionModel] = {
        name: load_base().unet.to(memory_format=layout) for name, layout in LAYOUTS.items()
    }
    config = unets["contiguous"].config
    torch.manual_seed(0)
    latents = torch.randn(rows, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(rows, 77, config.cross_attention_dim)
    spent: dict[str, list[float]] = {name: [] for name in unets}
    for _ in range(rounds + 1):
        for name, unet in unets.items():
            started = time.perf_counter()
            unet(latents, 500, text)
            spent[name].append(1000 * (time.perf_counter() - started))
    timed = {name: values[1:] for name, values in spent.items()}  # the first round also allocates
    pairs = zip(timed["channels_last"], timed["contiguous"], strict=True)
    return {f"{name}_ms": median_and_spread(values, digits=2) for name, values in timed.items()} | {
        "channels_last_to_contiguous": median_and_spread([ours / theirs for ours, theirs in pairs])
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    rounds = 2 if args.quick else args.rounds
    report(
        "memory_format",
        args,
        {"rounds": rounds, "dtype": "float32"},
        {f"{rows} rows": step_times(rows, rounds) for rows in ROWS},
    )


if __name__ == "__main__":
    main()
