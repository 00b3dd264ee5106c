"""Training requests of several clients of one process, answered together.

Requests are opened, and replies made, by the code that answers one at a time. A client that
cannot take part, or fails in any way, is left to it: its reply is then the same as ever.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message

from hafl_app.client.handlers import Opened, open_request, reply_of
from hafl_app.config.schema import Settings
from hafl_app.kept import kept
from hafl_app.run.summary import versions
from hafl_app.run.tokenization import cache_folder
from hafl_app.training.cohort import obstacle, obstacle_of, train_cohort
from hafl_app.training.cohort_choice import MOST_CLIENTS, CohortChoice, choose, differ
from hafl_app.training.device import cpu_name, describe_device, resolve_device, threads
from hafl_app.training.local import Task
from hafl_app.training.quantization.block_precision import BLOCKWISE

_LOGGER = logging.getLogger(__name__)
_Result = TypeVar("_Result")
AUTO = "auto"


class Cohorts:
    """Clients that train together: how many, and their replies.

    Parameters
    ----------
    settings
        Of the run; ``federation.cohort`` is a number of clients, or ``auto``.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        asked = settings.federation.cohort
        self._asked = None if asked == AUTO else int(asked)
        self.choice: CohortChoice | None = None
        if self._asked == 1:
            self.choice = CohortChoice(1, "federation.cohort=1")
        elif settings.model.quantization == BLOCKWISE:
            self.choice = CohortChoice(1, f"model.quantization={BLOCKWISE}: several base models")

    @property
    def clients(self) -> int:
        """Requests to gather: those of a cohort, as long as it may come to one."""
        if self.choice is not None:
            return self.choice.clients
        kind = resolve_device(self._settings.client.device).type
        return self._asked or MOST_CLIENTS[kind]

    def keep(self, choice: CohortChoice) -> None:
        """Keep the choice of the run that goes on, unless a number is given now."""
        if self._asked is None:
            self.choice = choice

    def answer(self, requests: Sequence[tuple[Message, Context]]) -> list[Message | None]:
        """Answer training requests; None for each that is to be answered alone."""
        replies: list[Message | None] = [None] * len(requests)
        if len(requests) < 2 or self.clients < 2:
            return replies
        opened = {
            number: found
            for number, request in enumerate(requests)
            if (found := _attempt(open_request, *request)) and not obstacle(found.job.options)
        }
        with threads(self._settings.client.num_threads):
            tasks = {n: t for n, o in opened.items() if (t := _attempt(_task, o))}
            if len(tasks) < 2 or self._chosen(opened, tasks) < 2:
                return replies
            model = opened[next(iter(tasks))].job.model
            results = train_cohort(model, list(tasks.values()))
        for number, result in zip(tasks, results, strict=True):
            if result is not None:
                replies[number] = _attempt(reply_of, opened[number], result)
        return replies

    def _chosen(self, opened: dict[int, Opened], tasks: dict[int, Task]) -> int:
        """Return how many clients train together, which the first of them decide."""
        if self.choice is None:
            model = opened[next(iter(tasks))].job.model
            self.choice = self._choose(model, list(tasks.values()))
            _LOGGER.info(
                "federation.cohort=%s: %d clients at a time (%s)",
                *(self._settings.federation.cohort, self.choice.clients, self.choice.reason),
            )
        return self.choice.clients

    def _choose(self, model: Any, tasks: list[Task]) -> CohortChoice:
        why_not = obstacle_of(model) or differ(model, tasks)
        if why_not:
            return CohortChoice(1, why_not)
        if self._asked:
            return CohortChoice(self._asked, f"federation.cohort={self._asked}")
        # Kept on this machine, for the same run twice should give the same numbers to the last bit.
        return kept(
            _folder(), _measured_on(self._settings), CohortChoice, lambda: choose(model, tasks)
        )


def _attempt(function: Callable[..., _Result], *arguments: Any) -> _Result | None:
    """Return a function's result; None if it fails, which is reported when answered alone."""
    try:
        return function(*arguments)
    except Exception:
        _LOGGER.debug("a client is answered alone", exc_info=True)
        return None


def _task(opened: Opened) -> Task:
    job = opened.job
    return Task(job.adapter, job.plan, job.share.train(), job.options, job.seed)


def _folder() -> Path:
    return cache_folder() / "cohorts"


def _measured_on(settings: Settings) -> dict[str, Any]:
    """Return all that a measurement depends on."""
    device = resolve_device(settings.client.device)
    return {
        "model": asdict(settings.model),
        "lora": asdict(settings.lora),
        "client": asdict(settings.client),
        "ranks": asdict(settings.ranks),
        "length": settings.dataset.max_length,
        "strategy": type(settings.strategy).__name__,
        "device": [describe_device(device), cpu_name()],
        "versions": dict(versions()),
    }
