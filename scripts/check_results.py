"""Check that raw results, their tables, and the tables in documents agree: `make check-results`.

    python scripts/check_results.py           # print a line per mismatch; exit status 1 if there are any
    python scripts/check_results.py --write   # update tables and documents

1. The tables in benchmarks/results are made again from the raw scores: the CSV and Markdown files of the
   studies from their .npz files, canny.md from canny.csv.
2. Documents contain tables between two comments. They are made again from the source in the first comment:

       <!-- generated: benchmarks/results/canny.md -->
       ...
       <!-- end generated -->

   The source is a path relative to the repository: a Markdown file, a section of it up to the next heading
   (`#canny` for "## canny"), or one of the files in `TABLES`.
3. Results that contain hashes of weights, or settings that belong to them, must match the installed weights.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/**/*.md")
BEGIN = re.compile(r"<!-- generated: (\S+) -->")
END = "<!-- end generated -->"

sys.path.insert(0, str(ROOT / "benchmarks"))


def main(arguments: list[str] | None = None) -> int:
    """Check everything and print a line per mismatch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update what differs")
    args = parser.parse_args(arguments)
    problems = []
    for name, text in result_tables():
        problems += check_text(RESULTS / name, text, args.write)
    for pattern in DOCUMENTS:
        for document in sorted(ROOT.glob(pattern)):
            problems += check_document(document, table_of, args.write)
    problems += check_weights()
    for problem in problems:
        print(problem)
    if not problems:
        print("results, tables and documents agree")
    return 1 if problems else 0


def check_text(path: Path, expected: str, write: bool = False) -> list[str]:
    """Return the mismatch of a whole file, if there is one; with `write`, update the file instead."""
    if path.is_file() and path.read_text() == expected:
        return []
    if write:
        path.write_text(expected)
        return []
    return [f"{shown(path)}: differs from the table made from the raw results"]


