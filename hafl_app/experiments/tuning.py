"""Choose each method's learning rates by its validation score, on a seed of its own."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hafl_app.experiments.comparison import Comparison, Job, Rates, named
from hafl_app.experiments.running import Outcome
from hafl_app.metrics import Metric, metric_named
from hafl_app.reports.curve import best_entry, last_validation
from hafl_app.reports.records import read_summary
from hafl_app.tracking.jsonl import replace_file


class TuningError(RuntimeError):
    """A method that does not finish at any learning rate of the grid."""


def choice_metric(comparison: Comparison, outcomes: Sequence[Outcome]) -> Metric:
    """Return by what all runs of a search chose their best round; the task's metric if they differ.

    All have the same validation rows, so that they differ only across cells of other data.
    """
    entries = [
        best_entry(read_summary(outcome.job.folder)) for outcome in outcomes if not outcome.error
    ]
    names = {entry.get("chosen_by") for entry in entries}
    name = names.pop() if len(names) == 1 else None
    return metric_named(name) if name else comparison.metric


def choose_rates(
    comparison: Comparison, outcomes: Sequence[Outcome]
) -> tuple[dict[tuple[str, str], Rates], list[dict[str, Any]]]:
    """Return the rates of every cell and method, and the record of the search.

    The best validation score of the last round wins, by the metric that chooses rounds too, the
    first of the grid among equals. Runs that failed, as at a rate so high that training diverges,
    do not count.

    Raises
    ------
    TuningError
        If all runs of a method failed.
    """
    metric = choice_metric(comparison, outcomes)
    scores: dict[tuple[str, str], dict[Rates, float]] = {}
    for outcome in outcomes:
        job = outcome.job
        score = math.nan if outcome.error else last_validation(job.folder, metric)
        scores.setdefault((job.cell, job.method), {})[job.rates] = score
    best: dict[tuple[str, str], Rates] = {}
    for (cell, method), by_rate in scores.items():
        known = {rates: value for rates, value in by_rate.items() if math.isfinite(value)}
        if not known:
            tried = ", ".join(map(str, by_rate))
            name = named(cell, method)
            raise TuningError(f"{name}: no learning rate of {tried} works; see run.log")
        best[cell, method] = max(known, key=lambda rates: metric.merit(known[rates]))
    record = [
        _record(cell, method, best[cell, method], by_rate, comparison, metric)
        for (cell, method), by_rate in scores.items()
    ]
    searched = comparison.tuning_cells()
    rates = {
        (cell, method): best[cell if cell in searched else searched[0], method]
        for cell in comparison.cells
        for method in comparison.methods
    }
    return rates, record


def write_tuning(path: Path, record: Sequence[dict[str, Any]]) -> None:
    """Write the search as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=2) + "\n")


def tuned_line(record: dict[str, Any]) -> str:
    """Return one line about one method's search."""
    metric = metric_named(record["metric"])
    tried = ", ".join(
        f"{rate} {'failed' if value is None else metric.text(value)}"
        for rate, value in record["validation"].items()
    )
    edge = f"; at the edge of the grid: {edges}" if (edges := _edges(record)) else ""
    best = Rates(record["learning_rate"], record["lora_B_lr_ratio"])
    return f"{named(record['cell'], record['method'])}: learning rate {best} ({tried}{edge})"


def at_edge(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return cell, method and what of its best rates is the smallest or largest that was tried."""
    return tuple(
        f"{named(record['cell'], record['method'])} ({edges})"
        for record in records
        if (edges := _edges(record))
    )


def describe(job: Job) -> str:
    """Name a run of the search for a line of progress."""
    return f"{named(job.cell, job.method)} lr {job.rates}"


def _edges(record: Mapping[str, Any]) -> str:
    rate, ratio = record["learning_rate"], record["lora_B_lr_ratio"]
    edges = [f"learning rate {rate:g}"] if record["at_edge"] else []
    return ", ".join([*edges, f"ratio {ratio:g}"] if record["ratio_at_edge"] else edges)


def _record(
    cell: str,
    method: str,
    best: Rates,
    by_rate: dict[Rates, float],
    comparison: Comparison,
    metric: Metric,
) -> dict[str, Any]:
    grid = sorted({rates.learning_rate for rates in by_rate})
    ratios = sorted({rates.ratio for rates in by_rate if rates.ratio is not None})
    return {
        "cell": cell,
        "method": method,
        "learning_rate": best.learning_rate,
        "lora_B_lr_ratio": best.ratio,
        "metric": metric.name,
        "validation": {
            str(rates): value if math.isfinite(value) else None for rates, value in by_rate.items()
        },
        "at_edge": len(grid) > 1 and best.learning_rate in {grid[0], grid[-1]},
        # Of two ratios, with and without a faster lora_B, either is an edge: that says nothing.
        "ratio_at_edge": len(ratios) > 2 and best.ratio in {ratios[0], ratios[-1]},
        "seed": comparison.plan.tuning.seed,
        "num_rounds": comparison.plan.tuning.num_rounds,
    }
