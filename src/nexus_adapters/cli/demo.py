"""`nexus demo`: write a sheet of images that shows what the embedded adapters do, with their scores."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters import __version__
from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.choices import MAX_SEED, MAX_STEPS
from nexus_adapters.cli.options import (
    add_options,
    check_output,
    save_json,
    save_png,
)
from nexus_adapters.errors import InvalidArgument, expect, expect_between, expect_finite
from nexus_adapters.files import files_sha256
from nexus_adapters.library_logs import library_logs_as_warnings

if TYPE_CHECKING:
    from nexus_adapters.cli.demo_sheet import Method, Result
    from nexus_adapters.evaluation.generation import Sampling


EXAMPLES = (
    "nexus demo",
    "nexus demo --condition segmentation --out segmentation",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus demo`."""
    parser.add_argument(
        "--out", default="demo", metavar="DIR", help="folder for demo.png and demo.json (default: demo)"
    )
    add_options(parser, "--force", "--condition", "--steps", "--seed")
    scale = BUNDLED[EMBEDDED].guidance_scale
    add_options(parser, "--guidance", help=f"guidance scale (default: {scale:g}, as for the embedded base)")


def run(args: argparse.Namespace) -> int:
    """Generate the images with every method, score them, write the sheet, and print the mean scores."""
    started_s = time.perf_counter()
    expect_between("--steps", args.steps, 1, MAX_STEPS)
    expect_between("--seed", args.seed, 0, MAX_SEED)
    if args.guidance is not None:
        expect_finite("--guidance", args.guidance)
    condition_name: str = args.condition
    BUNDLED[EMBEDDED].adapter("prime", condition_name)  # fails before the output folder is created
    png, json = output_files(Path(args.out), args.force)

    with library_logs_as_warnings():
        from nexus_adapters.cli.demo_sheet import (
            SCENE_SEEDS,
            demo_scenes,
            draw_sheet,
            generate_all,
            lay_out,
            load_methods,
            sampling_of,
        )

        base, methods = load_methods(condition_name)
        sampling = sampling_of(args.steps, args.guidance, args.seed)
        maps = [demo_scenes(seed, condition_name) for seed in SCENE_SEEDS]
        results = generate_all(base, methods, maps, sampling)
    settings = settings_of(sampling, methods, condition_name)
    sheet = draw_sheet(lay_out(maps, results, sampling, condition_name))
    save_png(png, sheet, settings, args.force)
    report = report_of(settings, results, time.perf_counter() - started_s)
    save_json(json, report, args.force)
    print(f"{png}\n{json}\n")
    print(table(report["mean"]))
    return 0


def output_files(folder: Path, force: bool) -> tuple[Path, Path]:
    """Return the paths of demo.png and demo.json in `folder`, checked; create the folder if it is missing."""
    expect(folder.is_dir() or not folder.exists(), "--out", "a folder", f"'{folder}', which is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument("--out", "a folder", f"'{folder}' ({error.strerror})") from error
    return check_output(folder / "demo.png", ".png", force), check_output(
        folder / "demo.json", ".json", force
    )


def settings_of(sampling: "Sampling", methods: Sequence["Method"], condition_name: str) -> dict[str, Any]:
    """Return everything needed to generate the images again.

    `weights_sha256` holds the hash of each adapter's tensors and of the base's UNet file.
    """
    from nexus_adapters.adapter.saved import find_saved
    from nexus_adapters.bases.loading import BaseSource, denoiser_files
    from nexus_adapters.cli.demo_sheet import SETTINGS
    from nexus_adapters.evaluation.provenance import versions

    hashes = {
        method.name: files_sha256(denoiser_files(BaseSource()))
        if method.adapter_name is None
        else find_saved(method.adapter_name, condition_name).sha256()
        for method in methods
    }
    return {
        "version": __version__,
        "command": "demo",
        "condition": condition_name,
        "steps": sampling.steps,
        "guidance": sampling.guidance_scale,
        "seed": sampling.seed,
        "policy": SETTINGS.policy,
        "noise_exponent": SETTINGS.noise_exponent,
        "weights_sha256": hashes,
        "versions": versions(),
    }


def report_of(settings: Mapping[str, Any], results: Sequence["Result"], total_s: float) -> dict[str, Any]:
    """Return the content of demo.json."""
    from nexus_adapters.evaluation.provenance import machine, peak_memory_gib

    return {
        **settings,
        "machine": machine(),
        "total_s": round(total_s, 2),
        "peak_memory_gib": peak_memory_gib(),
        "methods": {
            result.method.name: {
                "adapter": result.method.adapter_name,
                "parameters": result.method.parameters,
                "generation_s": round(result.generation_s, 2),
            }
            for result in results
        },
        "mean": {result.method.name: result.mean_scores() for result in results},
        "images": [row for result in results for row in result.rows()],
    }


def table(mean: Mapping[str, Mapping[str, float]]) -> str:
    """Format the mean scores as percentages, one line per method."""
    metrics = list(next(iter(mean.values())))
    lines = ["mean over images, %    " + "".join(f"{name:>18}" for name in metrics)]
    for method, scores in mean.items():
        lines.append(f"{method:23}" + "".join(f"{100 * scores[name]:>18.0f}" for name in metrics))
    return "\n".join(lines)
