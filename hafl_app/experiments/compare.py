"""A whole comparison: check, tune, run, sum up."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from hafl_app.config.compose import compose
from hafl_app.config.schema import Settings
from hafl_app.experiments.command import Command, output_folder
from hafl_app.experiments.comparison import Comparison, Job, Rates, composed, named
from hafl_app.experiments.comparison_folder import check_folder, comparison_lock
from hafl_app.experiments.comparison_refusals import ignored
from hafl_app.experiments.fleets import check_fleets, fleet_line
from hafl_app.experiments.lone_clients import alone_cells, beside_lone_clients
from hafl_app.experiments.results import Row, make_row
from hafl_app.experiments.running import Outcome, run_jobs
from hafl_app.experiments.table import Provenance, write_tables
from hafl_app.experiments.tuning import (
    TuningError,
    at_edge,
    choose_rates,
    describe,
    tuned_line,
    write_tuning,
)
from hafl_app.metrics import Metric, metric_named
from hafl_app.printable import printable
from hafl_app.reports.curve import Curve, read_curve
from hafl_app.reports.figures.curves import draw_comparison
from hafl_app.run import build, preflight
from hafl_app.run.checks import check_centralized
from hafl_app.training.device import cpu_name

Say = Callable[[str], None]
_PACKAGES = ("flwr", "torch", "transformers", "peft")


def compare(command: Command, command_line: str, say: Say) -> int:
    """Run a comparison and write its table and figure; return the number of failed runs.

    Parameters
    ----------
    command_line
        As typed, for the footer of the table.
    say
        Called with each line of progress, and with the table at the end.

    Raises
    ------
    hafl_app.config.compose.SettingsError, ValueError
        In one line, before anything runs.
    """
    folder = output_folder(command.output_dir, command.folder_name)
    check_folder(folder, command.experiment)
    comparison = Comparison.of(command, folder)
    comparison.require_baseline()
    runs = _check(comparison)
    for line in ignored(comparison, runs):
        say(f"warning: {printable(line)}")
    with comparison_lock(folder):
        say(f"Output folder: {folder}")
        return _run_methods(comparison, command_line, say)


def _run_methods(comparison: Comparison, command_line: str, say: Say) -> int:
    """Tune and run method by method, with all results so far after each; count the failures."""
    command, folder = comparison.command, comparison.folder
    outcomes: list[Outcome] = []
    record: list[dict[str, Any]] = []
    failed: list[str] = []
    table = ""
    # Method by method, so that one that is interrupted has whole rows.
    for method in comparison.methods:
        part = comparison.only(method)
        try:
            rates, found = _rates(part, command, say)
        except TuningError as error:
            say(f"FAILED: {error}")
            failed.append(str(error))
        else:
            record += found
            its = _run_all(part.jobs(rates), command, say, lambda job: job.name)
            failed += [f"{one.job.name}: {one.error}" for one in its if one.error]
            outcomes += its
        if comparison.searches:
            write_tuning(folder / "tuning.json", record)
        if not all(outcome.error for outcome in outcomes):
            source = _source(comparison, command_line, record, outcomes)
            source = replace(source, failed=tuple(failed))
            table = _write_results(comparison, outcomes, source)
    if table:
        say("\n" + table)
        say(f"Written: table.md, table.csv, results.json and comparison.png in {folder}")
    return len(failed)


def _check(comparison: Comparison) -> dict[tuple[str, str, int], Settings]:
    """Refuse a comparison of which a run cannot work; all values, but data and model once each.

    Returns
    -------
    dict
        Settings by cell, method and seed.
    """
    trials = comparison.tuning_jobs() if comparison.searches else []
    jobs = [*trials, *comparison.jobs(comparison.first_rates())]
    runs: dict[tuple[str, str, int], Settings] = {}
    for job in jobs:
        where = named(job.cell, job.method)
        runs[job.cell, job.method, job.seed] = composed(where, job.overrides)
    for settings in runs.values():
        preflight.check(settings)
    for job in jobs:
        if job.centralized:
            check_centralized(runs[job.cell, job.method, job.seed])
    check_fleets(runs)
    return runs


def _rates(
    part: Comparison, command: Command, say: Say
) -> tuple[Mapping[tuple[str, str], Rates], list[dict[str, Any]]]:
    """Return the rates of one method by cell and method, and the record of a search for them."""
    if not part.searches:
        return part.fixed_rates(), []
    rates, record = choose_rates(part, _run_all(part.tuning_jobs(), command, say, describe))
    for line in map(tuned_line, record):
        say(line)
    return rates, record


def _source(
    comparison: Comparison,
    command_line: str,
    record: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> Provenance:
    settings = [compose(outcome.job.overrides) for outcome in outcomes]
    tuning = (
        "as in the experiment file" if comparison.command.experiment else "client.learning_rate"
    )
    if record:
        tuning = _tuning_line(comparison, metric_named(record[0]["metric"]))
    return Provenance(
        title=comparison.title,
        experiment=comparison.command.experiment,
        baseline=comparison.plan.baseline,
        command=command_line,
        hardware=hardware(),
        seeds=comparison.command.seeds,
        tuning=tuning,
        at_edge=at_edge(record),
        versions=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        metric=comparison.metric,
        models=tuple(dict.fromkeys(one.model.title for one in settings)),
        precision=", ".join(dict.fromkeys(one.client.precision for one in settings)),
        devices=fleet_line(settings[0]),
    )


def hardware() -> str:
    """Describe the hardware that times depend on: processor, cores, accelerator, system."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    parts = [f"{os.cpu_count()} cores of {cpu_name()}", *gpus, platform.system()]
    return ", ".join(parts)


