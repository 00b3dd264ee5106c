"""The block that closes a run: scores, traffic, time, the folder, and what can be done next."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from hafl_app.disk import unused
from hafl_app.metrics import CAUSAL_LM, EXACT_MATCH, ROUGE_L, Metric, Task, metric_named, task_of
from hafl_app.packages import hafl_command, short
from hafl_app.printable import printable
from hafl_app.tracking.as_text import WIDTH, Printer, duration
from hafl_app.tracking.base import RoundRecord
from hafl_app.tracking.tables import device_note, device_table, result_table, traffic_table

_MARGIN: Final = 9  # columns of the words at the left
STAGES: Final = {
    "train": "training",
    "evaluate": "evaluation",
    "score": "scoring",
    "unseen": "unseen clients",
    "generate": "answers of clients",
    "alone": "training alone",
    "finish": "final scores",
}
"""Stages of a run, as they are called; a summary's ``stages`` has the seconds of each."""


class Clock(NamedTuple):
    """Seconds that a run took.

    Parameters
    ----------
    seconds
        Of the command, or of the run where no command knows better.
    before
        Those of an interrupted run that it went on with.
    """

    seconds: float
    before: float = 0.0


def print_closing(
    printer: Printer,
    summary: Mapping[str, Any],
    rounds: Sequence[RoundRecord],
    clock: Clock,
    folder: Path | None,
) -> None:
    """Print all that there is to say of a finished run.

    Parameters
    ----------
    summary
        As `hafl_app.run.reporting.RunReport` writes it; what it lacks is left out.
    folder
        Of the run; None where it is not looked into.
    """
    metric = task_of([str(summary.get("metric", ""))]).primary
    if rounds:
        printer.table("Results", *result_table(rounds, summary))
    if devices := summary.get("device_ranks"):
        printer.table("What each device gains", *device_table(devices, metric))
        printer.line(device_note(metric), "dim")
    if sent := traffic_table(summary.get("bytes", {})).rows:
        printer.table("Traffic", *traffic_table(summary["bytes"])._replace(rows=sent))
    printer.line()
    for line in closing_lines(summary):
        printer.line(printable(line, 2000))
    if math.isfinite(clock.seconds):
        whole = time_line(clock, summary.get("stages", {}))
        printer.line(f"{'Time':<{_MARGIN}}{whole}", indent=" " * _MARGIN)
    if folder is not None:
        printer.path(f"{'Folder':<{_MARGIN}}{printable(short(folder), 4000)}")
        for number, command in enumerate(next_commands(summary, folder)):
            printer.path(f"{'' if number else 'Next':<{_MARGIN}}{command}")


def time_line(clock: Clock, stages: Mapping[str, float]) -> str:
    """Return the time of a run and of its stages; they and the rest add up to it."""
    known = {name: stages[key] for key, name in STAGES.items() if stages.get(key, 0) >= 0.05}
    if not known:
        return duration(clock.seconds)
    rest = max(0.0, clock.seconds - sum(known.values()))
    parts = [f"{name} {duration(seconds)}" for name, seconds in known.items()]
    before = f" after {duration(clock.before)} before it stopped" if clock.before else ""
    whole = f"{duration(clock.seconds)}{before}"
    return f"{whole}: {', '.join(parts)}, start and rest {duration(rest)}"


