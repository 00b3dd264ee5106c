"""A sweep: its jobs one by one or side by side, a file that lists them, and a table at the end."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from hafl_app.engines.one_run import run_once
from hafl_app.metrics import ACCURACY, Metric, task_of
from hafl_app.printable import printable
from hafl_app.reports.records import read_summary
from hafl_app.run.going_on import RunWatch, key
from hafl_app.run.logs import output_to
from hafl_app.run.run_folder import FINISHED
from hafl_app.tracking.base import FAILED, INTERRUPTED

SWEEP_FILE: Final = "sweep.jsonl"
"""In the folder of a sweep: a line for each job that ended, with the fields of `JobRecord`."""

REFUSED: Final = "refused"
_MISSING: Final = "not run"
_CENTRAL: Final = ("validation", "test")
_LONGEST_ERROR, _LONGEST_CELL, _LOG_WIDTH = 2000, 60, 100


@dataclass(frozen=True)
class JobRecord:
    """How one job ended.

    Parameters
    ----------
    job
        Its number, from 0.
    folder
        Of its run, relative to the sweep's.
    overrides
        Of its settings.
    status
        ``finished``, ``failed``, ``refused`` (nothing was written) or ``interrupted``.
    error
        The reason in one line; empty if it finished.
    seconds
        Of the clock.
    """

    job: int
    folder: str
    overrides: tuple[str, ...] = field(default=())
    status: str = FINISHED
    error: str = ""
    seconds: float = 0.0

    @property
    def settings(self) -> dict[str, str]:
        """Values by setting."""
        return {key(override): override.partition("=")[2] for override in self.overrides}


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep, as Hydra calls it, in this process or in another.

    Parameters
    ----------
    num_jobs
        Of the sweep.
    varied
        Settings that differ between its jobs.
    at_once
        Whether others may run at the same time: then what the run prints goes to ``run.log`` in
        its folder, and one line says how it ended.
    program, typed
        See `hafl_app.run.going_on.RunWatch`.
    run
        Runs one federation into a folder; None: `run_once`.
    """

    num_jobs: int
    varied: tuple[str, ...]
    at_once: bool
    program: tuple[str, ...]
    typed: tuple[str, ...]
    run: Callable[[Sequence[str], Path], None] | None = None

    def __call__(self, config: DictConfig) -> float | None:
        """Run the job and record it; a failure is recorded too, and the next one starts.

        Returns
        -------
        float
            The validation score of the last round, which a sweeper may search by; None if there is
            none.
        """
        del config  # composed again from the overrides, checked, wherever the apps run
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        overrides = _without_folder(hydra.overrides.task)
        sweep, number = Path(hydra.sweep.dir), int(hydra.job.num)
        record = JobRecord(number, folder.relative_to(sweep).as_posix(), overrides)
        title = self._title(record)
        if not self.at_once:
            _say(f"\n{title}")
        watch = RunWatch(folder, self.program, self.typed)
        started, status, error = time.perf_counter(), FINISHED, ""
        try:
            self._run(overrides, folder)
        except KeyboardInterrupt:
            status, error = INTERRUPTED, watch.interrupted()
            print(f"{title}: {error}", file=sys.stderr, flush=True)  # noqa: T201
            raise
        except Exception as problem:  # the other jobs go on
            status = REFUSED if isinstance(problem, ValueError) else FAILED
            error = printable(f"{type(problem).__name__}: {problem}", _LONGEST_ERROR)
            hint = watch.failed() if status == FAILED else ""
            print(f"error: {title}: {error}{hint}", file=sys.stderr, flush=True)  # noqa: T201
        finally:
            seconds = time.perf_counter() - started
            record = JobRecord(
                number, record.folder, record.overrides, status, error, round(seconds, 3)
            )
            _append(sweep / SWEEP_FILE, record)
        scores = _scores(folder) if status == FINISHED else {}
        if self.at_once and status == FINISHED:
            shown = "  ".join(f"{phase} {text}" for phase, text in scores.items())
            _say(f"{title}: {shown}  {seconds:.1f} s")
        return _objective(folder) if status == FINISHED else None

    def _title(self, record: JobRecord) -> str:
        shown = [o for o in record.overrides if key(o) in self.varied]
        return " ".join([f"[{record.job + 1}/{self.num_jobs}]", *map(printable, shown)])

    def _run(self, overrides: Sequence[str], folder: Path) -> None:
        if not self.at_once:
            (self.run or run_once)(overrides, folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "run.log").open("w", encoding="utf-8") as log, output_to(log):
            run_once(overrides, folder)


