"""Run one federation under faults, whose server may be killed and resumed."""

import contextlib
import importlib
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from chaos_suite.faults import NoFaults, Schedule
from chaos_suite.grid import JOURNAL, ChaoticGrid, Journal, read_journal
from hafl_app.config.compose import quoted
from hafl_app.engines.in_process import run_federation
from hafl_app.run.logs import output_to

_OVERRIDES = (
    # Lone clients train after the rounds, and a schedule covers only rounds.
    "federation.alone_clients_per_rank=0",
    # The report has the mean score of the last rounds.
    "federation.test_every=1",
)


@dataclass(frozen=True)
class Part:
    """Federation of a chaos run.

    Parameters
    ----------
    folder
        Of the run, and of its journal.
    overrides
        Settings, without folder and resuming.
    schedule
        Of the faults.
    kill_rounds
        Rounds, ascending, in or soon after which the server is killed.
    seed
        Of the moments of the kills.
    round_seconds
        Duration of a round: a kill comes at a random time within it.
    """

    folder: Path
    overrides: tuple[str, ...]
    schedule: Schedule = field(default_factory=NoFaults)
    kill_rounds: tuple[int, ...] = ()
    seed: int = 0
    round_seconds: float = 1.0


def run_part(part: Part, life: int = 0, kill_round: int | None = None) -> None:
    """Run a part in this process, or resume it; its output goes to ``run.log``.

    Parameters
    ----------
    life
        Number of earlier deaths of the server.
    kill_round
        Kill this process at a random time once the training of this round, or of a later one, has
        begun; None lets it end.
    """
    part.folder.mkdir(parents=True, exist_ok=True)
    if not life:
        (part.folder / JOURNAL).unlink(missing_ok=True)
    overrides = [*part.overrides, *_OVERRIDES, f"output_dir={quoted(part.folder)}"]
    if life:
        overrides.append(f"resume={quoted(part.folder)}")
    with _recorded(part.folder, "a" if life else "w") as journal:
        killer = _killer(part, life, kill_round)
        run_federation(
            overrides,
            on_round=lambda *_: journal.note("scored"),
            make_grid=lambda num_nodes, run_config: ChaoticGrid(
                num_nodes, run_config, part.schedule, journal, killer
            ),
        )


def run_with_kills(part: Part) -> list[dict[str, Any]]:
    """Run a part whose server dies and is started again until the run ends.

    Returns
    -------
    list of dict
        The journal's last line before each kill.

    Raises
    ------
    RuntimeError
        If a server ends otherwise than by being killed or being done.
    """
    # spawn: forked processes inherit torch's threads, which do not survive it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_lives, part).result()


def _lives(part: Part) -> list[dict[str, Any]]:
    """Fork a process for each life: all has been imported, and nothing been computed yet."""
    importlib.import_module("hafl_app.client.handlers")  # else with the first message of each life
    kills: list[dict[str, Any]] = []
    for life, kill_round in enumerate([*part.kill_rounds, None]):
        server = get_context("fork").Process(target=run_part, args=(part, life, kill_round))
        server.start()
        try:
            server.join()
        finally:
            server.terminate()  # of effect only if this process is interrupted
        if server.exitcode == 0:
            break
        if server.exitcode != -signal.SIGKILL:
            after = f"after {len(kills)} kills; see {part.folder}"
            raise RuntimeError(f"exit code {server.exitcode} {after}")
        kills.append(read_journal(part.folder)[-1])
    return kills


def _killer(part: Part, life: int, kill_round: int | None) -> Callable[[int], None]:
    """Return a function that schedules this process's kill once, at a seeded time in a round."""
    draw = random.Random(f"{part.seed}/chaos/kill/{life}")
    delay = draw.uniform(0, part.round_seconds)
    armed: list[threading.Timer] = []

    def on_training(server_round: int) -> None:
        if kill_round is not None and server_round >= kill_round and not armed:
            armed.append(threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)))
            armed[0].daemon = True
            armed[0].start()

    return on_training


@contextlib.contextmanager
def _recorded(folder: Path, mode: Literal["a", "w"]) -> Iterator[Journal]:
    """Send what this project prints and logs to files of a folder."""
    logger = logging.getLogger("hafl_app")
    journal = Journal(folder / JOURNAL)
    logger.addHandler(journal)
    try:
        with (folder / "run.log").open(mode, encoding="utf-8") as log, output_to(log):
            yield journal
    finally:
        logger.removeHandler(journal)
