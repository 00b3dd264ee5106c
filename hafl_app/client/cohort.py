"""Training requests of several clients of one process, answered together.

Requests are opened, and replies made, by the code that answers one at a time. A client that
cannot take part, or fails in any way, is left to it: its reply is then the same as ever.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message, MessageType

from hafl_app.client.handlers import Opened, open_request, reply_of
from hafl_app.config.schema import Settings
from hafl_app.kept import cache_folder, kept
from hafl_app.run import build
from hafl_app.run.summary import versions
from hafl_app.server.client_sampling import sample_size
from hafl_app.training.cohort import obstacle, obstacle_of, train_cohort
from hafl_app.training.cohort_choice import (
    CHOSEN_CLIENTS,
    CohortChoice,
    choose,
    differ,
    steps_of,
    too_short,
)
from hafl_app.training.device import cpu_name, describe_device, resolve_device, threads
from hafl_app.training.lora_model import LoraModel
from hafl_app.training.quantization.precisions import BLOCKWISE
from hafl_app.training.task import Task, TrainResult

_LOGGER = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_OF_SPEED = ("batch_size", "gradient_checkpointing", "optimizer", "precision", "num_threads")
"""Settings of a client that its speed depends on; a rate is searched without measuring again."""


class Cohorts:
    """Clients that train together: how many, and their replies.

    Parameters
    ----------
    settings
        Of the run; ``federation.cohort`` is a number of clients, or ``auto``.

    Attributes
    ----------
    choice
        How many clients train together; None before the first of them have decided it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._asked = settings.federation.cohort_clients
        self.choice: CohortChoice | None = None
        if why_not := _always_alone(settings):
            self.choice = CohortChoice(1, why_not)

    @property
    def clients(self) -> int:
        """Requests to gather: those of a cohort, as long as it may come to one."""
        if self.choice is not None:
            return self.choice.clients
        return self._asked or CHOSEN_CLIENTS

    def keep(self, choice: CohortChoice) -> None:
        """Keep the choice of the run that goes on, unless a number is given now."""
        if self._asked is None:
            self.choice = choice

    def answer(self, requests: Sequence[tuple[Message, Context]]) -> list[Message | None]:
        """Answer training requests of different nodes; None for each to be answered alone."""
        replies: list[Message | None] = [None] * len(requests)
        nodes = {message.metadata.dst_node_id for message, _ in requests}
        trains = all(m.metadata.message_type == MessageType.TRAIN for m, _ in requests)
        if len(requests) < 2 or self.clients < 2 or len(nodes) < len(requests) or not trains:
            return replies
        opened, tasks = self._opened(requests)
        with threads(self._settings.client.num_threads):
            results = self._train(opened[0].job.model, tasks) if len(opened) > 1 else []
        numbers = {id(message): number for number, (message, _) in enumerate(requests)}
        for one, result in zip(opened, results or [], strict=False):
            if result is not None:
                replies[numbers[id(one.message)]] = _attempt(reply_of, one, result)
        return replies

    def _opened(
        self, requests: Sequence[tuple[Message, Context]]
    ) -> tuple[list[Opened], list[Task]]:
        """Open the requests of those clients that may train together."""
        found = [opened for request in requests if (opened := _attempt(open_request, *request))]
        able = [opened for opened in found if not obstacle(opened.job.options)]
        pairs = [(opened, task) for opened in able if (task := _attempt(_task, opened))]
        return [opened for opened, _ in pairs], [task for _, task in pairs]

    def _train(self, model: LoraModel, tasks: Sequence[Task]) -> list[TrainResult | None] | None:
        """Train together if that is how it is to be; the first clients decide."""
        if self.choice is None:
            self.choice = _attempt(self._choose, model, tasks)
            if self.choice is not None:
                _LOGGER.info(
                    "federation.cohort=%s: %d at a time: %s",
                    *(self._settings.federation.cohort, self.choice.clients, self.choice.reason),
                )
        if self.choice is None or self.choice.clients < 2:
            return None
        return _attempt(train_cohort, model, tasks)

    def _choose(self, model: LoraModel, tasks: Sequence[Task]) -> CohortChoice:
        if why_not := obstacle_of(model):
            return CohortChoice(1, why_not)
        if not self._asked and (why_not := too_short(model.device, self._steps(tasks))):
            return CohortChoice(1, why_not)
        if why_not := differ(model, tasks):
            return CohortChoice(1, why_not)
        if self._asked:
            return CohortChoice(self._asked, "as the setting says")
        # Kept on this machine: the same run twice is to give the same numbers to the last bit.
        key = _measured_on(self._settings)
        return kept(_folder(), key, CohortChoice, lambda: choose(model, tasks))

    def _steps(self, tasks: Sequence[Task]) -> int:
        """Return about how many steps all clients take in the run, by those of some."""
        federation = self._settings.federation
        clients = sample_size(federation.fraction_train, federation.num_clients)
        mean = sum(steps_of(task) for task in tasks) / len(tasks)
        return round(mean * clients * federation.num_rounds)


def _always_alone(settings: Settings) -> str:
    """Say why the clients of a run never train together; empty if they may."""
    if settings.model.quantization == BLOCKWISE:
        return f"model.quantization={BLOCKWISE}: every client has its own base model"
    if settings.privacy.kind == "local_dp":
        return "privacy=local_dp: a node's noise depends on the last bit of its upload"
    if settings.strategy.traits.trains_cores:
        return "the strategy: its clients train cores, each in a model of its own"
    return obstacle(build.train_options(settings)) or ""


def _attempt(function: Callable[..., _Result], *arguments: Any) -> _Result | None:
    """Return a function's result; None if it fails, which is reported when answered alone."""
    try:
        return function(*arguments)
    except Exception:
        _LOGGER.info("trained one at a time instead of together", exc_info=True)
        return None


def _task(opened: Opened) -> Task:
    job = opened.job
    examples = job.share.train()
    return Task(job.adapter, job.plan, examples, job.options, job.seed, job.correction)


def _folder() -> Path:
    return cache_folder() / "cohorts"


def _measured_on(settings: Settings) -> dict[str, Any]:
    """Return all that a measurement depends on."""
    device = resolve_device(settings.client.device)
    return {
        "model": asdict(settings.model),
        "lora": asdict(settings.lora),
        "client": {name: getattr(settings.client, name) for name in _OF_SPEED},
        "ranks": asdict(settings.ranks),
        "length": settings.dataset.max_length,
        "strategy": type(settings.strategy).__name__,
        "device": [describe_device(device), cpu_name()],
        "versions": dict(versions()),
    }
