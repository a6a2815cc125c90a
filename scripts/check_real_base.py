"""Check that everything works with Stable Diffusion weights of yours: SD 1.x, 2.x or XL.

    python scripts/check_real_base.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --t2i TencentARC/t2iadapter_canny_sd15v2

Prints one line per check with its figures, and ends with status 1 if one fails. Without --t2i, a T2I-Adapter
with random weights takes its place. --quick generates in fewer steps and times a smaller batch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from nexus_adapters import Control, NexusAdapter, attach, load_adapter, load_base
from nexus_adapters.adapter.formats import import_adapter
from nexus_adapters.bases.families import base_of
from nexus_adapters.bases.loading import BaseSource, quiet_loading
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.methods import find_method
from nexus_adapters.methods.method import other_pipeline
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.step_time import duration, measure_step

# (widths of the denoiser's blocks, width of the prompt embeddings) -> parameters of Prime and Slim.
COUNTS = {
    ((320, 640, 1280, 1280), 768): (85_817_600, 59_288_960),
    ((320, 640, 1280), 2048): (94_030_080, 67_501_440),
}
PROMPT = "a photo of a cat"
FEATURE_ERROR = 1e-4  # of the features' norm: what the order of float32 sums makes of it, with a margin
IMAGE_ERROR = 0.5  # mean difference, of 255 levels


class Failed(Exception):  # noqa: N818  # a result, not an error of the script
    """A check that found something else than it should. Its text has the figures."""


@dataclass
class Checks:
    """The checks of one base, in order. Each returns its figures or raises `Failed`."""

    args: argparse.Namespace
    device: torch.device

    @cached_property
    def pipe(self) -> Any:
        """The base, in float32, so that its images can be compared."""
        source = BaseSource(self.args.base, variant=self.args.base_variant, config=self.args.base_config)
        pipe = load_base(source)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def side(self) -> int:
        """Of the images that the base was trained on."""
        base, _ = base_of(self.pipe)
        return base.native_size()

    @cached_property
    def map(self) -> Image.Image:
        """A ring and a box, white on black."""
        image = Image.new("RGB", (self.side, self.side))
        draw, s = ImageDraw.Draw(image), self.side
        draw.ellipse((s // 8, s // 8, s // 2, s // 2), outline="white", width=max(1, s // 256))
        draw.rectangle((s // 2, s // 2, 7 * s // 8, 7 * s // 8), outline="white", width=max(1, s // 256))
        return image

    @cached_property
    def adapters(self) -> tuple[Any, Any]:
        """The T2I-Adapter, and the Prime that is made of it."""
        base, unet = base_of(self.pipe)
        with tempfile.TemporaryDirectory() as folder, quiet_loading():
            source = self.args.t2i
            if not source:
                torch.manual_seed(0)
                method = find_method("t2i")
                random: Any = method.build(base, unet, method.Options("t2i"))
                random.save_pretrained(folder)
                source = folder
            source = Path(source) if Path(source).exists() else source  # a folder may have any name
            t2i: Any = load_adapter(source)
            prime: Any = import_adapter(source, "prime", text_width=base.text_width).adapter
        to: Any = nn.Module.to  # diffusers' own warns of parts to keep in float32: here none
        return to(t2i, self.device).eval(), to(prime, self.device).eval()

    def loads(self) -> str:
        """The base loads, and two prompts have different embeddings (`load_base` compares them)."""
        base, unet = base_of(self.pipe)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        return f"{parameters:,} parameters, prompt embeddings of width {base.text_width}, {self.side} pixels"

    def counts(self) -> str:
        """Prime and Slim have the published numbers of parameters."""
        base, unet = base_of(self.pipe)
        with torch.device("meta"):
            made = [NexusAdapter.for_unet(unet, variant=name) for name in ("prime", "slim")]
        found = tuple(sum(parameter.numel() for parameter in adapter.parameters()) for adapter in made)
        expected = COUNTS.get((tuple(base.config["block_out_channels"]), base.text_width))
        figures = f"Prime {found[0]:,}, Slim {found[1]:,}"
        if expected is None:
            return f"{figures}; no numbers are published for a base of this shape"
        if found != expected:
            raise Failed(f"{figures}; expected {expected[0]:,} and {expected[1]:,}")
        return figures

    def features(self) -> str:
        """The Prime gives the T2I-Adapter's features."""
        t2i, prime = self.adapters
        pixels = torch.from_numpy(np.array(self.map)).permute(2, 0, 1)[None].float() / 255
        pixels = pixels.to(self.device)
        text = torch.randn(1, 8, prime.config.text_width, device=self.device)
        with torch.no_grad():
            pairs = zip(prime(pixels, text), t2i(pixels[:, : t2i.config.in_channels]), strict=True)
        worst = max(_relative(ours, theirs) for ours, theirs in pairs)
        if worst > FEATURE_ERROR:
            raise Failed(f"they differ by {worst:.1e} of their norm, more than {FEATURE_ERROR:g}")
        return f"they differ by at most {worst:.1e} of their norm"

    def same_image(self) -> str:
        """The Prime's image is that of diffusers' own pipeline with the T2I-Adapter."""
        from diffusers import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline

        t2i, prime = self.adapters
        is_xl = hasattr(self.pipe, "text_encoder_2")
        kind = StableDiffusionXLAdapterPipeline if is_xl else StableDiffusionAdapterPipeline
        stock = other_pipeline(kind, self.pipe, adapter=t2i)
        map_ = self.map.convert("L") if t2i.config.in_channels == 1 else self.map
        wanted = self.generate(stock, image=map_)
        with attach(self.pipe, Control(prime, self.map)):
            found = self.generate(self.pipe)
        difference = np.abs(found - wanted)
        figures = (
            f"they differ by {difference.mean():.3f} of 255 levels on average, at most {difference.max():.0f}"
        )
        if not difference.mean() <= IMAGE_ERROR:
            raise Failed(figures)
        if np.abs(wanted - self.generate(self.pipe)).mean() <= IMAGE_ERROR:
            raise Failed(f"{figures}, but the T2I-Adapter does not change the base's image")
        return figures

    def no_strength(self) -> str:
        """An adapter of strength 0 leaves the base's image as it is, bit for bit."""
        wanted = self.generate(self.pipe)
        with attach(self.pipe, Control(self.adapters[1], self.map, scale=0)):
            found = self.generate(self.pipe)
        if not np.array_equal(found, wanted):
            raise Failed(f"{np.mean(found != wanted):.1%} of the values differ")
        return "every value is the same"

    def trains(self) -> str:
        """A training step runs. From its time follow the hours of a run."""
        args = self.args
        training = {
            "max_train_steps": args.steps,
            "batch_size": args.batch_size,
            "gradient_accumulation_steps": 1,
        }
        data = {"path": ".", "resolution": self.side}
        made = parse_config({"output_dir": ".", "data": data, "training": training})
        base, unet = base_of(self.pipe)
        dtype = choose_precision("auto", self.device).dtype
        nn.Module.to(unet, dtype=dtype).requires_grad_(False).eval()
        prime = self.adapters[1].requires_grad_(True).train()
        count = 1 if args.quick or self.device.type == "cpu" else args.batch_size
        before = [parameter.detach().clone() for parameter in prime.parameters()]
        found = measure_step(made, base, unet, prime, made.adapter, count)
        after = list(prime.parameters())
        if not all(bool(torch.isfinite(parameter).all()) for parameter in after):
            raise Failed("weights are not finite after it")
        if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
            raise Failed("it changes no weight")
        peak = "" if found.peak_bytes is None else f", {found.peak_bytes / 2**30:.1f} GiB at the peak"
        scaled = "" if count == args.batch_size else f", from a batch of {count}"
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return (
            f"{found.seconds:.2f} s per step of {args.batch_size} samples, in {str(dtype)[6:]} on {name}"
            f"{scaled}{peak}; {args.steps:,} steps take about {duration(args.steps * found.seconds)}"
        )

    def generate(self, pipe: Any, **arguments: Any) -> Any:
        """An image with the same noise each time, (H, W, 3), from 0 to 255."""
        image = pipe(
            PROMPT,
            num_inference_steps=2 if self.args.quick else 10,
            height=self.side,
            width=self.side,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **arguments,
        ).images[0]
        return 255 * image


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def run(checks: Checks) -> bool:
    """Run the checks and print a line for each. Whether all passed; a base that does not load ends it."""
    what: dict[str, Callable[[], str]] = {
        "the base loads and reads prompts": checks.loads,
        "parameter counts": checks.counts,
        "a T2I-Adapter as a Prime: the same features": checks.features,
        "a T2I-Adapter as a Prime: the same image": checks.same_image,
        "strength 0: the base's own image": checks.no_strength,
        "a training step": checks.trains,
    }
    passed = True
    for name, check in what.items():
        print(f"checking: {name} ...", file=sys.stderr, flush=True)
        try:
            print(f"pass  {name}: {check()}", flush=True)
        except (Failed, InvalidArgument, OSError, RuntimeError, ValueError) as error:
            passed = False
            print(f"FAIL  {name}: {one_line(error)}", flush=True)
            if check == checks.loads:
                return False
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Check; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="a folder, Hub id or .safetensors file")
    parser.add_argument("--base-variant", default="", help='which save of the base to read, such as "fp16"')
    parser.add_argument("--base-config", default="", help="for a file: a folder or Hub id with its configs")
    parser.add_argument("--t2i", default="", help="a T2I-Adapter: a folder, Hub id or file")
    parser.add_argument("--steps", type=int, default=5000, help="of the training to estimate (default: 5000)")
    parser.add_argument("--batch-size", type=int, default=8, help="of that training (default: 8)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="2 denoising steps, and a batch of 1")
    args = parser.parse_args(arguments)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return 0 if run(Checks(args, torch.device(device))) else 1


if __name__ == "__main__":
    sys.exit(main())
