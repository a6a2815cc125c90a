"""Compare the forward pass of Prime and Slim with T2I-Adapter's: time and peak memory at SD 1.5's size.

    python benchmarks/adapter_forward.py

Batch 1, 512x512, float32, random weights. All adapters run in every round, and times are compared within a
round, so that other load on the machine affects all of them. Peak memory is that of a fresh process that
builds and runs one adapter. Writes results/adapter_forward.json.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from machine import benchmark_parser, median_and_spread, report
from torch import Tensor, nn

from nexus_adapters.adapter.model import NexusAdapter

METHODS = ("t2i", "prime", "slim")  # the paper configurations
TOKENS = 77
_TO_MIB = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, else in KiB


@dataclass(frozen=True)
class Size:
    """The UNet's channels and text width, and the image's side in pixels."""

    channels: tuple[int, ...]
    text_width: int
    side: int


SD15 = Size((320, 640, 1280, 1280), 768, 512)
TINY = Size((32, 32, 64, 64), 16, 64)


def build(method: str, size: Size) -> nn.Module:
    """Return an adapter with random weights for a UNet with SD 1.5's block types."""
    torch.manual_seed(0)
    if method == "t2i":
        return T2IAdapter(
            in_channels=3,
            channels=list(size.channels),
            num_res_blocks=2,
            downscale_factor=8,
            adapter_type="full_adapter",
        ).eval()
    with torch.device("meta"):  # only the UNet's config is needed
        unet = UNet2DConditionModel(block_out_channels=size.channels, cross_attention_dim=size.text_width)
    return NexusAdapter.for_unet(unet, f"{method}-paper").eval()


def inputs(method: str, size: Size) -> tuple[Tensor, ...]:
    """Return a structure map and, for adapters that read it, the text."""
    generator = torch.Generator().manual_seed(0)
    condition = torch.rand(1, 3, size.side, size.side, generator=generator).round()
    text = torch.randn(1, TOKENS, size.text_width, generator=generator)
    return (condition,) if method == "t2i" else (condition, text)


@torch.inference_mode()
def measure_times(size: Size, rounds: int) -> dict[str, dict[str, object]]:
    """Return, for every method, parameters, milliseconds, and the ratio to T2I's time in the same round."""
    adapters = {method: build(method, size) for method in METHODS}
    arguments = {method: inputs(method, size) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for method, adapter in adapters.items():
        adapter(*arguments[method])  # the first run also allocates
    for turn in range(rounds):
        shift = turn % len(METHODS)  # so that no method always comes first
        for method in METHODS[shift:] + METHODS[:shift]:
            started = time.perf_counter()
            adapters[method](*arguments[method])
            times[method].append(1000 * (time.perf_counter() - started))
    ratios = {m: [own / t2i for own, t2i in zip(times[m], times["t2i"], strict=True)] for m in METHODS}
    return {
        method: {
            "parameters": sum(parameter.numel() for parameter in adapters[method].parameters()),
            "forward_ms": median_and_spread(times[method], digits=2),
            "time_ratio_to_t2i": median_and_spread(ratios[method]),
        }
        for method in METHODS
    }


def peak_memory_mib(method: str, threads: int, quick: bool) -> float:
    """Return the peak resident memory of a fresh process that runs one adapter; "none" only imports."""
    command = [sys.executable, __file__, "--peak-memory-of", method, "--threads", str(threads)]
    command += ["--quick"] if quick else []
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


@torch.inference_mode()
def print_own_peak_memory(method: str, size: Size) -> None:
    """Run one adapter and print the peak memory, for the process of `peak_memory_mib`."""
    if method != "none":
        build(method, size)(*inputs(method, size))
    print(own_peak_mib())


def own_peak_mib() -> float:
    """Return the peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, ru_maxrss of a new process includes the memory of its parent, but this does not.
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _TO_MIB


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--peak-memory-of", choices=("none", *METHODS), help="only measure this process")
    args = parser.parse_args(arguments)
    size = TINY if args.quick else SD15
    torch.set_num_threads(args.threads)
    if args.peak_memory_of:
        print_own_peak_memory(args.peak_memory_of, size)
        return
    rounds = min(args.rounds, 2) if args.quick else args.rounds
    measured: dict[str, object] = dict(measure_times(size, rounds))
    if not args.skip_memory:
        peaks = {m: peak_memory_mib(m, args.threads, args.quick) for m in ("none", *METHODS)}
        measured["peak_memory_mib"] = {m: round(peak, 1) for m, peak in peaks.items()}
        measured["peak_memory_over_imports_mib"] = {m: round(peaks[m] - peaks["none"], 1) for m in METHODS}
    settings = {"rounds": rounds, "batch": 1, "dtype": "float32", **vars(size)}
    report("adapter_forward", args, settings, measured)


if __name__ == "__main__":
    main()
