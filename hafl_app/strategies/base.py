"""The template that every aggregation method shares.

A method says in a plan what each client receives and trains (`plan`), what is sent for it
(`dispatch`), and how the uploads become the next global adapter (`begin`, `accumulate`,
`finish`). Everything else is here, and in `exchange.py` how messages are made and judged.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from hafl_app.config.schema import number
from hafl_app.federation.ledger import Ledger
from hafl_app.federation.profiles import NodeDirectory, NodeProfile, matches
from hafl_app.federation.records import NUM_EXAMPLES
from hafl_app.federation.sampling import sample_profiles
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import HeadPolicy, ModulePlan, TrainPlan
from hafl_app.strategies.exchange import ClientReport, ClientUpdate, Exchange

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
        self._exchange = Exchange(self.ledger, 0, "train")
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
        return self._ask(server_round, grid, MessageType.TRAIN, self.options.fraction_train)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score what they would receive next, on data they kept aside."""
        del arrays, config
        last = server_round == self.options.num_rounds
        if server_round % self.options.evaluate_every and not last:
            self._exchange = Exchange(self.ledger, server_round, MessageType.EVALUATE)
            return []
        return self._ask(server_round, grid, MessageType.EVALUATE, self.options.fraction_evaluate)

    def _ask(self, server_round: int, grid: Grid, phase: str, fraction: float) -> list[Message]:
        """Sample clients and make each its message."""
        present = self.directory.refresh(grid)
        profiles = sample_profiles(present, fraction, self.options.seed, server_round, phase)
        plans = [self.plan(profile, server_round) for profile in profiles]
        self._exchange = Exchange(self.ledger, server_round, phase)
        return self._exchange.messages(profiles, plans, self.dispatch, phase)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies and fold the good ones, in partition order, into the next adapter."""
        updates, metrics = [], []
        for reply, request in self._exchange.pairs(replies):
            update, report = self._exchange.judge_training(reply, request)
            self.on_client(report)
            if update is not None:
                updates.append(update)
                metrics.append(report.metrics)
        for report in self._exchange.close():
            self.on_client(report)
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
        judged = [self._exchange.judge_scores(*pair) for pair in self._exchange.pairs(replies)]
        metrics = [scores for scores in judged if scores is not None]
        self._exchange.close()
        if not metrics:
            return None
        names = ("accuracy", "macro-f1", "loss")
        self.client_scores = {name: _weighted_mean(metrics, name) for name in names}
        return MetricRecord(dict(self.client_scores))

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
