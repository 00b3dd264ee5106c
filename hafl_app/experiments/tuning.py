"""Choose each method's learning rate by its validation score, on a seed of its own."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hafl_app.experiments.comparison import Comparison, Job
from hafl_app.experiments.results import best_entry, last_validation
from hafl_app.experiments.running import Outcome
from hafl_app.metrics import Metric, metric_named


class TuningError(RuntimeError):
    """A method that does not finish at any learning rate of the grid."""


def choice_metric(comparison: Comparison, outcomes: Sequence[Outcome]) -> Metric:
    """Return by what all runs of a search chose their best round; the task's metric if they differ.

    All have the same validation rows, so that they differ only across cells of other data.
    """
    entries = [best_entry(outcome.job.folder) for outcome in outcomes if not outcome.error]
    names = {entry.get("chosen_by") for entry in entries}
    name = names.pop() if len(names) == 1 else None
    return metric_named(name) if name else comparison.metric


def choose_learning_rates(
    comparison: Comparison, outcomes: Sequence[Outcome]
) -> tuple[dict[tuple[str, str], float], list[dict[str, Any]]]:
    """Return the learning rate of every cell and method, and the record of the search.

    The best validation score of the last round wins, by the metric that chooses rounds too, the
    first of the grid among equals. Runs that failed, as at a rate so high that training diverges,
    do not count.

    Raises
    ------
    TuningError
        If all runs of a method failed.
    """
    metric = choice_metric(comparison, outcomes)
    scores: dict[tuple[str, str], dict[float, float]] = {}
    for outcome in outcomes:
        job = outcome.job
        score = math.nan if outcome.error else last_validation(job.folder, metric)
        scores.setdefault((job.cell, job.method), {})[job.learning_rate] = score
    best: dict[tuple[str, str], float] = {}
    for (cell, method), by_rate in scores.items():
        known = {rate: value for rate, value in by_rate.items() if math.isfinite(value)}
        if not known:
            raise TuningError(f"{method}: no learning rate of {list(by_rate)} works; see run.log")
        best[cell, method] = max(known, key=lambda rate: metric.merit(known[rate]))
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
    path.write_text(json.dumps(record, indent=2) + "\n")


def tuned_line(record: dict[str, Any]) -> str:
    """Return one line about one method's search."""
    metric = metric_named(record["metric"])
    tried = ", ".join(
        f"{rate} {'failed' if value is None else metric.text(value)}"
        for rate, value in record["validation"].items()
    )
    edge = "; at the edge of the grid" if record["at_edge"] else ""
    name = " ".join(part for part in (record["cell"], record["method"]) if part)
    return f"{name}: learning rate {record['learning_rate']} ({tried}{edge})"


def describe(job: Job) -> str:
    """Name a run of the search for a line of progress."""
    name = " ".join(part for part in (job.cell, job.method) if part)
    return f"{name} lr {job.learning_rate}"


def _record(
    cell: str,
    method: str,
    best: float,
    by_rate: dict[float, float],
    comparison: Comparison,
    metric: Metric,
) -> dict[str, Any]:
    grid = sorted(by_rate)
    return {
        "cell": cell,
        "method": method,
        "learning_rate": best,
        "metric": metric.name,
        "validation": {
            str(rate): value if math.isfinite(value) else None for rate, value in by_rate.items()
        },
        "at_edge": len(grid) > 1 and best in {grid[0], grid[-1]},
        "seed": comparison.plan.tuning.seed,
        "num_rounds": comparison.plan.tuning.num_rounds,
    }
