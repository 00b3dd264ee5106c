"""Requests to nodes and their replies: made, paired, judged, and entered in the ledger."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from hafl_app.federation.judge import ReplyError, check_shapes, read_metrics, read_update
from hafl_app.federation.ledger import Entry, Ledger
from hafl_app.federation.profiles import NodeProfile
from hafl_app.federation.records import (
    CONFIG,
    NUM_EXAMPLES,
    PLAN,
    SERVER_ROUND,
    AdapterArrays,
    adapter_content,
    head_bytes,
    message_bytes,
    plan_record,
)
from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.training.adapter import from_arrays, to_arrays

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientUpdate:
    """One accepted reply, as a method's fold sees it.

    Parameters
    ----------
    partition_id
        Whose it is; updates are folded in this order.
    num_examples
        Its weight, above 0.
    plan, sent
        What it was asked to do, and the adapter that it received.
    adapter
        Its trained components: the first ``rank`` of ``plan.modules[name].trainable``.
    importance
        Module name to component scores, if the plan asked for them.
    """

    partition_id: int
    num_examples: int
    plan: TrainPlan
    sent: Adapter
    adapter: Adapter
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    def components(self, module: str) -> tuple[int, ...]:
        """Global indices of the components that this update holds for a module."""
        return self.plan.modules[module].trainable[: self.adapter.modules[module].rank]


@dataclass(frozen=True)
class ClientReport:
    """What became of one client in one round; `error` is empty if its reply counts."""

    server_round: int
    profile: NodeProfile
    components: int
    metrics: Mapping[str, float]
    bytes_down: int
    bytes_up: int
    error: str = ""


@dataclass(frozen=True)
class Request:
    """What one node was asked, and what that cost to send."""

    profile: NodeProfile
    plan: TrainPlan
    sent: Adapter
    bytes_down: int
    head_bytes_down: int


class Exchange:
    """One phase of one round: every node is asked once and answers once, or not at all.

    Parameters
    ----------
    ledger
        Where every exchange is entered, whether its reply counts or not.
    server_round
        Round, from 1.
    phase
        ``train``, ``evaluate`` or ``alone``.
    """

    def __init__(self, ledger: Ledger, server_round: int, phase: str) -> None:
        self._ledger = ledger
        self._server_round = server_round
        self._phase = phase
        self._waiting: dict[int, Request] = {}

    def messages(
        self,
        profiles: Sequence[NodeProfile],
        plans: Sequence[TrainPlan],
        dispatch: Callable[[TrainPlan], Adapter],
        message_type: str,
    ) -> list[Message]:
        """Make one message a client; clients with the same plan share the same records."""
        contents: dict[str, tuple[RecordDict, Adapter]] = {}
        messages = []
        for profile, plan in zip(profiles, plans, strict=True):
            key = plan.to_json()
            if key not in contents:
                sent = dispatch(plan)
                contents[key] = (self._content(plan, sent), sent)
            content, sent = contents[key]
            group = str(self._server_round)
            message = Message(content, profile.node_id, message_type, group_id=group)
            messages.append(message)
            self._waiting[profile.node_id] = Request(
                profile, plan, sent, message_bytes(message), head_bytes(content)
            )
        return messages

    def pairs(self, replies: Iterable[Message]) -> list[tuple[Message, Request]]:
        """Pair replies with their requests, in partition order; strangers are ignored."""
        pairs: dict[int, tuple[Message, Request]] = {}
        for reply in replies:
            node_id = reply.metadata.src_node_id
            if node_id in self._waiting:
                pairs.setdefault(node_id, (reply, self._waiting[node_id]))
        return sorted(pairs.values(), key=lambda pair: pair[1].profile.partition_id)

    def judge_training(
        self, reply: Message, request: Request
    ) -> tuple[ClientUpdate | None, ClientReport]:
        """Return the update if the reply counts, and what is to be told about it."""
        bytes_up = self._enter(reply, request)
        try:
            metrics = read_metrics(reply, request.profile)
            arrays = read_update(
                reply, request.plan, {n: tuple(t.shape) for n, t in request.sent.head.items()}
            )
            sizes = {n: (f.out_features, f.in_features) for n, f in request.sent.modules.items()}
            check_shapes(arrays, sizes)
        except ReplyError as error:
            _warn(request.profile, error)
            return None, self._report(request, {}, bytes_up, str(error))
        update = ClientUpdate(
            partition_id=request.profile.partition_id,
            num_examples=int(metrics[NUM_EXAMPLES]),
            plan=request.plan,
            sent=request.sent,
            adapter=from_arrays(arrays.modules, arrays.head),
            importance={n: torch.tensor(s) for n, s in arrays.importance.items()},
        )
        return update, self._report(request, metrics, bytes_up)

    def judge_scores(self, reply: Message, request: Request) -> dict[str, float] | None:
        """Return the scores of a reply by name, or None if it does not count."""
        self._enter(reply, request)
        try:
            return read_metrics(reply, request.profile)
        except ReplyError as error:
            _warn(request.profile, error)
            return None

    def close(self) -> list[ClientReport]:
        """Enter the nodes of which nothing came, and report them."""
        silent = list(self._waiting.values())
        for request in silent:
            self._record(request, 0, 0)
        self._waiting = {}
        return [self._report(request, {}, 0, "no reply in time") for request in silent]

    def _content(self, plan: TrainPlan, sent: Adapter) -> RecordDict:
        config = ConfigRecord({SERVER_ROUND: self._server_round})
        arrays = AdapterArrays(*to_arrays(sent))
        return adapter_content(arrays, **{PLAN: plan_record(plan), CONFIG: config})

    def _enter(self, reply: Message, request: Request) -> int:
        bytes_up = message_bytes(reply)
        self._record(request, bytes_up, head_bytes(reply.content) if reply.has_content() else 0)
        self._waiting.pop(request.profile.node_id, None)
        return bytes_up

    def _record(self, request: Request, bytes_up: int, head_bytes_up: int) -> None:
        self._ledger.add(
            Entry(
                self._server_round,
                self._phase,
                request.profile.partition_id,
                request.profile.rank,
                request.bytes_down,
                bytes_up,
                request.head_bytes_down,
                head_bytes_up,
            )
        )

    def _report(
        self, request: Request, metrics: Mapping[str, float], bytes_up: int, error: str = ""
    ) -> ClientReport:
        components = sum(len(module.trainable) for module in request.plan.modules.values())
        return ClientReport(
            self._server_round,
            request.profile,
            components,
            metrics,
            request.bytes_down,
            bytes_up,
            error,
        )


def _warn(profile: NodeProfile, error: ReplyError) -> None:
    _LOGGER.warning(
        "node %d (partition %d): reply refused: %s", profile.node_id, profile.partition_id, error
    )
