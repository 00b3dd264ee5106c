"""Jobs of a comparison: run one after another in this process, or in a few worker processes."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from hafl_app.config.compose import compose
from hafl_app.config.schema import Settings
from hafl_app.engines.in_process import run_federation
from hafl_app.experiments.centralized import KIND, train_centralized
from hafl_app.experiments.comparison import Job
from hafl_app.fields import default_of
from hafl_app.lowrank.factors import Adapter
from hafl_app.printable import printable
from hafl_app.renames import renamed_settings
from hafl_app.reports.curve import read_curve
from hafl_app.reports.records import read_summary
from hafl_app.run.logs import output_to
from hafl_app.run.plain_settings import plain_settings
from hafl_app.run.run_folder import set_aside


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job: `error` is empty if its results are there.

    `before`: where a finished run of other settings is kept now that was in its folder.
    """

    job: Job
    seconds: float
    resumed: bool = False
    error: str = ""
    before: Path | None = None


def is_finished(
    folder: Path, settings: Settings, *, older: bool = False, centralized: bool = False
) -> bool:
    """Whether a folder holds the results of a finished run of exactly these settings.

    Parameters
    ----------
    centralized
        Whether the run is to be the centralized reference with these settings, or a federation.
    older
        Take a setting that the run did not have yet as its default. A version that brought a
        setting whose default changed what a run does would be overlooked.
    """
    try:
        read_curve(folder)
        saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        saved = renamed_settings(saved)
    except (OSError, ValueError, AttributeError, YAMLError):  # damaged: it runs again
        return False
    summary = read_summary(folder)
    wanted: Any = OmegaConf.to_container(OmegaConf.create(plain_settings(settings)))
    if older:
        _add_defaults(saved, wanted, settings)
    if (summary.get("kind") == KIND) != centralized:
        return False
    return bool(summary.get("status") == "finished" and _comparable(saved) == _comparable(wanted))


def run_job(job: Job, on_round: Callable[[int, Adapter], None] | None = None) -> Outcome:
    """Run a job; what the run prints and logs goes to ``run.log`` in its folder.

    A finished run of other settings there is kept under another name.

    Parameters
    ----------
    on_round
        Called with every round and its global adapter.
    """
    started, before = time.perf_counter(), None
    try:
        before = set_aside(job.folder)
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "run.log").open("w", encoding="utf-8") as log, output_to(log):
            if job.centralized:
                train_centralized(compose(job.overrides), job.folder, print)
            else:
                run_federation(job.overrides, on_round)
    except Exception as error:  # the other runs of the comparison go on
        reason = f"{type(error).__name__}: {printable(error)}"
        return Outcome(job, time.perf_counter() - started, error=reason, before=before)
    return Outcome(job, time.perf_counter() - started, before=before)


def run_jobs(jobs: Sequence[Job], workers: int, *, older: bool = False) -> Iterator[Outcome]:
    """Run jobs and yield each outcome when it is known; jobs finished before come first.

    Parameters
    ----------
    workers
        Processes; with 1 everything runs in this one. Each keeps one base model resident.
    older
        As for `is_finished`.
    """
    resumed = [job for job in jobs if _is_done(job, older)]
    yield from (Outcome(job, 0.0, resumed=True) for job in resumed)
    left = [job for job in jobs if job not in resumed]
    if workers == 1 or len(left) < 2:
        yield from map(run_job, left)
        return
    # spawn: forked processes inherit torch's threads, which do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool:
        futures = {pool.submit(run_job, job): job for job in left}
        try:
            for future in as_completed(futures):
                yield _outcome(future, futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _is_done(job: Job, older: bool) -> bool:
    settings = compose(job.overrides)
    return is_finished(job.folder, settings, older=older, centralized=job.centralized)


def _outcome(future: Future[Outcome], job: Job) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(job, 0.0, error="a worker process died, perhaps for lack of memory")


def _add_defaults(saved: Any, wanted: Mapping[str, Any], settings: Any) -> None:
    """Add the default of every wanted setting, also of a whole group, that was not saved."""
    if not isinstance(saved, dict):
        return
    for declared in fields(settings):
        name, value = declared.name, getattr(settings, declared.name, None)
        if name in wanted and is_dataclass(value):
            _add_defaults(saved.setdefault(name, {}), wanted[name], value)
        elif name in wanted:
            saved.setdefault(name, default_of(declared))


def _comparable(config: Any) -> Any:
    # The folder may have been moved since; names, and where metrics went, decide no result.
    decides_nothing = {"output_dir", "name", "tags", "tracking"}
    return {k: v for k, v in config.items() if k not in decides_nothing}
