"""`hafl simulate`: one federation on this machine, or a sweep of several."""

import atexit
import gc
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hafl_app.cli import FAILED, run_script
from hafl_app.commands.screen import Screen
from hafl_app.config.compose import compose, quoted, register_schema
from hafl_app.config.files import CONF, own_folder
from hafl_app.config.overrides import unquoted
from hafl_app.config.schema import Settings
from hafl_app.printable import printable
from hafl_app.run.command_line import CommandLine
from hafl_app.run.going_on import key
from hafl_app.run.origin import Origin, announced, commit
from hafl_app.run.sweep_plan import SweepPlan

_program: list[str] = []
_typed: list[str] = []
_screen: list[Screen] = []
_failures: list[str] = []
_interruptions: list[str] = []


def resumed(line: CommandLine) -> CommandLine:
    """Return the command line of the run that ``resume=...`` asks for, else the same one.

    The settings are those of the run that goes on, then what else stands on the command line.

    Raises
    ------
    hafl_app.run.resumable_run.ResumeError
        If there is no such run, or it has no whole checkpoint, or these settings do not fit it.
    """
    given = [o.partition("=")[2] for o in line.overrides if key(o) == "resume"]
    if not given:
        return line
    from hafl_app.run.resumable_run import (  # noqa: PLC0415
        ResumeError,
        latest_run,
        require_checkpoint,
    )
    from hafl_app.run.run_folder import absolute  # noqa: PLC0415

    if line.multirun:
        raise ResumeError("resume= resumes one run: leave out -m")
    if any(key(o) == "output_dir" for o in line.overrides):
        raise ResumeError("resume= goes on in the run's own folder: leave out output_dir=")
    name = unquoted(given[-1])
    if not name:
        raise ResumeError("resume=: expected the folder of a run, or latest")
    folder = latest_run(Path("outputs")) if name == "latest" else absolute(name)
    if (folder / "checkpoints").is_dir():
        _stop_what_is_left(folder)
    require_checkpoint(folder)
    from hafl_app.run.resuming import check_resumable, load_checkpoint  # noqa: PLC0415  takes seconds

    checkpoint = load_checkpoint(folder)
    own = ("resume", "output_dir")
    overrides = [o for o in checkpoint.state["overrides"] if key(o) not in own]
    overrides += [o for o in line.overrides if key(o) not in own]
    line = replace(line, overrides=(*overrides, f"resume={quoted(folder)}"))
    check_resumable(checkpoint, compose(line.jobs()[0]))
    return line


