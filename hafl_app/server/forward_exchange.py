"""Ask all clients what comes out of the same adapter: a forward pass that trains nothing."""

from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import HeadPolicy, TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server.method import Method
from hafl_app.server.participation import Participation
from hafl_app.server.replies import all_replies, replies_in_order
from hafl_app.server.reply_validation import ReplyError
from hafl_app.server.round_messages import Content, RoundMessages
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.faults import one_line
from hafl_app.wire.node_profile import NodeProfile

PHASE = "head"
"""Under which the traffic is entered in the ledger."""

_SLACK_BYTES = 64 * 1024  # what a reply may weigh above its numbers


class ForwardExchange:
    """Requests to all reachable clients with one adapter, and their replies.

    Parameters
    ----------
    method
        Of the run, by whose options clients are waited for.
    participation
        The run's nodes.
    new_exchange
        Returns the messages of a round and a phase.
    """

    def __init__(
        self,
        method: Method,
        participation: Participation,
        new_exchange: Callable[[int, str], RoundMessages],
    ) -> None:
        self._method = method
        self._participation = participation
        self._new_exchange = new_exchange

    def ask(
        self,
        server_round: int,
        grid: Grid,
        message_type: str,
        policy: HeadPolicy,
        adapter: Adapter,
        read: Callable[[Message, Mapping[str, float]], Content],
        payload_bytes: int,
    ) -> Iterator[tuple[NodeProfile, Content]]:
        """Send all reachable clients the same adapter; yield what counts, in partition order.

        Parameters
        ----------
        policy, adapter
            Of the plan, and what is sent: the whole global adapter or a cut of it, with a head if
            the policy sends one.
        read
            Returns what a reply holds beside its metrics; a `RecordError` or `ReplyError` rejects
            it.
        payload_bytes
            Bytes of the numbers that are asked for.
        """
        profiles = self._participation.reachable(server_round, grid)
        plan, sent = _with_effect(policy, adapter)
        federation = self._method.options.federation
        exchange = self._new_exchange(server_round, PHASE)
        messages = exchange.messages(profiles, [plan] * len(profiles), lambda _: sent, message_type)
        timeout_s, streaming = federation.round_timeout_s, federation.streaming
        replies = (
            replies_in_order(grid, messages, timeout_s, federation.stream_buffer)
            if streaming
            else all_replies(grid, messages, timeout_s, self._participation.seconds)
        )
        most_bytes, quarantine = payload_bytes + _SLACK_BYTES, self._participation.quarantine
        for reply, content in exchange.validate_by(
            replies, _rejecting(read), most_bytes, in_order=streaming
        ):
            if content is None:
                quarantine.record(reply.profile.node_id, False, server_round)
            else:
                yield reply.profile, content
        for silent in exchange.close([]):
            quarantine.record(silent.profile.node_id, False, server_round)


def _with_effect(policy: HeadPolicy, adapter: Adapter) -> tuple[TrainPlan, Adapter]:
    """Return the plan that holds what has an effect of an adapter and trains nothing, and it.

    A component whose column of lora_B is 0 has none: before round 1 that is each of them.
    """
    held, modules = {}, {}
    for name, factors in adapter.modules.items():
        with_effect = factors.lora_B.any(0).nonzero().flatten().tolist()
        modules[name] = ModulePlan(held=tuple(with_effect), trainable=())
        held[name] = factors.select(with_effect)
    return TrainPlan(modules, head=policy), Adapter(held, adapter.head)


def _rejecting(
    read: Callable[[Message, Mapping[str, float]], Content],
) -> Callable[[Message, Mapping[str, float]], Content]:
    """Return the reader that rejects a reply which the codec cannot read."""

    def read_or_reject(reply: Message, metrics: Mapping[str, float]) -> Content:
        try:
            return read(reply, metrics)
        except RecordError as error:
            raise ReplyError(one_line(str(error))) from error

    return read_or_reject
