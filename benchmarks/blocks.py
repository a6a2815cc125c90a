"""Other blocks of about the same size, beside the one with the skip: is there one that wins on all?

    python benchmarks/blocks.py

Each block takes the place of Prime's and Slim's stage (with `residual`), is trained and drawn with as a cell
of benchmarks/plans/study.toml on canny, and is told beside what that study has of T2I-Adapter and of both as
they are. Goes on where it was stopped, and does not notice where a block was changed: then delete its files
in results/blocks and below the cache folder, in nexus-adapters/study/blocks. Writes results/blocks.csv, .md
and .json.

    gate       the attention's share is weighed for each pixel and channel, by a sigmoid of the pixel
    gate-level the attention's share is weighed for each level, by one number
    first      attention before the two residual units, so that they see what was read
    film       no attention: the prompt's mean scales and shifts the channels between the two units
    twice      a second attention after that of the coarsest level
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tomli_w
import torch
from jaxtyping import Float
from machine import RESULTS, benchmark_parser, report, write_whole
from torch import Tensor, nn

from nexus_adapters.adapter import block, model
from nexus_adapters.adapter.block import Stage, TextCrossAttention, Trunk
from nexus_adapters.evaluation.study.cells import run_study
from nexus_adapters.evaluation.study.plan import Cell, CellGroup, Study
from nexus_adapters.evaluation.study.report import results_of
from nexus_adapters.evaluation.study.results import CellResult
from nexus_adapters.evaluation.study.tables import study_csv, study_markdown

PLAN = Path(__file__).parent / "plans" / "study.toml"
BESIDE = ("t2i", "prime+residual", "slim+residual")  # of the study
VARIANTS = BESIDE[1:]
SEEDS = (0, 1, 2)


class OtherStage(Stage):
    """A stage whose `refine` does what `Stage` does between widening and the feature."""

    def forward(
        self, x: Float[Tensor, "b c_in h_in w_in"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """As `Stage`'s."""
        return self.refine(self.widen(x), prompt_embeds).contiguous()

    def refine(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Convolve, then read."""
        return self.read(self.resnets(x), prompt_embeds)

    def read(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """The input and the attention's share."""
        pixels = x.flatten(2).transpose(1, 2).contiguous()
        normed = self.norm1(pixels)
        read = self.weigh(self.cross_attention(normed, prompt_embeds), normed)
        return (pixels + read).transpose(1, 2).unflatten(2, x.shape[2:])

    def weigh(self, attended: Float[Tensor, "b p c"], normed: Float[Tensor, "b p c"]) -> Tensor:
        """The attention's share."""
        return attended


class Gate(OtherStage):
    """`2 sigmoid(W normed + b)` times the attention; 1 at the start."""

    def __init__(self, in_channels: int, channels: int, **options: Any) -> None:
        super().__init__(in_channels, channels, **options)
        self.gate = nn.Linear(channels, channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def weigh(self, attended: Float[Tensor, "b p c"], normed: Float[Tensor, "b p c"]) -> Tensor:
        """By pixel and channel."""
        return 2 * torch.sigmoid(self.gate(normed)) * attended


class GateLevel(OtherStage):
    """One weight times the attention; 1 at the start."""

    def __init__(self, in_channels: int, channels: int, **options: Any) -> None:
        super().__init__(in_channels, channels, **options)
        self.gate = nn.Parameter(torch.ones(1))

    def weigh(self, attended: Float[Tensor, "b p c"], normed: Float[Tensor, "b p c"]) -> Tensor:
        """By one number."""
        return self.gate * attended


class First(OtherStage):
    """Attention, then the residual units."""

    def refine(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Read, then convolve."""
        refined: Tensor = self.resnets(self.read(x, prompt_embeds))
        return refined


class Film(OtherStage):
    """The prompt's mean scales and shifts, in place of attention."""

    def __init__(self, in_channels: int, channels: int, **options: Any) -> None:
        super().__init__(in_channels, channels, **options)
        del self.cross_attention, self.norm1
        self.film = nn.Linear(options["text_width"], 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def refine(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Between the two residual units."""
        scale, shift = self.film(prompt_embeds.mean(dim=1))[..., None, None].chunk(2, dim=1)
        refined: Tensor = self.resnets[1](self.resnets[0](x) * (1 + scale) + shift)
        return refined


class Again(OtherStage):
    """Two attentions, one after the other."""

    def __init__(self, in_channels: int, channels: int, **options: Any) -> None:
        super().__init__(in_channels, channels, **options)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        parts = (options["text_width"], options["heads"], options["head_width"])
        self.cross_attention2 = TextCrossAttention(channels, *parts)

    def read(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """What the first found is what the second asks by."""
        pixels = super().read(x, prompt_embeds).flatten(2).transpose(1, 2)
        again = pixels + self.cross_attention2(self.norm2(pixels), prompt_embeds)
        return again.transpose(1, 2).unflatten(2, x.shape[2:])


class Twice(Trunk):
    """`Again` at the coarsest level."""

    def __init__(
        self, in_channels: int, channels: Sequence[int], pools: Sequence[int], unshuffle: int, **options: Any
    ) -> None:
        super().__init__(in_channels, channels, pools, unshuffle, **options)
        self.body[-1] = Again((channels[0], *channels)[-2], channels[-1], pools=int(pools[-1]), **options)


BLOCKS: dict[str, type[nn.Module]] = {
    "gate": Gate,
    "gate-level": GateLevel,
    "first": First,
    "film": Film,
    "twice": Twice,
}


@contextmanager
def built_with(kind: type[nn.Module]) -> Iterator[None]:
    """While open, adapters are built with another stage, or another trunk."""
    is_trunk = issubclass(kind, Trunk)
    with patch.object(model if is_trunk else block, "Trunk" if is_trunk else "Stage", kind):
        yield


def plan_of(folder: Path, quick: bool) -> Study:
    """The study's plan with the blocks as methods and nothing beside them, written below `folder`."""
    plan: dict[str, Any] = tomllib.loads(PLAN.read_text())
    plan["recipe"] = str((PLAN.parent / plan["recipe"]).resolve())
    plan["results"] = str(RESULTS / "blocks")
    plan["methods"] = {BESIDE[0]: plan["methods"][BESIDE[0]]} | {
        f"{variant}+{name}": plan["methods"][variant] for variant in VARIANTS for name in BLOCKS
    }
    seeds = SEEDS[:1] if quick else SEEDS
    plan["cells"] = [{"conditions": ["canny"], "methods": list(plan["methods"])[1:], "seeds": list(seeds)}]
    if quick:
        plan |= {"results": str(folder / "results"), "folder": str(folder / "study"), "views": {}}
        plan["train"] |= {"training": {"max_train_steps": 1, "batch_size": 2}, "data": {"count": 4}}
        plan["train"] |= {"cache": {"enabled": False}, "validation": {"every_steps": 0}}
        plan["evaluate"] = {"data": plan["evaluate"]["data"] | {"count": 2}, "num_inference_steps": 1}
    path = folder / "blocks.toml"
    path.write_text(tomli_w.dumps(plan))
    return Study(path)


def of_the_study(seeds: set[int]) -> dict[Cell, CellResult]:
    """What the study has measured of the methods that the blocks are told beside, from these seeds."""
    cells = [Cell("canny", method, seed) for method in BESIDE for seed in sorted(seeds)]
    found = results_of(Study(PLAN))
    return {cell: found[cell] for cell in cells if cell in found}


def main(arguments: list[str] | None = None) -> None:
    """Train and draw what is not done, and tell it."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--blocks", nargs="*", choices=list(BLOCKS), default=list(BLOCKS), help="none: tell what is done"
    )
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        study = plan_of(Path(temporary), args.quick)
        whole = study.plan
        for cell in study.cells():
            name = cell.method.rpartition("+")[2]
            if name in args.blocks:
                study.plan = replace(
                    whole, cells=(CellGroup((cell.condition,), (cell.method,), (cell.seed,)),)
                )
                with built_with(BLOCKS[name]):
                    run_study(study)
        study.plan = whole
        blocks = dict(results_of(study))
        results = ({} if args.quick else of_the_study({cell.seed for cell in blocks})) | blocks
        out = args.out or (None if args.quick else RESULTS)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "blocks.csv", study_csv(results))
            write_whole(out / "blocks.md", study_markdown(study, results))
        told = {cell.name: {"facts": result.facts, **result.made_with} for cell, result in results.items()}
    report("blocks", args, {"plan": PLAN.name}, {"cells": told})


if __name__ == "__main__":
    main()
