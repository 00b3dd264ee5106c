"""Tables of a report: settings that differ, scores, differences, and clients by rank."""

from collections.abc import Iterable
from typing import Final

from hafl_app.reports.client_scores import by_rank
from hafl_app.reports.curve import MEGABYTE
from hafl_app.reports.groups import Group, Section, differing, setting_text
from hafl_app.reports.statistics import Paired, Spread
from hafl_app.reports.tables import NONE, Table, difference_cells, difference_text, score, size

_OF_SEEDS: Final = "Mean ± standard deviation over n seeds; one seed has no spread."
_OF_CLIENTS: Final = ("worst", "worst tenth", "mean", "best")


def settings_table(section: Section) -> list[Table]:
    """Return the settings in which the groups differ; none where they differ in nothing."""
    names = differing([run.settings for run in section.runs])
    if not names:
        return []
    lines = [
        {"runs": group.name, **{name: setting_text(group.first.settings, name) for name in names}}
        for group in section.groups
    ]
    note = "A method's own settings are listed where runs of one method differ in them."
    return [Table.of("Settings that differ", lines, note)]


def scores_table(section: Section) -> Table:
    """Return scores, bytes and CPU seconds of each group, over its seeds."""
    metric = section.metric
    lines = []
    for group in section.groups:
        curves = [run.curve for run in group.runs.values()]
        lines.append(
            {
                "runs": group.name,
                "n": str(len(group.finals)),
                "test, last round": score(Spread(tuple(group.finals.values())), metric),
                "test, best validation": score(
                    Spread(tuple(curve.test[curve.best_round] for curve in curves)), metric
                ),
                "MB down": _mean_size(curve.bytes_down[-1] / MEGABYTE for curve in curves),
                "MB up": _mean_size(curve.bytes_up[-1] / MEGABYTE for curve in curves),
                "simulated s": _mean_size(curve.simulated_seconds for curve in curves),
                "client CPU s": _mean_size(curve.client_seconds for curve in curves),
                "server CPU s": _mean_size(curve.server_seconds for curve in curves),
            }
        )
    empty = {name for name in lines[0] if all(line[name] == NONE for line in lines)}
    lines = [{k: v for k, v in line.items() if k not in empty} for line in lines]
    unit = f"{metric.title} in percent" if metric.is_share else metric.title
    note = f"{_OF_SEEDS} MB of 10^6 bytes: training and evaluation, all clients and rounds."
    return Table.of(f"Test {unit}", lines, note)


def differences_table(section: Section) -> list[Table]:
    """Return the groups' differences from the baseline, paired by seed."""
    baseline = next(group for group in section.groups if group.name == section.baseline)
    rows = []
    for group in section.groups:
        if group is not baseline:
            paired = Paired.of(group.finals, baseline.finals)
            rows.append([group.name, *difference_cells(paired, section.metric)])
    if not rows:
        return []
    unit = ", in percentage points" if section.metric.is_share else ""
    note = (
        f"Test {section.metric.title} in the last round, minus that of {baseline.name} on the same "
        f"seed{unit}. Mean over n seeds, and Student's interval of the mean; of n = 1 there is no "
        "interval, so that the difference may be the seed's."
    )
    columns = ("runs", "difference", "95 % interval", "n")
    return [Table(f"Difference from {baseline.name}", columns, rows, note)]


def slices_tables(section: Section) -> list[Table]:
    """Return the scores of the groups' slices by rank of device, and differences paired by seed.

    None where no run has scored slices; a group that trains all clients at one rank has none.
    """
    slices = {group.name: _slices(group) for group in section.groups}
    ranks = sorted({rank for its in slices.values() for rank in its})
    if not ranks:
        return []
    metric, columns = section.metric, ["runs", *(f"rank {rank}" for rank in ranks)]
    rows = [
        [name, *(score(Spread(tuple(its.get(rank, {}).values())), metric) for rank in ranks)]
        for name, its in slices.items()
    ]
    unit = f"{metric.title} in percent" if metric.is_share else metric.title
    note = "The last round's adapter, cut to its best approximation of the rank of each device."
    tables = [Table(f"Test {unit} by rank of device", columns, rows, f"{note} {_OF_SEEDS}")]
    base = slices.pop(section.baseline)
    differences = [
        [
            name,
            *(
                difference_text(Paired.of(its.get(rank, {}), base.get(rank, {})), metric)
                for rank in ranks
            ),
        ]
        for name, its in slices.items()
        if its
    ]
    if base and differences:
        title = f"Difference from {section.baseline} by rank of device"
        note = "As above: mean, Student's 95 % interval and number of seeds; of one no interval."
        tables.append(Table(title, columns, differences, note))
    return tables


def _slices(group: Group) -> dict[int, dict[int, float]]:
    """Return the scores of a group's slices by rank and seed."""
    found: dict[int, dict[int, float]] = {}
    for seed, run in sorted(group.runs.items()):
        for rank, value in run.curve.at_rank.items():
            found.setdefault(rank, {})[seed] = value
    return found if len(found) > 1 else {}


def clients_table(section: Section, missing: list[str]) -> list[Table]:
    """Return worst, mean and best client of each group by rank; a line where none scored."""
    rows = []
    for group in section.groups:
        scores = {seed: run.scores for seed, run in group.runs.items()}
        for rank, its in by_rank(scores, section.metric).items():
            cells = [
                score(its[k], section.metric) for k in ("worst", "worst tenth", "mean", "best")
            ]
            count = f"{its['clients'].mean:.4g}"
            rows.append([group.name, rank, count, str(len(its["mean"].each)), *cells])
    if not rows:
        missing.append(
            "No client's own scores: they are recorded with federation.fraction_evaluate above 0 "
            "and dataset.holdout_fraction above 0."
        )
        return []
    columns = ("runs", "rank", "clients", "n", *_OF_CLIENTS)
    note = (
        "Each client's score of its own slice on its held-out rows, in the last round in which "
        f"clients scored. {_OF_SEEDS}"
    )
    return [Table("Worst, mean and best client by rank", columns, rows, note)]


def _mean_size(values: Iterable[float]) -> str:
    return size(Spread(tuple(values)).mean)
