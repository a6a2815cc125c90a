"""The report of an evaluation: a Markdown table, and an HTML page with the images side by side."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from nexus_adapters.data.sample_page import thumbnail
from nexus_adapters.evaluation.config import LEAST_FOR_INTERVALS
from nexus_adapters.evaluation.estimates import (
    REFERENCE,
    Estimate,
    Evaluation,
    Measured,
    batches,
    best_beyond_doubt,
    result_json,
)
from nexus_adapters.evaluation.store import Store
from nexus_adapters.files import write_text
from nexus_adapters.metrics import METRICS, find_metric

RESULTS, TABLE, PAGE, SCORES = "results.json", "report.md", "report.html", "scores.csv"
Rows = dict[str, dict[str, tuple[Estimate, bool]]]  # method -> metric -> estimate, and whether it is bold
ROWS = 16  # rows of images
_SIDE = 160  # pixels; side of a thumbnail
DATA_NAMES = {
    "folder": "a folder",
    "prepared": "a prepared set",
    "table": "a table",
    "tars": "tars",
    "scenes": "the embedded scenes",
}
_ARROWS = {"higher": " ↑", "lower": " ↓", "unknown": ""}

_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
  max-width: max(90rem, {width}px); color: #1a1a1a; }}
h1 {{ font-size: 1.3rem; margin: 0 0 .4rem; }}
p {{ margin: .2rem 0; color: #555; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1.2rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
td small {{ color: #777; }}
.grid td {{ border: 0; padding: 0 8px 2px 0; }}
.grid th {{ border: 0; padding: 0 8px .3rem 0; text-align: left; }}
.grid td.prompt {{ text-align: left; white-space: normal; color: #555; padding-bottom: 1rem;
  font-size: 14px; }}
img {{ display: block; width: {side}px; height: auto; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<div class="scroll">{table}</div>
<p>{legend}</p>
<div class="scroll"><table class="grid"><tr>{heads}</tr>
{rows}
</table></div>
</html>
"""


def write_report(found: Evaluation) -> str:
    """Write `RESULTS`, `TABLE`, `PAGE` and `SCORES` into the evaluation's folder. Returns the table."""
    rows = rows_of({name: method.measured for name, method in found.methods.items()})
    texts = {
        RESULTS: json.dumps(result_json(found), indent=2) + "\n",
        TABLE: markdown(found, rows),
        PAGE: page(found, rows),
        SCORES: scores_csv(found),
    }
    for name, text in texts.items():
        write_text(found.folder / name, text)
    return texts[TABLE]


def markdown(found: Evaluation, table: Rows) -> str:
    """Return the settings in a sentence, the table, and how to read it, as Markdown."""
    heads = ["Method", "Parameters", *(head(metric) for metric in _metrics(found))]
    lines = [f"# Evaluation\n\n{_summary(found)}\n", "| " + " | ".join(heads) + " |"]
    lines.append("|---" * len(heads) + "|")
    for name, cells in table.items():
        count = found.methods[name].parameters
        shown = [_cell(*cells[metric]) if metric in cells else "" for metric in _metrics(found)]
        lines.append("| " + " | ".join([name, f"{count / 1e6:.2f}M" if count else "", *shown]) + " |")
    return "\n".join([*lines, "", _legend(found)]) + "\n"


def rows_of(measured: Mapping[str, Measured]) -> Rows:
    """Return all estimates and whether each is the best beyond doubt; `REFERENCE` is not compared."""
    competing = {name: each for name, each in measured.items() if name != REFERENCE}
    metrics = {metric for each in measured.values() for metric in each.metrics}
    best = {metric: best_beyond_doubt(competing, metric) for metric in metrics}
    return {
        name: {metric: (estimate, best[metric] == name) for metric, estimate in each.estimates().items()}
        for name, each in measured.items()
    }


def scores_csv(found: Evaluation) -> str:
    """Return the scores of all images as CSV, with one line per method and image."""
    metrics = [m for m in _metrics(found) if any(m in e.measured.scores for e in found.methods.values())]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "place", *metrics])
    for name, method in found.methods.items():
        scores = method.measured.scores
        for place in range(len(found.cases)):
            cells = [f"{scores[metric][place]:.6g}" if metric in scores else "" for metric in metrics]
            writer.writerow([name, place, *cells])
    return stream.getvalue()