def next_commands(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Return commands for a finished run, as they can be typed in the current folder."""
    hafl, run = hafl_command(), short(folder)
    ranks = [row["rank"] for row in summary.get("nodes", [])]
    cut = ["--rank", str(min(ranks))] if ranks and min(ranks) < max(ranks) else []
    speakers = ["base", *([str(min(ranks))] if cut else []), "adapter"]
    writes = task_of([str(summary.get("metric", ""))]) is CAUSAL_LM
    report = Path("report")
    taken = report.exists() and not (report / "report.md").is_file()
    commands = [
        *([[hafl, "chat", run, "--compare", ",".join(speakers)]] if writes else []),
        [hafl, "report", run, *(["--output", str(unused(report))] if taken else [])],
        [hafl, "export", run, *cut, "--output", str(unused(Path("exported")))],
    ]
    return [_typed(command) for command in commands]


def _typed(words: Sequence[str]) -> str:
    """Return a command on one line, or on two that a shell reads as one."""
    # hafl_command() may be several words already.
    line = " ".join([words[0], shlex.join(words[1:])])
    options = [word for word in words if word.startswith("--")]
    if len(line) <= WIDTH - _MARGIN or not options:
        return line
    at = line.rindex(f" {options[-1]} ")
    return f"{line[:at]} \\\n{'':<{_MARGIN}} {line[at:]}"


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each of these that the summary has.

    Parameters
    ----------
    summary
        ``stopped_early``, ``simulated_time``, ``best_validation`` or ``best_clients``, ``clients``
        with the metrics of ``seen`` and ``unseen`` ones, and ``generation``, as
        `hafl_app.run.reporting.RunReport` writes them.
    """
    clients, generation = summary.get("clients", {}), summary.get("generation")
    lines = [
        _choice(summary[f"best_{phase}"], phase)
        for phase in ("validation", "clients")
        if "chosen_by" in summary.get(f"best_{phase}", {})
    ]
    if stopped := summary.get("stopped_early"):
        ended = f"ended after round {stopped['round']} of {stopped['of']}"
        lines.insert(0, f"{ended}: {stopped['reason']}")
    task = task_of([str(summary.get("metric", ""))])
    if simulated := summary.get("simulated_time"):
        lines.append(_simulated(simulated, task))
    if seen := clients.get("seen"):
        lines.append(f"clients that trained: {_scores(seen, task)}")
    if unseen := clients.get("unseen"):
        numbers = ", ".join(map(str, unseen["partitions"]))
        lines.append(f"clients that did not ({numbers}): {_scores(unseen, task)}")
    if categories := summary.get("categories"):
        lines.append(_of_categories(categories, task.primary))
    if worst := summary.get("client_scores", {}).get(task.primary.name):
        lines.append(
            f"{summary['client_scores']['clients']} clients' {task.primary.title}: mean "
            f"{task.primary.text(worst['mean'])}, worst tenth "
            f"{task.primary.text(worst['worst_tenth'])}"
        )
    if generation:
        lines.append(
            f"{generation['num_examples']} generated answers: "
            f"{ROUGE_L.title} {ROUGE_L.text(generation[ROUGE_L.name])}, "
            f"{EXACT_MATCH.title} {EXACT_MATCH.text(generation[EXACT_MATCH.name])}"
        )
    for who, scores in summary.get("client_generation", {}).items():
        lines.append(_answers_of(who, scores))
    if watched := summary.get("watched"):
        lines.append(f"answers to {watched['prompts']} prompts, round by round: answers.md")
    return lines


def _of_categories(categories: Mapping[str, Mapping[str, float]], metric: Metric) -> str:
    """Return the best and the worst of the data's categories."""
    ordered = sorted(categories, key=lambda name: metric.merit(categories[name][metric.name]))
    ends = [(name, metric.text(categories[name][metric.name])) for name in ordered]
    (worst, low), (best, high) = ends[0], ends[-1]
    return (
        f"test {metric.title} of {len(categories)} categories: {high} ({best}) to {low} ({worst})"
    )


def _answers_of(who: str, scores: Mapping[str, Any]) -> str:
    """Return the scores of the answers that clients wrote on their own rows."""
    shown = ", ".join(
        f"{metric.title} {metric.text(scores[metric.name])} (worst tenth "
        f"{metric.text(scores['worst_tenth'][metric.name])})"
        for metric in (ROUGE_L, EXACT_MATCH)
    )
    return f"{scores['num_examples']} answers of {scores['clients']} {who} clients: {shown}"


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
