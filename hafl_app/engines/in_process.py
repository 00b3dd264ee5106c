"""The in-process engine: Flower's `Grid`, with every ClientApp called in this process.

Same apps, messages and byte counts as under a SuperLink, without its start-up time. Messages made
outside Flower's own grids need a few of its private parts; they are touched only here, and a test
names the version of flwr that they were read from.
"""

import logging
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_LOGGER = logging.getLogger(__name__)


class InProcessGrid(Grid):
    """Virtual nodes that answer when they are asked, one after another, in this process.

    Parameters
    ----------
    client_app
        Called for every message.
    num_nodes
        Nodes with ``partition-id`` 0 to ``num_nodes - 1``, unless `node_configs` says otherwise.
    run_config
        What every client finds in ``context.run_config``.
    node_configs
        What each node finds in ``context.node_config``: ``num_nodes`` of them.
    """

    answers_at_once = True  # see `hafl_app.server.replies.ANSWERS_AT_ONCE`

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, Any] | None = None,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if node_configs is None:
            node_configs = [
                {"partition-id": number, "num-partitions": num_nodes} for number in range(num_nodes)
            ]
        if len(node_configs) != num_nodes:
            raise ValueError(f"{len(node_configs)} node configs for {num_nodes} nodes")
        self._client_app = client_app
        self._run = Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
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

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def client_states(self) -> dict[int, RecordDict]:
        """Return what each client keeps between its messages, by partition."""
        return {node_id - 1: context.state for node_id, context in self._contexts.items()}

    def set_client_states(self, states: Mapping[int, RecordDict]) -> None:
        """Give clients what they kept in an earlier run."""
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
        """Let each node answer its message; the replies wait for `pull_messages`."""
        message_ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = str(uuid4())
            self._replies[message_id] = self._answer(message)
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let each node answer and return the replies, in the order of the messages."""
        del timeout  # a call in this process cannot be abandoned
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message, context)
        except Exception as error:  # as in Flower's engine: a node's failure is a reply
            _LOGGER.debug("%s", traceback.format_exc())
            reply = Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"),
                reply_to=message,
            )
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply


@contextmanager
def server_identity(run_id: int = 1) -> Iterator[None]:
    """Let this process create messages as the ServerApp of a run."""
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
