"""A study's tables: a CSV with a row per cell and metric, and Markdown tables of methods."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nexus_adapters.evaluation.config import LEAST_FOR_INTERVALS
from nexus_adapters.evaluation.estimates import Estimate, Measured, best_beyond_doubt, mean_of
from nexus_adapters.evaluation.report import between, head, in_order
from nexus_adapters.evaluation.run import BASE_ALONE
from nexus_adapters.study.plan import OWN, Study
from nexus_adapters.study.results import Results

FIELDS = ("method", "condition", "seed", "metric", "value", "low", "high", "n")
# Omitted from the table of single trainings: redundant with another column, or nearly constant.
_NOT_BY_SEED = ("mmd", "background")
VIEW_COLUMNS = ("binding_color", "binding_material", "edge_f1", "clip_score")
_FACTS = ("parameters", "gmacs")  # facts of a cell, in addition to the metrics of its images


@dataclass(frozen=True)
class Row:
    """A method in a table. `trainings` maps seeds to the measurements of the training with that seed."""

    method: str
    parameters: float
    gmacs: float
    trainings: Mapping[int, Measured]

    @cached_property
    def measured(self) -> Measured:
        """The mean over its seeds, image by image."""
        return mean_of(list(self.trainings.values()))

    def minus(self, other: Row) -> Measured | None:
        """Return the paired difference over the seeds of both; None if they have none in common.

        The base has no seeds and is compared to all.
        """
        if BASE_ALONE in (self.method, other.method):
            return self.measured.minus(other.measured)
        shared = [seed for seed in self.trainings if seed in other.trainings]
        if not shared:
            return None
        return mean_of([self.trainings[seed].minus(other.trainings[seed]) for seed in shared])


def study_csv(results: Results) -> str:
    """Return a CSV with one row per cell and metric; in views other than "own" the metric is `METRIC@VIEW`.

    `low` and `high` are empty if there are too few images for an interval.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(FIELDS)
    for cell, result in results.items():
        head = (cell.method, cell.condition, cell.seed)
        for fact in _FACTS:
            if fact in result.facts:
                value = f"{result.facts[fact]:.6g}"
                writer.writerow((*head, fact, value, value, value, 1))
        for view, measured in result.views.items():
            for metric, estimate in measured.estimates().items():
                name = metric if view == OWN else f"{metric}@{view}"
                ends = (estimate.value, estimate.low, estimate.high)
                numbers = ("" if number is None else f"{number:.5g}" for number in ends)
                writer.writerow((*head, name, *numbers, estimate.n))
    return stream.getvalue()


def losses_csv(results: Results) -> str:
    """Return a CSV for a study without images, with the validation loss at the end of each training.

    `val_loss` is the mean over the schedule; `val_loss_as_trained` is weighted as training samples it.
    """
    lines = ["method,condition,seed,parameters,val_loss,val_loss_as_trained"]
    for cell, result in results.items():
        facts = result.facts
        lines.append(
            f"{cell.method},{cell.condition},{cell.seed},{facts.get('parameters', 0):.0f},"
            f"{facts.get('val_loss', float('nan')):.6f},{facts.get('val_loss_as_trained', float('nan')):.6f}"
        )
    return "\n".join(lines) + "\n"


def rows_of(results: Results, condition: str, view: str) -> list[Row]:
    """Return the methods that were measured for a condition in a view, in the order of the results."""
    methods = dict.fromkeys(cell.method for cell in results if cell.condition == condition)
    rows = []
    for method in methods:
        found = {
            cell: result
            for cell, result in results.items()
            if (cell.method, cell.condition) == (method, condition) and view in result.views
        }
        if found:
            first = next(iter(found.values()))
            parameters, gmacs = (first.facts.get(fact, 0.0) for fact in _FACTS)
            trainings = {cell.seed: result.views[view] for cell, result in found.items()}
            rows.append(Row(method, parameters, gmacs, trainings))
    return rows


