"""The template that every aggregation method shares.

A method says in a plan what each client receives and trains (`plan`), what is sent for it
(`dispatch`), and how the uploads become the next global adapter (`begin`, `accumulate`,
`finish`). Everything else is here: profiles, sampling, messages, judging, heads and the ledger.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from hafl_app.config.schema import number
from hafl_app.federation.judge import ReplyError, check_shapes, read_metrics, read_update
from hafl_app.federation.ledger import Entry, Ledger
from hafl_app.federation.profiles import NodeDirectory, NodeProfile, matches
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
from hafl_app.federation.sampling import sample_profiles
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import HeadPolicy, ModulePlan, TrainPlan
from hafl_app.training.adapter import from_arrays, to_arrays

_LOGGER = logging.getLogger(__name__)
_FLOAT32_BYTES = 4


class RoundFailedError(RuntimeError):
    """A round in which no client gave a reply that counts."""


class StrategyError(ValueError):
    """A federation that a method cannot serve, with the reason."""


@dataclass(frozen=True)
class FederationOptions:
    """What holds for a whole run, whatever the method.

    Parameters
    ----------
    seed
        Decides who takes part in which round.
    fraction_train, fraction_evaluate
        Share of the nodes per round, in [0, 1].
    evaluate_every
        Rounds between evaluations on the nodes, at least 1; the last round always counts.
    local_epochs, max_steps
        Length of local training, see `TrainPlan`.
    head
        What happens to the classification head, see `TrainPlan`.
    lora_alpha, scaling
        PEFT's ``lora_alpha``, and how it becomes the scaling: ``constant``
        (``alpha / max_rank``), ``per_rank`` (``alpha / r``) or ``rslora`` (``alpha / sqrt(r)``).
    timeout_s
        How long to wait for the replies of a round.
    """

    seed: int = 0
    fraction_train: float = 1.0
    fraction_evaluate: float = 1.0
    evaluate_every: int = 1
    num_rounds: int = 1
    local_epochs: int = 1
    max_steps: int = 0
    head: HeadPolicy = "averaged"
    lora_alpha: float = 16.0
    scaling: str = "constant"
    timeout_s: float = 3600.0


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
class _Request:
    profile: NodeProfile
    plan: TrainPlan
    sent: Adapter
    bytes_down: int
    head_bytes_down: int


@dataclass(kw_only=True, eq=False)
class HeterogeneousLora(FedAvg, ABC):
    """Template of a method that serves clients of different rank.

    Parameters
    ----------
    max_rank
        Rank of the global adapter, at least 1. No client exceeds it.
    """

    max_rank: int = number(8, at_least=1)

    # What a federation of equal ranks computes: "factor mean" or "product mean", weighted by
    # num_examples. The conformance suite holds every method to it, and to the laws that it lists
    # there, unless the method declares here which one its paper breaks, and where it says so.
    homogeneous_form: ClassVar[str] = "factor mean"
    breaks: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        super().__init__()
        self.options = FederationOptions()
        self.ledger = Ledger()
        self.directory = NodeDirectory(self.options.timeout_s)
        self.on_client: Callable[[ClientReport], None] = lambda _: None
        self.global_adapter = Adapter({})
        self.head_shapes: Mapping[str, tuple[int, ...]] = {}
        self._requests: dict[int, _Request] = {}
        self.round_started = 0.0
        self.train_loss = math.nan
        self.client_scores: Mapping[str, float] = {}

    # ---- what a method overrides -----------------------------------------------------------

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse a federation of these rank budgets, or do nothing.

        Parameters
        ----------
        ranks
            Every rank that occurs, also those of single layer types.

        Raises
        ------
        StrategyError
            If the method cannot serve them; the message says why.
        """
        if min(ranks, default=1) < 1:
            raise StrategyError(f"a client has rank {min(ranks)}, expected at least 1")
        too_large = [rank for rank in ranks if rank > self.max_rank]
        if too_large:
            raise StrategyError(
                f"a client has rank {max(too_large)}, above lora.max_rank={self.max_rank}"
            )

    @abstractmethod
    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Decide what a client receives and trains in this round."""

    def dispatch(self, plan: TrainPlan) -> Adapter:
        """Return what a client receives: the held components, and the head if it travels."""
        modules = {
            name: factors.select(plan.modules[name].held)
            for name, factors in self.global_adapter.modules.items()
        }
        return Adapter(modules, self.global_adapter.head if plan.head == "averaged" else {})

    @abstractmethod
    def begin(self) -> Any:
        """Return the empty state of a round's fold."""

    @abstractmethod
    def accumulate(self, state: Any, update: ClientUpdate) -> Any:
        """Fold one update in and return the new state; called in partition order."""

    @abstractmethod
    def finish(self, state: Any) -> Mapping[str, LoraFactors]:
        """Return the factors of the next global adapter; components nobody trained stay."""

    # ---- helpers for methods ---------------------------------------------------------------

    def scaling_of(self, rank: int) -> float:
        """Return PEFT's scaling for a client of this rank."""
        alpha = self.options.lora_alpha
        if self.options.scaling == "constant":
            return alpha / self.max_rank
        return alpha / (rank if self.options.scaling == "per_rank" else math.sqrt(rank))

    def budgets(self, profile: NodeProfile) -> dict[str, int]:
        """Return a client's rank budget by module."""
        return {name: profile.rank_of(name) for name in self.global_adapter.modules}

    def prefix_plan(self, rank: int | Mapping[str, int], **changes: Any) -> TrainPlan:
        """Plan for a client that holds and trains the first components of every module.

        Parameters
        ----------
        rank
            How many of them: one number, or by module. Also decides the scaling.
        """
        names = self.global_adapter.modules
        ranks = dict.fromkeys(names, rank) if isinstance(rank, int) else rank
        prefixes = {name: tuple(range(ranks[name])) for name in names}
        modules = {n: ModulePlan(p, p, self.scaling_of(len(p))) for n, p in prefixes.items()}
        return self.train_plan(modules, **changes)

    def train_plan(self, modules: Mapping[str, ModulePlan], **changes: Any) -> TrainPlan:
        """Plan with the run's settings around these components."""
        settings: dict[str, Any] = {
            "head": self.options.head,
            "local_epochs": self.options.local_epochs,
            "max_steps": self.options.max_steps,
        }
        return TrainPlan(modules, **(settings | changes))

    def payload_bytes(self, profile: NodeProfile) -> tuple[int, int]:
        """Return the bytes of factors and head that a round sends this client and gets from it.

        Of the first round's plan, without the message's overhead; the ledger has what was sent.
        """
        plan = self.plan(profile, 1)
        head = sum(math.prod(shape) for shape in self.head_shapes.values())
        widths = {n: sum(shape) for n, shape in self._layer_shapes().items()}
        down = sum(len(module.held) * widths[name] for name, module in plan.modules.items())
        up = sum(len(module.trainable) * widths[name] for name, module in plan.modules.items())
        return _FLOAT32_BYTES * (down + head), _FLOAT32_BYTES * (up + head)

    # ---- the run ---------------------------------------------------------------------------

    def run(
        self,
        grid: Grid,
        initial: Adapter,
        options: FederationOptions,
        evaluate_fn: Callable[[int], MetricRecord | None],
        on_client: Callable[[ClientReport], None],
    ) -> Result:
        """Run the federation.

        Parameters
        ----------
        initial
            Global adapter of rank ``max_rank``, with the head's initial tensors.
        evaluate_fn
            Called with 0 before the first round and after every round.
        on_client
            Told what became of each client in each round.

        Raises
        ------
        StrategyError
            If the method cannot serve these nodes.
        RoundFailedError
            If nobody's training counted in a round.
        """
        self.options, self.on_client = options, on_client
        self.global_adapter = initial
        self.head_shapes = {
            name: tuple(tensor.shape)
            for name, tensor in initial.head.items()
            if options.head == "averaged"
        }
        self.directory = NodeDirectory(options.timeout_s)
        profiles = self.directory.wait_for_all(grid)
        self.check([rank for profile in profiles for rank in profile.ranks])
        for profile in profiles:
            _check_patterns(profile, initial.modules)
        return self.start(
            grid,
            # The global adapter lives here, as tensors; what Flower passes around stays empty.
            ArrayRecord(),
            num_rounds=options.num_rounds,
            timeout=options.timeout_s,
            evaluate_fn=lambda server_round, _: evaluate_fn(server_round),
        )

    def summary(self) -> None:
        """Log the method and its settings."""
        _LOGGER.info("%r", self)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients, plan for each, and send each its slice of the global adapter."""
        del arrays, config
        self.round_started = time.perf_counter()
        self.client_scores = {}
        profiles = sample_profiles(
            self.directory.refresh(grid),
            self.options.fraction_train,
            self.options.seed,
            server_round,
            "train",
        )
        plans = [self.plan(profile, server_round) for profile in profiles]
        return self.messages(profiles, plans, server_round, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score what they would receive next, on data they kept aside."""
        del arrays, config
        last = server_round == self.options.num_rounds
        if server_round % self.options.evaluate_every and not last:
            return []
        profiles = sample_profiles(
            self.directory.refresh(grid),
            self.options.fraction_evaluate,
            self.options.seed,
            server_round,
            "evaluate",
        )
        plans = [self.plan(profile, server_round) for profile in profiles]
        return self.messages(profiles, plans, server_round, MessageType.EVALUATE)

    def messages(
        self,
        profiles: Sequence[NodeProfile],
        plans: Sequence[TrainPlan],
        server_round: int,
        message_type: str,
        dispatch: Callable[[TrainPlan], Adapter] | None = None,
    ) -> list[Message]:
        """Make one message a client; clients with the same plan share the same records."""
        contents: dict[str, tuple[Any, Adapter]] = {}
        messages = []
        self._requests = {}
        for profile, plan in zip(profiles, plans, strict=True):
            key = plan.to_json()
            if key not in contents:
                sent = (dispatch or self.dispatch)(plan)
                content = adapter_content(
                    AdapterArrays(*to_arrays(sent)),
                    **{
                        PLAN: plan_record(plan),
                        CONFIG: ConfigRecord({SERVER_ROUND: server_round}),
                    },
                )
                contents[key] = (content, sent)
            content, sent = contents[key]
            message = Message(content, profile.node_id, message_type, group_id=str(server_round))
            messages.append(message)
            self._requests[profile.node_id] = _Request(
                profile, plan, sent, message_bytes(message), head_bytes(content)
            )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies and fold the good ones, in partition order, into the next adapter."""
        updates, metrics = [], []
        for reply, request in self.in_partition_order(replies):
            update, report = self.judge_training(reply, request, server_round, "train")
            self.on_client(report)
            if update is not None:
                updates.append(update)
                metrics.append(report.metrics)
        self.report_silent(server_round)
        if not updates:
            raise RoundFailedError(
                f"round {server_round}: no client's reply counts; the log names each reason"
            )
        state = self.begin()
        for update in updates:
            state = self.accumulate(state, update)
        self.global_adapter = Adapter(self.finish(state), self._average_heads(updates))
        self.train_loss = _weighted_mean(metrics, "loss")
        return None, MetricRecord({"loss": self.train_loss})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' scores by their number of examples."""
        metrics = []
        for reply, request in self.in_partition_order(replies):
            self._enter(reply, request, server_round, "evaluate")
            try:
                metrics.append(read_metrics(reply, request.profile))
            except ReplyError as error:
                _warn(request.profile, error)
        for request in self._requests.values():
            self._record(request, server_round, "evaluate", 0, 0)
        self._requests = {}
        if not metrics:
            return None
        names = ("accuracy", "macro-f1", "loss")
        self.client_scores = {name: _weighted_mean(metrics, name) for name in names}
        return MetricRecord(dict(self.client_scores))

    # ---- replies ---------------------------------------------------------------------------

    def in_partition_order(self, replies: Iterable[Message]) -> list[tuple[Message, _Request]]:
        """Pair replies with their requests; each node answers once, strangers are ignored."""
        pairs: dict[int, tuple[Message, _Request]] = {}
        for reply in replies:
            node_id = reply.metadata.src_node_id
            if node_id in self._requests:
                pairs.setdefault(node_id, (reply, self._requests[node_id]))
        return sorted(pairs.values(), key=lambda pair: pair[1].profile.partition_id)

    def report_silent(self, server_round: int) -> None:
        """Report the nodes of which nothing came, and forget the round's requests."""
        for request in self._requests.values():
            self._record(request, server_round, "train", 0, 0)
            self.on_client(_report(request, server_round, {}, 0, "no reply in time"))
        self._requests = {}

    def judge_training(
        self, reply: Message, request: _Request, server_round: int, phase: str
    ) -> tuple[ClientUpdate | None, ClientReport]:
        """Return the update if the reply counts, and what is to be told about it."""
        bytes_up = self._enter(reply, request, server_round, phase)
        try:
            metrics = read_metrics(reply, request.profile)
            head = self.head_shapes if request.plan.head == "averaged" else {}
            arrays = read_update(reply, request.plan, head)
            check_shapes(arrays, self._layer_shapes())
        except ReplyError as error:
            _warn(request.profile, error)
            return None, _report(request, server_round, {}, bytes_up, str(error))
        update = ClientUpdate(
            partition_id=request.profile.partition_id,
            num_examples=int(metrics[NUM_EXAMPLES]),
            plan=request.plan,
            sent=request.sent,
            adapter=from_arrays(arrays.modules, arrays.head),
            importance={n: torch.tensor(s) for n, s in arrays.importance.items()},
        )
        return update, _report(request, server_round, metrics, bytes_up)

    def _enter(self, reply: Message, request: _Request, server_round: int, phase: str) -> int:
        bytes_up = message_bytes(reply)
        head_up = head_bytes(reply.content) if reply.has_content() else 0
        self._record(request, server_round, phase, bytes_up, head_up)
        self._requests.pop(request.profile.node_id, None)
        return bytes_up

    def _record(
        self, request: _Request, server_round: int, phase: str, bytes_up: int, head_up: int
    ) -> None:
        profile = request.profile
        self.ledger.add(
            Entry(
                server_round,
                phase,
                profile.partition_id,
                profile.rank,
                request.bytes_down,
                bytes_up,
                request.head_bytes_down,
                head_up,
            )
        )

    def _layer_shapes(self) -> dict[str, tuple[int, int]]:
        return {
            name: (factors.out_features, factors.in_features)
            for name, factors in self.global_adapter.modules.items()
        }

    def _average_heads(self, updates: Sequence[ClientUpdate]) -> Mapping[str, Tensor]:
        if not self.head_shapes:
            return self.global_adapter.head
        total = sum(update.num_examples for update in updates)
        return {
            name: sum(
                (u.adapter.head[name].double() * (u.num_examples / total) for u in updates),
                start=torch.zeros(shape, dtype=torch.float64),
            ).to(self.global_adapter.head[name].dtype)
            for name, shape in self.head_shapes.items()
        }


def _check_patterns(profile: NodeProfile, modules: Iterable[str]) -> None:
    """Refuse a rank pattern without effect: most likely it was written for another model."""
    names = list(modules)
    for pattern in profile.rank_pattern:
        if not any(matches(pattern, name) for name in names):
            raise StrategyError(
                f"partition {profile.partition_id}: rank_pattern {pattern!r} matches none of the "
                f"{len(names)} adapted modules, such as {names[-1]!r}"
            )


def _weighted_mean(metrics: Sequence[Mapping[str, float]], name: str) -> float:
    total = sum(m[NUM_EXAMPLES] for m in metrics)
    return sum(m.get(name, math.nan) * m[NUM_EXAMPLES] for m in metrics) / total


def _report(
    request: _Request,
    server_round: int,
    metrics: Mapping[str, float],
    bytes_up: int,
    error: str = "",
) -> ClientReport:
    components = sum(len(module.trainable) for module in request.plan.modules.values())
    return ClientReport(
        server_round, request.profile, components, metrics, request.bytes_down, bytes_up, error
    )


def _warn(profile: NodeProfile, error: ReplyError) -> None:
    _LOGGER.warning(
        "node %d (partition %d): reply refused: %s", profile.node_id, profile.partition_id, error
    )
