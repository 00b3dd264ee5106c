"""Rank collapse: how much of the global update lies above the smallest client rank, by round.

The name, and the finding that averaging dense updates loses the high ranks round by round, are of
raFLoRA, arXiv:2602.13486.
"""

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hafl_app.config.compose import compose
from hafl_app.experiments.command import Command, output_folder
from hafl_app.experiments.comparison import Comparison, Job
from hafl_app.experiments.running import run_job
from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.svd import tail_energy
from hafl_app.reports.figures.curves import Line, draw_shares
from hafl_app.run import build, preflight

Energies = dict[int, float]


def energy_above(adapter: Adapter, rank: int) -> float:
    """Return `tail_energy` above ``rank``, the mean over the adapter's modules."""
    return statistics.fmean(float(tail_energy(f, rank)) for f in adapter.modules.values())


def rank_collapse(command: Command, say: Callable[[str], None]) -> Path:
    """Run the experiment's methods, and draw and write the energies; return the folder.

    Raises
    ------
    hafl_app.config.compose.SettingsError, ValueError
        In one line, before anything runs.
    RuntimeError
        If a run failed.
    """
    folder = output_folder(command.output_dir, "rank-collapse")
    comparison = Comparison.of(command, folder)
    jobs = comparison.jobs(comparison.fixed_rates())
    for job in jobs:
        preflight.check(compose(job.overrides))
    say(f"Output folder: {folder}")
    found: dict[str, dict[int, Energies]] = {}
    for number, job in enumerate(jobs, start=1):
        energies = _record(job)
        label = " ".join(part for part in (job.cell, job.method) if part)
        found.setdefault(label, {})[job.seed] = energies
        say(f"[{number}/{len(jobs)}] {job.name}: {100 * list(energies.values())[-1]:.2f} %")
    smallest = _smallest_rank(jobs[0])
    _write_csv(folder / "rank_collapse.csv", found)
    lines = {
        label: Line(list(by_seed[min(by_seed)]), [list(e.values()) for e in by_seed.values()])
        for label, by_seed in found.items()
    }
    draw_shares(
        lines,
        folder / "rank_collapse.png",
        "Rank collapse",
        f"energy above rank {smallest}, the smallest client's",
    )
    say(f"Written: rank_collapse.csv and rank_collapse.png in {folder}")
    return folder


def _smallest_rank(job: Job) -> int:
    settings = compose(job.overrides)
    return min(build.client_ranks(settings, settings.federation.num_clients))


def _record(job: Job) -> Energies:
    energies: Energies = {}
    smallest = _smallest_rank(job)

    def on_round(server_round: int, adapter: Adapter) -> None:
        if server_round:  # before training there is no update whose energy could be shared out
            energies[server_round] = energy_above(adapter, smallest)

    outcome = run_job(job, on_round)
    if outcome.error:
        raise RuntimeError(f"{job.name}: {outcome.error}; see {job.folder / 'run.log'}")
    return energies


def _write_csv(path: Path, found: Mapping[str, Mapping[int, Mapping[int, float]]]) -> None:
    rows: Sequence[tuple[str, int, int, float]] = [
        (method, seed, server_round, energy)
        for method, by_seed in found.items()
        for seed, energies in by_seed.items()
        for server_round, energy in energies.items()
    ]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("method", "seed", "round", "energy_above_smallest_rank"))
        writer.writerows(rows)