def study_markdown(study: Study, results: Results) -> str:
    """Return, for each condition, Markdown tables of methods, differences, differences by seed, and views."""
    parts = []
    for condition in dict.fromkeys(cell.condition for cell in results):
        parts.append(f"## {condition}")
        rows = rows_of(results, condition, OWN)
        parts.append(_table(rows, _metrics(row.measured for row in rows), with_cost=True))
        differences = _differences_by_seed(results, condition, study.plan.compare_to)
        parts.append(_difference_table(differences, study.plan.compare_to))
        parts.append(_seed_table(differences, study.plan.compare_to))
        for view in study.plan.views:
            if rows := rows_of(results, condition, view):
                parts.append(f"### {condition}, {view}\n\n" + _table(rows, VIEW_COLUMNS, with_cost=False))
    parts.append(_legend(study, results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: Sequence[Row], columns: Sequence[str], with_cost: bool) -> str:
    shown = [metric for metric in columns if any(metric in row.measured.metrics for row in rows)]
    best = {metric: best_method(rows, metric) for metric in shown}
    cost = ["Parameters", "GMACs"] if with_cost else []
    heads = ["Method", "Seeds", *cost, *(head(metric) for metric in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.method, ", ".join(map(str, row.trainings)) if row.method != BASE_ALONE else ""]
        if with_cost:
            cells += [f"{row.parameters / 1e6:.2f}M", f"{row.gmacs:.2f}"] if row.parameters else ["", ""]
        for metric in shown:
            has_it = metric in row.measured.metrics
            cells.append(_cell(row.measured.estimate(metric), best[metric] == row.method) if has_it else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _metrics(measured: Iterable[Measured]) -> list[str]:
    """The metrics that any of them has, in the order of tables."""
    return in_order(metric for each in measured for metric in each.metrics)


def best_method(rows: Sequence[Row], metric: str) -> str | None:
    """Return the method that is better than every other over the seeds of both; None if that is in doubt."""
    by_method = {row.method: row for row in rows}
    return best_beyond_doubt(
        {method: row.measured for method, row in by_method.items()},
        metric,
        lambda one, other: by_method[one].minus(by_method[other]),
    )


def _differences_by_seed(results: Results, condition: str, reference: str) -> dict[str, dict[int, Measured]]:
    """Method -> seed -> the difference to the reference's training with the same seed, image by image."""
    found: dict[str, dict[int, Measured]] = {}
    for cell, result in results.items():
        other = results.get(cell._replace(method=reference))
        if cell.condition == condition and other is not None and cell.method not in (reference, BASE_ALONE):
            found.setdefault(cell.method, {})[cell.seed] = result.views[OWN].minus(other.views[OWN])
    return found


def _difference_table(differences: Mapping[str, Mapping[int, Measured]], reference: str) -> str:
    """Each method's difference to the reference over the seeds of both; empty if there are no methods."""
    if not differences:
        return ""
    means = {method: mean_of(list(each.values())) for method, each in differences.items()}
    shown = _metrics(means.values())
    heads = [f"Minus {reference}", *(head(metric) for metric in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, measured in means.items():
        estimates = [measured.estimate(metric) if metric in measured.metrics else None for metric in shown]
        cells = ["" if each is None else _cell(each, each.excludes_zero, sign="+") for each in estimates]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def _seed_table(differences: Mapping[str, Mapping[int, Measured]], reference: str) -> str:
    """The difference of each single training; empty if no method has several seeds."""
    rows = {method: each for method, each in differences.items() if len(each) > 1}
    if not rows:
        return ""
    measured = [each for seeds in rows.values() for each in seeds.values()]
    shown = [metric for metric in _metrics(measured) if metric not in _NOT_BY_SEED]
    heads = [f"Minus {reference}, each seed", "Seeds", *(head(metric) for metric in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, seeds in rows.items():
        cells = [method, ", ".join(map(str, seeds))]
        for metric in shown:
            cells.append(", ".join(_seeds_cell(each, metric) for each in seeds.values()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seeds_cell(differences: Measured, metric: str) -> str:
    """One training's value, bold if its interval excludes zero; a dash if it was not measured."""
    if metric not in differences.metrics:
        return "-"
    estimate = differences.estimate(metric)
    value = f"{estimate.value:+.3f}"
    return f"**{value}**" if estimate.excludes_zero else value


def _cell(estimate: Estimate, is_bold: bool, sign: str = "") -> str:
    value = f"{estimate.value:{sign}.3f}"
    shown = f"**{value}**" if is_bold else value
    return f"{shown} ({between(estimate)})" if estimate.interval else shown


def _legend(study: Study, results: Results) -> str:
    parts = [
        "Brackets hold 95 % intervals over the images; several seeds are averaged image by image first. "
        "Bold in a table of methods: the best one, if the interval of its paired difference to every other "
        "method, over the seeds that both have, excludes zero."
    ]
    if study.plan.compare_to:
        parts.append(
            "A difference is between trainings from the same seed; bold if the interval excludes zero."
        )
    counts = {
        len(scores)
        for each in results.values()
        for view in each.views.values()
        for scores in view.scores.values()
    }
    if counts and min(counts) < LEAST_FOR_INTERVALS:
        parts.append(f"Fewer than {LEAST_FOR_INTERVALS} images have no interval, and no method is marked.")
    return " ".join(parts)