def read_sweep(folder: Path) -> list[JobRecord]:
    """Read the jobs of a sweep that ended, by number.

    Raises
    ------
    ValueError
        If a line cannot be read.
    """
    path = folder / SWEEP_FILE
    if not path.exists():
        return []
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = JobRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        found[record.job] = record
    return [found[job] for job in sorted(found)]


def print_sweep(folder: Path, jobs: Sequence[Sequence[str]], console: Console | None = None) -> int:
    """Print a table of the jobs: settings that differ, scores, state; return how many did not end.

    Parameters
    ----------
    jobs
        The overrides of all jobs, as far as they are known before.
    """
    records = read_sweep(folder)
    ended = {record.job for record in records}
    records += [
        JobRecord(number, "", _without_folder(overrides), _MISSING)
        for number, overrides in enumerate(jobs)
        if number not in ended
    ]
    records.sort(key=lambda record: record.job)
    failed = sum(record.status != FINISHED for record in records)
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_LOG_WIDTH)
    console.print(_table(folder, records), highlight=False)
    _say(f"Written: {SWEEP_FILE} and the folders of the runs in {folder}")
    return failed


def _table(folder: Path, records: Sequence[JobRecord]) -> Table:
    names = _differing(records)
    scores = {record.job: _scores(folder / record.folder) for record in records if record.folder}
    phases = list(dict.fromkeys(phase for found in scores.values() for phase in found))
    ends = [name.rpartition(".")[2] for name in names]
    titles = [end if ends.count(end) == 1 else name for end, name in zip(ends, names, strict=True)]
    table = Table("job", *titles, *phases, "state", box=box.MARKDOWN)
    for record in records:
        cells = [
            str(record.job),
            *(record.settings.get(name, "") for name in names),
            *(scores.get(record.job, {}).get(phase, "-") for phase in phases),
            record.status,
        ]
        table.add_row(*(printable(cell, _LONGEST_CELL) for cell in cells))
    return table


def _differing(records: Sequence[JobRecord]) -> list[str]:
    """Return the settings of which the jobs have different values."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    return [n for n in names if len({record.settings.get(n) for record in records}) > 1]


def _scores(folder: Path) -> dict[str, str]:
    """Return the scores of a finished run's last round by phase, as text."""
    summary = read_summary(folder)
    if summary.get("status") != FINISHED:
        return {}
    final, metric = summary.get("final", {}), _metric(summary)
    found = {p: metric.text(final[metric.key(p)]) for p in _CENTRAL if metric.key(p) in final}
    return found or {"clients": metric.text(final.get(metric.key("clients")))}


def _objective(folder: Path) -> float | None:
    summary = read_summary(folder)
    final, metric = summary.get("final", {}), _metric(summary)
    values = (final.get(metric.key(phase)) for phase in ("validation", "clients"))
    return next((float(value) for value in values if value is not None), None)


def _without_folder(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(override for override in overrides if key(override) != "output_dir")


def _metric(summary: Mapping[str, Any]) -> Metric:
    return task_of([str(summary.get("metric", ACCURACY.name))]).primary


def _append(path: Path, record: JobRecord) -> None:
    # One write of one line: jobs may end at the same time.
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201
