"""Closing lines of a summary: the choice of a round, unseen clients, and generated answers."""

from collections.abc import Mapping
from typing import Any

from hafl_app.metrics import EXACT_MATCH, ROUGE_L, Task, metric_named, task_of


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each of these that the summary has.

    Parameters
    ----------
    summary
        ``simulated_time``, ``best_validation`` or ``best_clients``, ``clients`` with the metrics
        of ``seen`` and ``unseen`` ones, and ``generation``, as
        `hafl_app.run.reporting.RunReport` writes them.
    """
    clients, generation = summary.get("clients", {}), summary.get("generation")
    lines = [
        _choice(summary[f"best_{phase}"], phase)
        for phase in ("validation", "clients")
        if "chosen_by" in summary.get(f"best_{phase}", {})
    ]
    task = task_of([str(summary.get("metric", ""))])
    if simulated := summary.get("simulated_time"):
        lines.append(_simulated(simulated, task))
    if seen := clients.get("seen"):
        lines.append(f"clients that trained: {_scores(seen, task)}")
    if unseen := clients.get("unseen"):
        numbers = ", ".join(map(str, unseen["partitions"]))
        lines.append(f"clients that did not ({numbers}): {_scores(unseen, task)}")
    if generation:
        lines.append(
            f"{generation['num_examples']} generated answers: "
            f"{ROUGE_L.title} {ROUGE_L.text(generation[ROUGE_L.name])}, "
            f"{EXACT_MATCH.title} {EXACT_MATCH.text(generation[EXACT_MATCH.name])}"
        )
    return lines


def _choice(best: Mapping[str, Any], phase: str) -> str:
    """Return by what the best round was chosen, and on how many rows that rests."""
    metric = metric_named(best["chosen_by"])
    share = best.get("largest_class")
    largest = f", the largest class {share:.1%} of them" if share else ""
    rows = "rows of the clients" if phase == "clients" else "validation rows"
    return (
        f"best round {best['round']}: chosen by {metric.title} on {best['rows']:,} {rows}{largest}"
    )


def _simulated(time: Mapping[str, Any], task: Task) -> str:
    """Return the time on simulated devices, and when the target was reached."""
    line = f"on simulated devices: {time['seconds']:,.4g} s"
    if partial := time["partial_rounds"]:
        line += f", {partial} partial rounds"
    if reached := time.get("to_target"):
        target = f"{reached['phase']} {task.primary.title} {task.primary.text(reached['target'])}"
        when = "never" if reached["seconds"] is None else f"after {reached['seconds']:,.4g} s"
        at = "" if reached["round"] is None else f" (round {reached['round']})"
        line += f"; {target} {when}{at}"
    return line


def _scores(metrics: Mapping[str, float], task: Task) -> str:
    shown = (task.primary, task.second)
    return ", ".join(f"{metric.title} {metric.text(metrics.get(metric.name))}" for metric in shown)