def page(found: Evaluation, table: Rows) -> str:
    """Return an HTML page with the table, and maps, originals and all methods' images side by side."""
    names = [name for name in found.methods if name != REFERENCE]
    size = int(found.settings["batch_size"])
    count = min(ROWS, len(found.cases))
    chosen = [row * len(found.cases) // count for row in range(count)]
    whole = batches(len(found.cases), size)
    shown: dict[tuple[str, int], Image.Image] = {}
    for name in names:
        store = Store(found.folder / name, "")
        for places in whole:
            wanted = [place for place in chosen if place in places]
            images = store.images(places) if wanted else None
            if images is not None:  # else damaged; the same command generates them again
                shown |= {(name, place): images[place - places.start] for place in wanted}
    return _HTML.format(
        title=f"Evaluation on {html.escape(str(found.settings['data']['condition']))}",
        width=(_SIDE + 8) * (len(names) + 2),
        side=_SIDE,
        summary=html.escape(_summary(found)),
        table=_html_table(found, table),
        legend=html.escape(_legend(found)),
        heads="".join(f"<th>{html.escape(name)}</th>" for name in ("map", "original", *names)),
        rows="\n".join(_html_row(found, place, shown, names) for place in chosen),
    )


def in_order(metrics: Iterable[str]) -> list[str]:
    """Return the metrics without repetitions: those in `METRICS` in that order, then the others."""
    names = dict.fromkeys(metrics)
    return [name for name in METRICS if name in names] + [name for name in names if name not in METRICS]


def head(metric: str) -> str:
    """Return a metric's label with an arrow for whether higher or lower is better, if that is known."""
    found = find_metric(metric)
    return f"{found.label}{_ARROWS[found.better]}"


def _html_row(
    found: Evaluation, place: int, shown: Mapping[tuple[str, int], Image.Image], names: Sequence[str]
) -> str:
    case = found.cases[place]
    cells = [_image(case.condition, "map"), _image(case.original, "original")]
    for name in names:
        scores = found.methods[name].measured.scores
        numbers = ", ".join(f"{metric} {values[place]:.3g}" for metric, values in scores.items())
        there = (name, place) in shown
        cells.append(_image(shown[name, place], f"{name}: {numbers}") if there else "(damaged)")
    words = html.escape(case.prompt) or "(no prompt)"
    return (
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        f'<tr><td class="prompt" colspan="{len(cells)}">{words} <small>{html.escape(case.key)}</small></td>'
        "</tr>"
    )


def _image(image: Image.Image, title: str) -> str:
    data = thumbnail(image, 2 * _SIDE)
    return f'<img src="data:image/webp;base64,{data}" title="{html.escape(title)}" alt="">'


def _html_table(found: Evaluation, table: Rows) -> str:
    heads = "".join(f"<th>{html.escape(head(metric))}</th>" for metric in _metrics(found))
    lines = [f"<table><tr><th>Method</th><th>Parameters</th>{heads}</tr>"]
    for name, cells in table.items():
        count = found.methods[name].parameters
        shown = "".join(f"<td>{_html_cell(cells.get(metric))}</td>" for metric in _metrics(found))
        size = f"{count / 1e6:.2f}M" if count else ""
        lines.append(f"<tr><td>{html.escape(name)}</td><td>{size}</td>{shown}</tr>")
    return "\n".join([*lines, "</table>"])


def _html_cell(cell: tuple[Estimate, bool] | None) -> str:
    if cell is None:
        return ""
    estimate, is_best = cell
    value = f"<b>{estimate.value:.3f}</b>" if is_best else f"{estimate.value:.3f}"
    return f"{value} <small>{between(estimate)}</small>" if estimate.interval else value


def _cell(estimate: Estimate, is_best: bool) -> str:
    value = f"**{estimate.value:.3f}**" if is_best else f"{estimate.value:.3f}"
    return f"{value} ({between(estimate)})" if estimate.interval else value


def between(estimate: Estimate) -> str:
    """Return the ends of an estimate's interval as text; "" without one."""
    return "{:.3f} to {:.3f}".format(*estimate.interval) if estimate.interval else ""


def _metrics(found: Evaluation) -> list[str]:
    """All metrics that any method has."""
    return in_order(name for method in found.methods.values() for name in method.measured.metrics)


def _summary(found: Evaluation) -> str:
    settings = found.settings
    prompts = {"own": "their own prompts", "empty": "no prompt", "contradicting": "contradicting prompts"}
    return (
        f"{len(found.cases)} samples of {DATA_NAMES[settings['data']['kind']]} with maps of "
        f"{settings['data']['condition']} and {prompts[settings['prompts']]}; "
        f"{settings['num_inference_steps']} steps, guidance scale {settings['guidance_scale']:g}, "
        f"policy {settings['policy']}, seed {settings['seed']}, {settings['dtype']}." + _judges(found)
    )


def _judges(found: Evaluation) -> str:
    """The models that the scores depend on."""
    config = found.config
    judges = {"CLIP": config.clip, "features": config.features}
    judges["maps extracted with"] = ", ".join(f"{key}={value}" for key, value in config.judge.items())
    named = "; ".join(f"{name} {model}" for name, model in judges.items() if model)
    return f" Judges: {named}." if named else ""


def _legend(found: Evaluation) -> str:
    if len(found.cases) < LEAST_FOR_INTERVALS:
        intervals = f"Intervals and a best method require at least {LEAST_FOR_INTERVALS} samples."
    else:
        intervals = (
            "Values in parentheses are 95 % intervals over the samples. Bold marks a method that is better "
            "than every other one, with intervals of all paired differences that exclude zero."
        )
    parts = [
        f"{intervals} The row reference scores the original images of the data in the same way; its distance "
        "from a perfect score is due to the judges."
    ]
    if any(method.measured.distances for method in found.methods.values()):
        parts.append(
            "Distances get smaller with more samples; compare only those with the same number of samples and "
            "the same features."
        )
    return " ".join(parts)