def _stop_what_is_left(folder: Path) -> None:
    """Stop the processes of a run whose command was killed."""
    from hafl_app.engines.processes import stop_abandoned_run  # noqa: PLC0415
    from hafl_app.run.run_lock import RunLockedError, run_lock  # noqa: PLC0415

    try:
        with run_lock(folder):
            return
    except RunLockedError as error:
        if not stop_abandoned_run(error.pid):
            raise
    print("stopped what the killed run had left behind", flush=True)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _hydra_job(config: DictConfig) -> None:
    """Run the one job of a command line without ``-m``."""
    del config  # composed again from the overrides, checked, wherever the apps run
    from hafl_app.engines.one_run import run_once  # noqa: PLC0415
    from hafl_app.run.going_on import RunWatch  # noqa: PLC0415

    hydra_config = HydraConfig.get()
    overrides = [o for o in hydra_config.overrides.task if key(o) != "output_dir"]
    folder = Path(hydra_config.runtime.output_dir)
    watch = RunWatch(folder, _program, _typed)
    _screen[0].follow(folder)
    try:
        run_once(overrides, folder)
        _screen[0].close_run()
    except KeyboardInterrupt:
        _interruptions.append(watch.interrupted())
        raise
    except ValueError as error:  # refused: nothing was lost
        _failures.append(f"{type(error).__name__}: {error}")
        print(f"error: {printable(_failures[-1], 2000)}", file=sys.stderr, flush=True)
    except Exception as error:
        # One line: the log above it has the details.
        _failures.append(f"{type(error).__name__}: {error}")
        line = f"{printable(_failures[-1], 2000)}{watch.failed()}"
        print(f"error: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str], program: Sequence[str]) -> int:
    """Check every job before the first one starts, run them, and say how it went.

    Parameters
    ----------
    arguments
        Of the command line: overrides, and Hydra's flags.
    program
        How the command began, for the command that goes on with a run that stopped.

    Returns
    -------
    int
        Exit code.
    """
    _typed[:], _program[:] = arguments, program
    _failures.clear()
    _interruptions.clear()
    # Else Python looks for garbage in all of torch once more, for a second after the last line.
    atexit.register(gc.freeze)
    return run_script(_run_jobs, lambda: "; ".join(_interruptions) or "interrupted")


def _run_jobs() -> int:
    line = CommandLine.of(_typed)
    # resume= is a folder as the shell gives it, with spaces and no quotes of Hydra's.
    typed = [override for override in line.overrides if key(override) != "resume"]
    placed: list[str] = []
    plan: SweepPlan | None = None
    jobs: list[list[str]] = []
    if line.shows != "hydra":
        line = resumed(line)
        jobs = line.jobs()
        composed = [compose(job) for job in jobs]
        if not line.shows:
            with Screen():
                _check_jobs(composed, typed)
            placed = line.placed(composed)
            if line.multirun:
                plan = line.sweep(placed, composed)
                placed += plan.overrides
    # Hydra reads them from here, and wants the flags together.
    own = own_folder()
    folders = ["--config-dir", str(own)] if own else []
    sys.argv[1:] = [*line.overrides, *placed, *line.flags, *folders]
    register_schema()
    if line.shows:
        _hydra_job()
        return 0
    if plan:
        return _run_sweep(plan, jobs)
    with Screen() as screen:
        _screen[:] = [screen]
        with announced(_origin(closes=True, watched=screen.is_live)):
            _hydra_job()
    return FAILED if _failures else 0


def _origin(*, closes: bool, watched: bool) -> Origin:
    return Origin(shlex.join([*_program, *_typed]), commit(), closes=closes, watched=watched)


def _run_sweep(plan: SweepPlan, jobs: Sequence[Sequence[str]]) -> int:
    """Run the jobs, and print a table of them also after an interruption."""
    from hafl_app.experiments.sweep import SWEEP_FILE, SweepJob, print_sweep  # noqa: PLC0415

    for warning in plan.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)
    job = SweepJob(plan.num_jobs, plan.varied, plan.at_once, tuple(_program), tuple(_typed))
    (plan.folder / SWEEP_FILE).unlink(missing_ok=True)
    ended = 0
    try:
        with ExitStack() as shown:
            # Lines of several runs at once, each from a process of its own, have no last line.
            screen = None if plan.at_once else shown.enter_context(Screen())
            live = screen is not None and screen.is_live
            shown.enter_context(announced(_origin(closes=screen is not None, watched=live)))
            if screen is not None:
                job = replace(job, run=partial(_run_on, screen))
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except KeyboardInterrupt:
        _interruptions.append(f"interrupted; the jobs that ended are in {plan.folder}")
        raise
    except SystemExit as error:  # Hydra has said why
        ended = int(bool(error.code))
    finally:
        failed = print_sweep(plan.folder, [] if plan.searches else jobs)
    if failed:
        print(f"error: {failed} jobs did not finish, see above", file=sys.stderr)
    return FAILED if failed or ended else 0


def _run_on(screen: Screen, overrides: Sequence[str], folder: Path) -> None:
    """Run one federation, and show how far it is."""
    from hafl_app.engines.one_run import run_once  # noqa: PLC0415

    screen.follow(folder)
    run_once(overrides, folder)
    screen.close_run()


def _check_jobs(jobs: Sequence[Settings], typed: Sequence[str]) -> None:
    """Check all jobs, and warn of what was typed without effect."""
    from hafl_app.engines.one_run import count_trainers  # noqa: PLC0415
    from hafl_app.run.effects import without_effect  # noqa: PLC0415
    from hafl_app.run.preflight import check  # noqa: PLC0415

    for settings in jobs:
        check(settings)
        count_trainers(settings)
    for warning in without_effect(jobs, typed):
        print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)
