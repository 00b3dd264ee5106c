"""Requests to nodes and their replies: made, paired, validated, and entered in the ledger."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from flwr.app import Message, Metadata
from flwr.common.constant import SUPERLINK_NODE_ID

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.server.reply_validation import (
    ReplyError,
    check_finite,
    check_size,
    completed,
    executed_plan,
    read_metrics,
    read_update,
)
from hafl_app.server.request_contents import Dispatches, corrected, for_own_data, masked
from hafl_app.server.secure_sum import SecureSum
from hafl_app.server.traffic import Ledger, Traffic
from hafl_app.server.update import ClientUpdate
from hafl_app.server.weights import UNBOUNDED, ExampleBound
from hafl_app.training.adapter_arrays import from_arrays
from hafl_app.wire.arrays import RecordError
from hafl_app.wire.faults import Fault, fault_of
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import (
    NUM_EXAMPLES,
    STEPS,
    head_bytes,
    message_bytes,
)

_LOGGER = logging.getLogger(__name__)
Content = TypeVar("Content")
Correction = Callable[[int, TrainPlan], Adapter | None]
STATED_EXAMPLES = "stated-examples"
"""Metric of a reply beside ``num-examples``, its weight: how many the node states."""


@dataclass(frozen=True)
class Request:
    """Request to one node, and the bytes that it cost to send.

    Parameters
    ----------
    asked
        The message's; Flower puts its id there when it is sent.
    """

    profile: NodeProfile
    plan: TrainPlan
    server_round: int
    asked: Metadata
    bytes_down: int
    head_bytes_down: int


@dataclass(frozen=True)
class Reply:
    """A validated reply, or the lack of one: it counts if `error` is empty.

    Parameters
    ----------
    request
        Request that it answers.
    bytes_up, head_bytes_up
        Of the message that came; 0 if none did.
    metrics
        By name; empty if the reply does not count.
    update
        Of a training reply that counts.
    error
        Reason why it was rejected; empty if it counts.
    fault
        Kind of the error that the node itself reported, if it did.
    simulated_seconds
        On the node's device by the simulated clock; NaN without one, or if no reply came.
    """

    request: Request
    bytes_up: int = 0
    head_bytes_up: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    update: ClientUpdate | None = None
    error: str = ""
    fault: Fault | None = None
    simulated_seconds: float = math.nan

    def rejected(self, reason: str) -> "Reply":
        """Return the same reply, rejected with a reason."""
        return replace(self, metrics={}, update=None, error=reason)

    @property
    def profile(self) -> NodeProfile:
        """The node that was asked."""
        return self.request.profile

    @property
    def server_round(self) -> int:
        """The round in which it was asked."""
        return self.request.server_round

    @property
    def num_components(self) -> int:
        """Components that it was asked to train, over all modules."""
        return sum(module.num_trained for module in self.request.plan.modules.values())


class RoundMessages:
    """Requests and replies of one phase of a round; a node is asked once and answers at most once.

    Parameters
    ----------
    ledger
        Where every exchange is entered, whether its reply counts or not.
    server_round
        Round, from 1.
    phase
        ``train``, ``evaluate``, ``head``, ``alone``, ``unseen`` or ``generate``.
    label_names
        The run's classes, which nodes with data of their own are sent with every request.
    bound
        The most examples that a client counts as.
    """

    def __init__(
        self,
        ledger: Ledger,
        server_round: int,
        phase: str,
        label_names: Sequence[str] = (),
        bound: ExampleBound = UNBOUNDED,
    ) -> None:
        self._ledger = ledger
        self._server_round = server_round
        self._phase = phase
        self._label_names = label_names
        self._bound = bound
        self._waiting: dict[int, Request] = {}
        self._dispatches = Dispatches(lambda _: Adapter({}), server_round)
        self._correction: Correction | None = None
        self._secure: SecureSum | None = None

    def correct(self, correction: Correction) -> None:
        """Send corrections of gradients along, and insist on the number of steps in replies.

        Parameters
        ----------
        correction
            Of a partition under a plan; None for a node to which none is sent.
        """
        self._correction = correction

    def mask(self, secure: SecureSum) -> None:
        """Ask for masked uploads, as parts of a secure sum that knows every member's plan."""
        self._secure = secure

    def messages(
        self,
        profiles: Sequence[NodeProfile],
        plans: Sequence[TrainPlan],
        dispatch: Callable[[TrainPlan], Adapter],
        message_type: str,
    ) -> list[Message]:
        """Make one message a client; clients that hold the same share the same arrays."""
        return list(self.each_message(profiles, plans, dispatch, message_type))

    def each_message(
        self,
        profiles: Sequence[NodeProfile],
        plans: Sequence[TrainPlan],
        dispatch: Callable[[TrainPlan], Adapter],
        message_type: str,
    ) -> Iterator[Message]:
        """Make one message a client, each when it is asked for.

        Parameters
        ----------
        dispatch
            Adapter to send for a plan; called again when the reply is read, so it must not change
            before.
        """
        self._dispatches = Dispatches(dispatch, self._server_round)
        for profile, plan in zip(profiles, plans, strict=True):
            content = self._dispatches.request(plan)
            if profile.own_data:
                content = for_own_data(content, profile, self._label_names)
            if self._correction is not None:
                content = corrected(content, self._correction(profile.partition_id, plan))
            if self._secure is not None:
                content = masked(content, self._secure, profile.node_id)
            group = str(self._server_round)
            message = Message(content.records, profile.node_id, message_type, group_id=group)
            self._waiting[profile.node_id] = Request(
                profile=profile,
                plan=plan,
                server_round=self._server_round,
                asked=message.metadata,
                bytes_down=content.num_bytes,
                head_bytes_down=content.head_bytes,
            )
            yield message
        self._dispatches.forget_contents()

    def validate_training(self, replies: Iterable[Message]) -> list[Reply]:
        """Validate every reply to a training request by itself, in partition order."""
        return [self._validate(*pair, self._read_training) for pair in self._pairs(replies)]

    def validate_each(self, replies: Iterable[Message]) -> Iterator[Reply]:
        """Validate training replies as they come, in their order; settle one before the next."""
        for reply in replies:
            for pair in self._pairs([reply]):
                yield self._validate(*pair, self._read_training)

    def validate_scores(self, replies: Iterable[Message]) -> list[Reply]:
        """Validate every reply to an evaluation request, in partition order."""
        return [self._validate(*pair, self._read_scores) for pair in self._pairs(replies)]

    def validate_by(
        self,
        replies: Iterable[Message],
        read: Callable[[Message, Mapping[str, float]], Content],
        most_bytes: int,
        *,
        in_order: bool,
    ) -> Iterator[tuple[Reply, Content | None]]:
        """Validate and settle replies that are no updates, in partition order.

        Parameters
        ----------
        read
            Returns what a reply holds beside its metrics.
        most_bytes
            Of a reply; a larger one is not read.
        in_order
            Whether they come in partition order, so that one can be dropped before the next.

        Yields
        ------
        tuple
            The reply, and what it holds; None if it does not count.
        """
        found: list[Content] = []

        def read_all(
            reply: Message, request: Request, num_bytes: int
        ) -> tuple[dict[str, float], None]:
            if num_bytes > most_bytes:
                raise ReplyError(f"{num_bytes} bytes, expected at most {most_bytes}")
            metrics = self._read_metrics(reply, request)
            found.append(read(reply, metrics))
            return metrics, None

        for group in ([reply] for reply in replies) if in_order else [replies]:
            for pair in self._pairs(group):
                settled = self.settle(self._validate(*pair, read_all))
                yield settled, found.pop() if found else None

    def close(self, replies: Sequence[Reply]) -> list[Reply]:
        """Settle these replies and the stragglers that are silent, in partition order."""
        answered = {reply.profile.node_id for reply in replies}
        silent = [r for node_id, r in self._waiting.items() if node_id not in answered]
        settled = [*replies, *(Reply(request, error="no reply in time") for request in silent)]
        settled.sort(key=lambda reply: reply.profile.partition_id)
        return [self.settle(reply) for reply in settled]

    def _pairs(self, replies: Iterable[Message]) -> list[tuple[Message, Request]]:
        """Pair replies with their requests; ignore replies to other requests and second replies."""
        pairs: dict[int, tuple[Message, Request]] = {}
        for reply in replies:
            node_id = self._node_of(reply)
            wanted = node_id in self._waiting and self._answers(reply, node_id)
            if not wanted or node_id in pairs:
                why = "a second reply" if wanted else "a reply to no request of this round"
                _LOGGER.warning("round %d, node %d: %s", self._server_round, node_id, why)
                continue
            pairs[node_id] = (reply, self._waiting[node_id])
        return sorted(pairs.values(), key=lambda pair: pair[1].profile.partition_id)

    def _node_of(self, reply: Message) -> int:
        """Return the node of a reply; one of Flower's own is for the node that does not answer."""
        sender = reply.metadata.src_node_id
        if sender == SUPERLINK_NODE_ID and reply.has_error():
            asked = (node_id for node_id in self._waiting if self._answers(reply, node_id))
            return next(asked, sender)
        return sender

    def _answers(self, reply: Message, node_id: int) -> bool:
        """Whether a reply is to this request, and not a late one to an earlier."""
        return reply.metadata.reply_to_message_id == self._waiting[node_id].asked.message_id

    def _validate(
        self,
        reply: Message,
        request: Request,
        read: Callable[[Message, Request, int], tuple[dict[str, float], ClientUpdate | None]],
    ) -> Reply:
        bytes_up = message_bytes(reply)
        heads = head_bytes(reply.content) if reply.has_content() else 0
        try:
            metrics, update = read(reply, request, bytes_up)
        except ReplyError as error:
            fault = fault_of(reply)
            return Reply(request, bytes_up, heads, error=str(error), fault=fault)
        return Reply(request, bytes_up, heads, metrics, update)

    def settle(self, reply: Reply) -> Reply:
        """Enter one reply in the ledger, log it if it was rejected, and return it without update.

        What is returned may be kept for the whole run: it holds no tensors.
        """
        request, profile = reply.request, reply.profile
        self._waiting.pop(profile.node_id, None)
        if reply.error:
            _LOGGER.warning(
                "round %d, node %d (partition %d): %s reply rejected: %s",
                *(self._server_round, profile.node_id, profile.partition_id),
                *(self._phase, reply.error),
            )
        traffic = Traffic(
            exchanges=1,
            refused=int(bool(reply.error)),
            bytes_down=request.bytes_down,
            bytes_up=reply.bytes_up,
            head_bytes_down=request.head_bytes_down,
            head_bytes_up=reply.head_bytes_up,
        )
        self._ledger.add(self._server_round, self._phase, profile.rank, traffic)
        return replace(reply, update=None)

    def _read_training(
        self, reply: Message, request: Request, num_bytes: int
    ) -> tuple[dict[str, float], ClientUpdate]:
        """Read a training reply.

        Raises
        ------
        ReplyError
            If it must not count.
        """
        sent = self._dispatches.sent(request.plan)
        trained = sent.head if request.plan.uploads_head else {}
        head = {n: tuple(t.shape) for n, t in trained.items()}
        sizes = {n: (f.out_features, f.in_features) for n, f in sent.modules.items()}
        uploaded = request.plan if self._secure is None else request.plan.without_choice()
        check_size(num_bytes, uploaded, head, sizes)  # before anything is unpacked
        metrics = self._read_metrics(reply, request)
        if self._secure is not None:
            return metrics, _masked_update(self._secure, reply, request, sent)
        arrays = read_update(reply, request.plan, head, sizes)
        update = ClientUpdate(
            partition_id=request.profile.partition_id,
            num_examples=int(metrics[NUM_EXAMPLES]),
            plan=executed_plan(arrays, request.plan),
            sent=sent,
            adapter=from_arrays(arrays.modules, arrays.head),
            importance={n: torch.tensor(s) for n, s in arrays.importance.items()},
            steps=int(metrics.get(STEPS, 0)),
        )
        if self._correction is not None and not update.steps:
            raise ReplyError(f"no {STEPS}, which federation.scaffold needs")
        update = replace(update, adapter=completed(update.adapter, update.before, update.plan))
        if not math.isfinite(update.size):
            check_finite(update.adapter)
        return metrics, update

    def _read_scores(
        self, reply: Message, request: Request, num_bytes: int
    ) -> tuple[dict[str, float], None]:
        sent = self._dispatches.sent(request.plan)
        sizes = {n: (f.out_features, f.in_features) for n, f in sent.modules.items()}
        check_size(num_bytes, request.plan, {}, sizes)
        return self._read_metrics(reply, request), None

    def _read_metrics(self, reply: Message, request: Request) -> dict[str, float]:
        """Read the metrics, with the number of examples that counts beside the one stated."""
        metrics = read_metrics(reply, request.profile)
        stated = int(metrics[NUM_EXAMPLES])
        counted = self._bound.count(stated, request.profile)
        return metrics | {NUM_EXAMPLES: float(counted), STATED_EXAMPLES: float(stated)}


def _masked_update(
    secure: SecureSum, reply: Message, request: Request, sent: Adapter
) -> ClientUpdate:
    """Return an update that has changed nothing: what it has is known when the sum is opened."""
    node_id, plan = request.profile.node_id, request.plan
    try:
        secure.take(node_id, reply.content, plan, sent)
    except RecordError as error:
        raise ReplyError(str(error)) from error
    modules = {n: f.select(plan.modules[n].trainable_slots) for n, f in sent.modules.items()}
    return ClientUpdate(
        partition_id=request.profile.partition_id,
        num_examples=secure.examples(node_id),
        plan=plan,
        sent=sent,
        adapter=Adapter(modules, sent.head if plan.uploads_head else {}),
    )