def check_document(document: Path, render: Callable[[str], str], write: bool = False) -> list[str]:
    """Return the mismatches of a document's generated blocks; with `write`, update them instead.

    Args:
        document: a Markdown file.
        render: source of a block -> its text; raises KeyError or OSError if there is no such table.
        write: update the document. Blocks that are not closed or have no table are unchanged and reported.
    """
    lines, problems, updated = document.read_text().splitlines(), [], []
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        updated.append(line)
        begin = BEGIN.fullmatch(line)
        if begin is None:
            continue
        where = f"{shown(document)}:{number}: {begin[1]}"
        end = next(
            (n for n in range(number, len(lines)) if lines[n] == END or BEGIN.fullmatch(lines[n])), None
        )
        if end is None or lines[end] != END:
            problems.append(f"{where}: no '{END}' follows")
            continue
        try:
            expected = render(begin[1]).strip("\n").splitlines()
        except (KeyError, OSError):
            problems.append(f"{where}: no such table")
            expected = lines[number:end]
        found = lines[number:end]
        if found != expected and not write:
            different = next(
                (n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None
            )
            at = min(len(found), len(expected)) if different is None else different
            problems.append(f"{where}: line {number + 1 + at} differs from the generated table")
        updated += expected if write else found
        number = end
    if write and updated != lines:
        document.write_text("\n".join(updated) + "\n")
    return problems


def shown(path: Path) -> str:
    """Return the path, relative to the repository if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def result_tables() -> Iterator[tuple[str, str]]:
    """Yield the name of each table in benchmarks/results and its text made from the raw results."""
    import blocks
    from canny import markdown_table

    from nexus_adapters.study.plan import Study
    from nexus_adapters.study.results import results_of
    from nexus_adapters.study.tables import losses_csv, study_csv, study_markdown

    for name in ("study", "ablations", "sweep"):
        study = Study(ROOT / "benchmarks" / "plans" / f"{name}.toml")
        results = results_of(study)
        if study.views():
            yield f"{name}.csv", study_csv(results)
            yield f"{name}.md", study_markdown(study, results)
        else:
            yield f"{name}.csv", losses_csv(results)
    with tempfile.TemporaryDirectory() as folder:
        study = blocks.plan_of(Path(folder), quick=False)
        results = results_of(study)
        results = {**blocks.of_the_study({cell.seed for cell in results}), **results}
        yield "blocks.csv", study_csv(results)
        yield "blocks.md", study_markdown(study, results)
    yield "canny.md", markdown_table(rows("canny.csv"), result("canny")["adapter_parameters"])


def check_weights() -> list[str]:
    """Return the results whose weights, settings or canny tables differ from the installed ones."""
    from machine import folder_hash

    from nexus_adapters.bundled import BUNDLED, weights_folder

    bundle, weights = BUNDLED["embedded"], weights_folder()
    hashes = {
        condition: {Path(folder).name: folder_hash(weights / folder) for folder in adapters.values()}
        for condition, adapters in bundle.adapters.items()
    }
    canny, chosen = result("canny"), result("chosen")
    pairs = [
        ("canny.json: base_sha256", canny["base_sha256"], folder_hash(bundle.folder)),
        ("canny.json: adapters_sha256", canny["adapters_sha256"], hashes["canny"]),
        ("chosen.json: package_sha256", chosen["settings"]["package_sha256"], hashes),
        (
            "chosen.json: form",
            chosen["measured"]["form"],
            {name: Path(bundle.adapters["canny"][name]).name for name in ("prime", "slim")},
        ),
        ("canny.json: guidance_scale", canny["sampling"]["guidance_scale"], bundle.guidance_scale),
        (
            "guidance.json: guidance_scale",
            result("guidance")["measured"]["guidance_scale"],
            bundle.guidance_scale,
        ),
    ]
    for name in ("guidance", "balances", "fading", "ways"):
        found = result(name)["settings"]["weights_sha256"]
        pairs.append(
            (f"{name}.json: weights_sha256", found, {part: folder_hash(weights / part) for part in found})
        )
    tables = canny["tables_sha256"]
    digests = {name: hashlib.sha256((RESULTS / name).read_bytes()).hexdigest() for name in tables}
    problems = [f"{name}: differs from the installed weights" for name, *pair in pairs if pair[0] != pair[1]]
    return problems + [f"canny.json: {name} has changed" for name in tables if tables[name] != digests[name]]


def table_of(source: str) -> str:
    """Return the table for the source of a generated block."""
    name, _, section = source.partition("#")
    if name in TABLES:
        return TABLES[name]()
    text = (ROOT / name).read_text()
    if not name.endswith(".md"):
        raise KeyError(name)
    if not section:
        return text
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in sections}[section]


def rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file in benchmarks/results."""
    with (RESULTS / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def result(name: str) -> dict[str, Any]:
    """Return the content of a JSON file in benchmarks/results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, *lines)).replace(
        "|\n", "|\n" + "|---" * len(heads) + "|\n", 1
    )


# Names of the study's methods in documents.
LABELS = {
    "prime+residual+heads8": "Prime, residual, eight heads",
    "slim+residual+heads8": "Slim, residual, eight heads",
    "prime+residual": "Prime, residual",
    "slim+residual": "Slim, residual",
    "prime": "Prime, paper configuration",
    "slim": "Slim, paper configuration",
    "controlnet-xs": "ControlNet-XS",
    "controlnet": "ControlNet",
}


def points_table() -> str:
    """Return colors and edges of the study's methods, in points above T2I-Adapter; italics if maybe zero."""
    from nexus_adapters.study.plan import OWN, Study
    from nexus_adapters.study.results import results_of
    from nexus_adapters.study.tables import rows_of

    results = results_of(Study(ROOT / "benchmarks" / "plans" / "study.toml"))
    conditions = ["canny", "sketch", "segmentation", "depth"]
    tables = {each: {row.method: row for row in rows_of(results, each, OWN)} for each in conditions}
    lines = []
    for metric, name in (("binding_color", "colors"), ("edge_f1", "edge F1")):
        for method, label in LABELS.items():
            line = [f"{name}, {label}"]
            for condition in conditions:
                difference = tables[condition][method].minus(tables[condition]["t2i"])
                assert difference is not None
                estimate = difference.estimate(metric)
                value = f"{100 * estimate.value:+.1f}"
                line.append(value if estimate.excludes_zero else f"*{value}*")
            lines.append(line)
    return markdown(["Points above T2I-Adapter", *conditions], lines)


# README's rows: method in study.csv -> what README calls it.
SUMMARY = {
    "slim+residual+heads8": "Nexus Slim",
    "prime+residual+heads8": "Nexus Prime",
    "t2i": "T2I-Adapter",
    "t2i+cond_only+fades_half": "T2I-Adapter, recommended settings",
    "controlnet": "ControlNet",
}


def summary_table() -> str:
    """Colors, edges and cost of four methods on canny, as means over all seeds that were trained."""
    lines = []
    for method, label in SUMMARY.items():
        found: dict[str, list[float]] = {}
        for row in rows("study.csv"):
            if (row["method"], row["condition"]) == (method, "canny"):
                found.setdefault(row["metric"], []).append(float(row["value"]))
        mean = {metric: sum(values) / len(values) for metric, values in found.items()}
        lines.append(
            [
                label,
                f"{100 * mean['binding_color']:.1f}",
                f"{100 * mean['edge_f1']:.1f}",
                f"{mean['parameters'] / 1e6:.2f}M",
                f"{mean['gmacs']:.2f}",
            ]
        )
    heads = ["Adapter", "Colors, %", "Edges, %", "Parameters", "Multiplications per image, billions"]
    return markdown(heads, lines)


def sweep_table() -> str:
    """Return the loss of each method at each learning rate; the lowest is bold."""
    losses: dict[str, dict[str, float]] = {}
    for row in rows("sweep.csv"):
        method, _, rate = row["method"].partition("@")
        losses.setdefault(method, {})[rate] = float(row["val_loss_as_trained"])
    rates = sorted({rate for found in losses.values() for rate in found}, key=float)
    lines = []
    for method, found in losses.items():
        shown_losses = {rate: f"{loss:.4f}" for rate, loss in found.items()}
        best = min(found, key=lambda rate: found[rate])
        shown_losses[best] = f"**{shown_losses[best]}**"
        lines.append([method, *(shown_losses.get(rate, "") for rate in rates)])
    return markdown(["Method", *rates], lines)


def ways_table() -> str:
    """Return the default's value of each metric, and the difference with `cond_only` and fading features."""
    shared = {
        "edge_f1": "edge F1 ↑", "binding_color": "binding color ↑", "binding_material": "binding material ↑",
        "ms_ssim": "MS-SSIM ↑", "clip_score": "CLIP score ↑", "frechet": "Fréchet ↓",
    }  # fmt: skip
    own = {"depth_rank_correlation": "rank corr.", "mean_iou": "mIoU", "sketch_ms_ssim": "sketch MS-SSIM"}
    lines = []
    for condition, adapters in result("ways")["measured"].items():
        for adapter, found in adapters.items():
            line = [condition, adapter.removesuffix("-residual")]
            line += [_value_and_difference(found, metric) for metric in shared]
            line.append(
                "".join(f"{own[m]} {_value_and_difference(found, m)}" for m in own if m in found["default"])
            )
            lines.append(line)
    return markdown(["Map", "Adapter", *shared.values(), "the map's own"], lines)


def _value_and_difference(found: Mapping[str, Any], metric: str) -> str:
    apart = found["minus_default"][metric]
    digits = 2 if metric == "frechet" else 3
    difference = f"{apart['value']:+.{digits}f}"
    is_one = apart["low"] > 0 or apart["high"] < 0
    return f"{found['default'][metric]:.{digits}f} {f'**{difference}**' if is_one else difference}"


def fading_table() -> str:
    """Return the best factor of two adapters' features and the noise's share of variance, by timestep."""
    found = result("fading")["measured"]
    timesteps = list(found["noise_share"])
    labels = {"t2i": "t2i", "prime-residual": "Prime, residual, eight heads"}
    lines = [
        [f"best factor, {label}", *(f"{found['best_factor'][adapter][t]:g}" for t in timesteps)]
        for adapter, label in labels.items()
    ]
    shares = [f"{found['noise_share'][t]:.2f}" for t in timesteps]
    return markdown(["Timestep", *timesteps], [*lines, ["noise's share, 1 - alphas_cumprod", *shares]])


def sd15_cost_table() -> str:
    """Return the cost of a cell of the study on Stable Diffusion 1.5."""
    heads = [
        "Method", "Weights", "GMACs a trained sample", "GMACs a picture", "Hours a cell on one H100",
        "Days a cell on this CPU",
    ]  # fmt: skip
    lines = [
        [
            method,
            f"{found['parameters'] / 1e6:.1f}M",
            f"{found['gmacs_per_trained_sample']:,.0f}",
            f"{found['gmacs_per_picture']:,.0f}",
            f"{found['gpu_hours_per_cell']:.1f}",
            f"{found['hours_per_cell'] / 24:.0f}",
        ]
        for method, found in result("sd15_cost")["measured"]["methods"].items()
    ]
    return markdown(heads, lines)


def from_t2i_table() -> str:
    """Colors and edge F1 of adapters that start from a T2I-Adapter, or from scratch, by training steps."""
    import from_t2i

    return from_t2i.markdown_table(from_t2i.Store(RESULTS / "from_t2i.npz", RESULTS).read())


TABLES: dict[str, Callable[[], str]] = {
    "benchmarks/results/from_t2i.npz": from_t2i_table,
    "benchmarks/results/study.csv": summary_table,
    "benchmarks/results/study.npz": points_table,
    "benchmarks/results/sweep.csv": sweep_table,
    "benchmarks/results/ways.json": ways_table,
    "benchmarks/results/fading.json": fading_table,
    "benchmarks/results/sd15_cost.json": sd15_cost_table,
}

if __name__ == "__main__":
    sys.exit(main())