def _run_all(
    jobs: Sequence[Job], command: Command, say: Say, name: Callable[[Job], str]
) -> list[Outcome]:
    started = time.perf_counter()
    outcomes = []
    found = run_jobs(jobs, command.workers, older=command.older)
    for number, outcome in enumerate(found, start=1):
        outcomes.append(outcome)
        say(f"[{number}/{len(jobs)}] {name(outcome.job)}: {_outcome_line(outcome)}")
        if outcome.before:
            say(f"a finished run of other settings was there; it is kept as {outcome.before}")
    say(f"{len(jobs)} runs in {time.perf_counter() - started:.0f} s")
    return outcomes


def _outcome_line(outcome: Outcome) -> str:
    if outcome.error:
        return f"FAILED: {outcome.error}"
    curve = read_curve(outcome.job.folder)
    when = "finished earlier" if outcome.resumed else f"{outcome.seconds:.1f} s"
    text = curve.metric.text
    scores = f"val {text(curve.validation[-1])}  test {text(curve.test[-1])}"
    failed = f"  {curve.failures} TRAININGS FAILED, see run.log" if curve.failures else ""
    return f"{scores}  {curve.sent[-1]:.2f} MB  {when}{failed}"


def _tuning_line(comparison: Comparison, metric: Metric) -> str:
    tuning = comparison.plan.tuning
    rounds = f"{tuning.num_rounds} rounds of " if tuning.num_rounds else ""
    where = f"{rounds}seed {tuning.seed}"
    cells = [cell for cell in comparison.tuning_cells() if cell]
    if cells and not tuning.per_cell:
        where += f" in {cells[0]}"
    grid = ", ".join(f"{rate:g}" for rate in tuning.learning_rates)
    if tuning.lora_B_lr_ratios:
        grid += f" and of ratios {', '.join(f'{ratio:g}' for ratio in tuning.lora_B_lr_ratios)}"
    return f"best of {grid} by validation {metric.title}, per method, on {where}"


def _write_results(comparison: Comparison, outcomes: Sequence[Outcome], source: Provenance) -> str:
    """Write tables and figure from the runs that finished; return the Markdown."""
    curves: dict[str, dict[str, dict[int, Curve]]] = {
        cell: {method: {} for method in comparison.methods} for cell in comparison.cells
    }
    jobs: dict[tuple[str, str], list[Job]] = {}
    for outcome in sorted(outcomes, key=lambda o: source.seeds.index(o.job.seed)):
        if not outcome.error:
            job = outcome.job
            curves[job.cell][job.method][job.seed] = read_curve(job.folder)
            jobs.setdefault((job.cell, job.method), []).append(job)
    base = comparison.plan.baseline
    base_ranks = {cell: _ranks(jobs.get((cell, base), [])) for cell in curves}
    rows = [
        _row(jobs[cell, method][0], runs, methods[base], base_ranks[cell])
        for cell, methods in curves.items()
        for method, runs in methods.items()
        if runs
    ]
    federated = [m for m, method in comparison.methods.items() if not method.centralized]
    alone = {
        cell: _alone_rows({m: jobs.get((cell, m), []) for m in federated}, comparison)
        for cell in comparison.cells
    }
    drawn = {
        cell: {method: list(runs.values()) for method, runs in methods.items()}
        for cell, methods in curves.items()
    }
    draw_comparison(drawn, comparison.folder / "comparison.png", source.title)
    return write_tables(comparison.folder, rows, alone, source)


def _row(
    job: Job,
    runs: Mapping[int, Curve],
    baseline: Mapping[int, Curve],
    baseline_ranks: Sequence[int],
) -> Row:
    settings = compose(job.overrides)
    return make_row(
        job.cell,
        job.method,
        job.rates.learning_rate,
        settings.lora.max_rank,
        runs,
        baseline,
        lora_B_lr_ratio=settings.client.lora_B_lr_ratio,
        ranks=_ranks([job]),
        baseline_ranks=baseline_ranks,
    )


def _ranks(jobs: Sequence[Job]) -> Sequence[int]:
    """Return the rank budgets of a method's clients; none if it has no runs or is centralized."""
    if not jobs or jobs[0].centralized:
        return ()
    settings = compose(jobs[0].overrides)
    return build.client_ranks(settings, settings.federation.num_clients)


def _alone_rows(jobs: Mapping[str, Sequence[Job]], comparison: Comparison) -> list[list[str]]:
    """Return the rows of all methods of a cell beside the clients that trained alone, if any."""
    ranks = {method: {job.seed: _device_ranks(job) for job in its} for method, its in jobs.items()}
    shared = beside_lone_clients(ranks)
    metric = comparison.metric
    return [row for m, by_seed in shared.items() for row in alone_cells(m, by_seed, metric)]


def _device_ranks(job: Job) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = json.loads((job.folder / "summary.json").read_text())[
        "device_ranks"
    ]
    return ranks
