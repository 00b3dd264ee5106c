"""The in-process engine: run a federation with every ClientApp called in this process.

`run_federation` runs one on an `InProcessGrid`, Flower's `Grid` of virtual nodes. Same apps,
messages and byte counts as under a SuperLink, without its start-up time. Messages made outside
Flower's own grids need a few of its private parts; they are touched only here, and a test names
the version of flwr that they were read from.
"""

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from hafl_app.client.cohort import Cohorts
from hafl_app.client.permissions import own_machine
from hafl_app.client_app import app as client_app
from hafl_app.config.compose import compose
from hafl_app.lowrank.factors import Adapter
from hafl_app.run.federation import run
from hafl_app.training.cohort_choice import CohortChoice

_LOGGER = logging.getLogger(__name__)


def run_federation(
    overrides: Sequence[str],
    on_round: Callable[[int, Adapter], None] | None = None,
    make_grid: Callable[[int, dict[str, str]], Grid] | None = None,
) -> None:
    """Run one federation in this process, with any files and models that its user names.

    Parameters
    ----------
    overrides
        Hydra overrides of `conf/`.
    on_round
        Called with the round and the global adapter, before the first round (0) and after each.
    make_grid
        Makes the grid from the number of nodes and the run config; None for an `InProcessGrid`.

    Raises
    ------
    hafl_app.config.compose.SettingsError
        If the settings are wrong; for other errors see `hafl_app.run.federation.run`.
    """
    settings = compose(overrides)
    run_config = {"overrides": shlex.join(overrides)}
    cohorts = None if settings.federation.cohort == "1" else Cohorts(settings)
    make_grid = make_grid or partial(InProcessGrid, client_app, cohorts=cohorts)
    with server_identity(), own_machine():
        grid = make_grid(settings.federation.num_clients, run_config)
        run(grid, settings, overrides=overrides, on_round=on_round)


class InProcessGrid(Grid):
    """Virtual nodes that answer at once, one after another, in this process.

    Parameters
    ----------
    client_app
        Called for every message.
    num_nodes
        Nodes with ``partition-id`` 0 to ``num_nodes - 1``, unless `node_configs` says otherwise.
    run_config
        ``context.run_config`` of every client.
    node_configs
        ``context.node_config`` of each node: ``num_nodes`` of them.
    cohorts
        Answers training requests of several nodes together; None: one after another.
    """

    answers_at_once = True  # see `hafl_app.server.replies.ANSWERS_AT_ONCE`

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, Any] | None = None,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        cohorts: Cohorts | None = None,
    ) -> None:
        if node_configs is None:
            node_configs = [
                {"partition-id": number, "num-partitions": num_nodes} for number in range(num_nodes)
            ]
        if len(node_configs) != num_nodes:
            raise ValueError(f"{len(node_configs)} node configs for {num_nodes} nodes")
        self._client_app = client_app
        self._cohorts = cohorts
        self._run = Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
        self._cpu_seconds = 0.0
        self.on_answer: Callable[[int], None] = lambda _: None
        self._contexts = {
            node_id: Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config=UserConfig(node_config),
                state=RecordDict(),
                run_config=UserConfig(run_config or {}),
            )
            for node_id, node_config in enumerate(node_configs, 1)
        }

    @property
    def client_cpu_seconds(self) -> float:
        """CPU seconds of all threads in which clients have answered so far."""
        return self._cpu_seconds

    def cohort_choice(self) -> CohortChoice | None:
        """Return how many clients train together; None before that is chosen."""
        return self._cohorts.choice if self._cohorts else None

    def keep_cohort_choice(self, choice: CohortChoice) -> None:
        """Train as many clients together as in the run that goes on, unless a number is given."""
        if self._cohorts is not None:
            self._cohorts.keep(choice)

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def client_states(self) -> dict[int, RecordDict]:
        """Return the state that each client keeps between its messages, by partition."""
        return {node_id - 1: context.state for node_id, context in self._contexts.items()}

    def set_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Restore the clients' states of an earlier run, by partition."""
        for partition_id, state in states.items():
            self._contexts[partition_id + 1].state = state

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; like Flower's own grids."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver each message to its node; the replies wait for `pull_messages`."""
        message_ids, waiting = [], iter(messages)
        while group := list(islice(waiting, self._cohorts.clients if self._cohorts else 1)):
            for message in group:
                message.metadata.__dict__["_message_id"] = str(uuid4())
            started = time.process_time()
            replies = [
                reply or self._answer(message)
                for message, reply in zip(group, self._together(group), strict=True)
            ]
            self._cpu_seconds += time.process_time() - started
            for message, reply in zip(group, replies, strict=True):
                self.on_answer(message.metadata.dst_node_id)
                message_ids.append(message.metadata.message_id)
                self._replies[message_ids[-1]] = self._sent(reply)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver each message to its node and return the replies, in the order of the messages."""
        del timeout  # a call in this process cannot be abandoned
        return self.pull_messages(self.push_messages(messages))

    def _together(self, messages: Sequence[Message]) -> list[Message | None]:
        """Answer messages together if they ask different nodes to train; None for one left."""
        if self._cohorts is None:
            return [None] * len(messages)
        return self._cohorts.answer([(m, self._contexts[m.metadata.dst_node_id]) for m in messages])

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message, context)
        except Exception as error:  # as in Flower's engine: a node's failure is a reply
            _LOGGER.debug("a client raised", exc_info=True)
            reply = Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"),
                reply_to=message,
            )
        return reply

    @staticmethod
    def _sent(reply: Message) -> Message:
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply


@contextmanager
def server_identity(run_id: int = 1) -> Iterator[None]:
    """Give this process the identity under which a run's ServerApp creates messages."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
