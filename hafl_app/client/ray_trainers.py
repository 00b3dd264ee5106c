"""Trainers: the processes of a simulation on Ray that train several virtual nodes together.

Flower hands each of its actors one message and the next when it has replied, so no actor ever has
two clients. Here its actors do not train: each passes its message to a trainer, a Ray actor with a
GPU of its own, or one for all on the CPU, and waits. A trainer gathers the messages that wait for
it. Whoever passes a message on needs neither torch nor a model, so this module imports neither.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.app.user_config import UserConfig

from hafl_app.client.gathering import Gathering
from hafl_app.client.warm_worker.ask import WorkerFailedError

if TYPE_CHECKING:
    from hafl_app.training.cohort_choice import CohortChoice

_LOGGER = logging.getLogger(__name__)
TRAINERS = "HAFL_TRAINERS"
"""Variable of a simulation's environment: how many trainers it has; without it, none."""

_PAUSE_SECONDS = 0.2  # Flower looks for new messages every 0.1
_CALLS_AT_ONCE = 64  # Flower has 32 messages at most under way
_started: dict[int, Any] = {}  # a trainer lives as long as the process that started it knows it


def number_of_trainers(environ: Mapping[str, str]) -> int:
    """Return how many trainers this simulation has; 0 if its actors train themselves."""
    return int(environ.get(TRAINERS) or 0)


class Trainer:
    """Answers messages of virtual nodes: training requests in cohorts, others one by one.

    Parameters
    ----------
    run_config
        Of the run.
    pause_s
        See `Gathering`.
    """

    def __init__(self, run_config: UserConfig, pause_s: float = _PAUSE_SECONDS) -> None:
        from hafl_app.client.cohort import Cohorts  # noqa: PLC0415  imports torch
        from hafl_app.client.routing import answer_here  # noqa: PLC0415  imports this module
        from hafl_app.run.build import settings_of_run  # noqa: PLC0415  imports torch

        self._cohorts = cohorts = Cohorts(settings_of_run(run_config))
        self._gathering: Gathering[tuple[Message, Context], Message] = Gathering(
            cohorts.answer, lambda request: answer_here(*request), lambda: cohorts.clients, pause_s
        )

    def answer(self, message: Message, context: Context) -> tuple[Message, RecordDict]:
        """Return the reply to a message, and the node's state until the next one."""
        trains = message.metadata.message_type == MessageType.TRAIN
        reply = self._gathering.answer((message, context), in_company=trains)
        return reply, context.state

    def choice(self) -> "CohortChoice | None":
        """Return how many train together and why; None before any have."""
        choice = self._cohorts.choice
        if choice is None or choice.clients == 1:
            return choice
        most = self._gathering.largest
        return replace(choice, reason=f"{choice.reason}; {most} at once at most")


def ask_trainer(trainers: int, message: Message, context: Context) -> Message:
    """Answer a message by the trainer of its node; ``context.state`` becomes what it says.

    Raises
    ------
    WorkerFailedError
        If the trainer dies over the message, and another one as well.
    """
    ray = _ray()
    number = int(context.node_config["partition-id"]) % trainers
    for _ in range(2):
        try:
            trainer = _trainer(number, context.run_config)
            reply, context.state = ray.get(trainer.answer.remote(message, context))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # as in this process
        except ray.exceptions.RayActorError as error:
            _LOGGER.warning("trainer %d: %s", number, " ".join(str(error).split()))
            ray.kill(_started.pop(number))  # so that its name is free at once
            continue
        return reply  # type: ignore[no-any-return]
    raise WorkerFailedError("the process that trains for this node died twice over one message")


def choice_of(trainers: int) -> "CohortChoice | None":
    """Return how many clients the trainers of this simulation train together, see `Trainer`."""
    ray = _ray()
    for number in range(trainers):
        try:
            choice: CohortChoice | None = ray.get(ray.get_actor(_name(number)).choice.remote())
        except (ValueError, ray.exceptions.RayActorError):  # none was needed yet, or it has died
            continue
        if choice is not None:
            return choice
    return None


def _trainer(number: int, run_config: UserConfig) -> Any:
    """Return a trainer, started if need be; its name is the Ray job's alone."""
    if number not in _started:
        ray = _ray()
        actor = ray.remote(Trainer).options(
            name=_name(number),
            get_if_exists=True,  # another process may have been quicker
            num_cpus=0,
            num_gpus=min(1.0, ray.cluster_resources().get("GPU", 0.0)),
            max_concurrency=_CALLS_AT_ONCE,
        )
        _started[number] = actor.remote(run_config)
    return _started[number]


def _ray() -> Any:
    """Return Ray, to whose job this process of a simulation belongs."""
    import ray  # noqa: PLC0415  takes a second

    return ray


def _name(number: int) -> str:
    return f"hafl-trainer-{number}"
