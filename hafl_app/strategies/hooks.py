"""The hooks that Flower's `Strategy` calls in a round: who is asked, what counts, what is told.

They are the same for every method. What a method decides is in `base.py`, how messages are made
and judged in `exchange.py`, and the order of the calls in `rounds.py`.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from hafl_app.lowrank.factors import Adapter
from hafl_app.metrics import CLASSIFICATION, weighted_mean
from hafl_app.plan import TrainPlan
from hafl_app.privacy.mechanism import PrivacyError, check_local_plan
from hafl_app.server.central_privacy import Division
from hafl_app.server.client_sampling import sample_poisson, sample_profiles, sample_size
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.options import FederationOptions
from hafl_app.server.outliers import clip_updates, reject_outliers
from hafl_app.server.quarantine import Quarantine
from hafl_app.server.round_messages import ClientReport, Exchange
from hafl_app.server.traffic import Ledger
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.faults import Fault
from hafl_app.wire.node_profile import NodeProfile, matches
from hafl_app.wire.records import NUM_EXAMPLES, SECONDS

_LOGGER = logging.getLogger(__name__)


class TooFewRepliesError(RuntimeError):
    """A training phase in which fewer replies count than the round needs; nothing has changed."""


class StrategyError(ValueError):
    """A federation that a method cannot serve, with the reason."""


class FlowerHooks(FedAvg, ABC):
    """Flower's strategy interface over plans, budgets and judged replies.

    The global adapter lives here, as tensors; the arrays that Flower passes around stay empty.
    """

    def __post_init__(self) -> None:
        super().__init__()
        self.options = FederationOptions()
        self.task = CLASSIFICATION
        self.ledger = Ledger()
        self.directory = NodeDirectory(self.options.timeout_s)
        self.quarantine = Quarantine(0, 1)
        self.unseen: frozenset[int] = frozenset()  # partitions that never train
        self._served: dict[int, NodeProfile] = {}  # whom the method has been found to serve
        self._served_ranks: Counter[int] = Counter()  # and how often each rank occurs in them
        self.rank_limits: Mapping[int, int] = {}  # by partition, of nodes that ran out of memory
        self.on_client: Callable[[ClientReport], None] = lambda _: None
        self.global_adapter = Adapter({})
        self.head_shapes: Mapping[str, tuple[int, ...]] = {}
        self._exchange = Exchange(self.ledger, 0, "train")
        self._server_round, self._attempt, self._asked = 0, 0, 0
        self._failed: set[int] = set()
        self.seconds: dict[int, float] = {}  # by node, of its last training
        self.round_started = 0.0
        self.train_loss = math.nan
        self.client_scores: Mapping[str, float] = {}

    # ---- what a method decides -------------------------------------------------------------

    @abstractmethod
    def check(self, ranks: Sequence[int]) -> None:
        """Refuse a federation of these rank budgets, or do nothing."""

    @abstractmethod
    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Decide what a client receives and trains in this round."""

    @abstractmethod
    def dispatch(self, plan: TrainPlan) -> Adapter:
        """Return what a client receives: the held components, and the head if it travels."""

    @abstractmethod
    def private_division(self) -> Division:
        """Return what divides a component's sum under central privacy, or refuse."""

    @abstractmethod
    def fold(self, updates: Iterable[ClientUpdate]) -> Adapter:
        """Return the next global adapter; each update is looked at once and can then be dropped."""

    def memory(self) -> dict[str, Any]:
        """Return what the method remembers beside the global adapter.

        A tree of dictionaries with tensors as leaves, which later changes must not touch; it goes
        into checkpoints.
        """
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Forget everything since `memory` returned this; branches without a leaf may be gone."""

    # ---- the run ---------------------------------------------------------------------------

    def meet(
        self, grid: Grid, options: FederationOptions, directory: NodeDirectory
    ) -> list[NodeProfile]:
        """Begin a run: ask the nodes what they are, before anything is built for them.

        Returns
        -------
        list of NodeProfile
            Those that take part, in partition order.

        Raises
        ------
        StrategyError
            If the method cannot serve these nodes.
        TimeoutError
            If no node answers.
        """
        self.options, self.directory = options, directory
        profiles = directory.wait_for_all(grid)
        self.check([rank for profile in profiles for rank in profile.ranks])
        trained = len(self.seen())
        asked = sample_size(options.fraction_train, trained)
        if options.min_replies > asked:
            raise StrategyError(
                f"federation.min_replies={options.min_replies}: only {asked} of {trained} "
                "clients are asked in a round"
            )
        return profiles

    def seen(self) -> list[NodeProfile]:
        """Return the known nodes that may train, in partition order."""
        return [p for p in self.directory.in_order() if p.partition_id not in self.unseen]

    def prepare(self, initial: Adapter, on_client: Callable[[ClientReport], None]) -> None:
        """Get ready for the first round with the nodes that `meet` found.

        Parameters
        ----------
        initial
            Global adapter of rank ``max_rank``, with the head's initial tensors.
        on_client
            Told what became of each client in each round.

        Raises
        ------
        StrategyError
            If the method cannot serve these nodes with this adapter.
        """
        options, profiles = self.options, self.directory.in_order()
        self.global_adapter, self.on_client = initial, on_client
        self.head_shapes = {
            name: tuple(tensor.shape)
            for name, tensor in initial.head.items()
            if options.head == "averaged"
        }
        self.quarantine = Quarantine(options.quarantine_after, options.quarantine_rounds)
        for profile in profiles:
            _check_patterns(profile, initial.modules)
        self._check_privacy(profiles)
        self._served = {profile.node_id: profile for profile in profiles}
        self._served_ranks = Counter(rank for profile in profiles for rank in profile.ranks)

    def _check_privacy(self, profiles: Sequence[NodeProfile]) -> None:
        """Refuse a method that the chosen privacy cannot cover."""
        if self.options.privacy.kind == "central_dp":
            self.private_division()
        if self.options.privacy.kind == "local_dp":
            for profile in profiles:
                try:
                    check_local_plan(self.plan(profile, 1))
                except PrivacyError as error:
                    raise StrategyError(str(error)) from error

    def summary(self) -> None:
        """Log the method and its settings."""
        _LOGGER.info("%r", self)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients, plan for each, and send each its slice of the global adapter.

        Asked again for the same round, it prefers nodes that have not failed in it yet.
        """
        del arrays, config
        if server_round == self._server_round:
            self._attempt += 1
        else:
            self._server_round, self._attempt, self._failed = server_round, 0, set()
            self.round_started = time.perf_counter()
        self.client_scores = {}
        phase = f"train/{self._attempt}" if self._attempt else "train"
        present = self._at_hand(server_round, grid)
        if self.options.privacy.kind == "central_dp":
            rate, key = self.options.fraction_train, self.options.privacy.noise_key
            profiles = sample_poisson(present, rate, key, server_round)
            return self._ask(profiles, server_round, MessageType.TRAIN)
        fresh = [p for p in present if p.partition_id not in self._failed]
        wanted = sample_size(self.options.fraction_train, len(present))
        candidates = fresh if len(fresh) >= wanted else present
        fraction = wanted / len(candidates) if candidates else 0.0
        profiles = sample_profiles(candidates, fraction, self.options.seed, server_round, phase)
        return self._ask(profiles, server_round, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score what they would receive next, on data they kept aside."""
        del arrays, config
        phase = MessageType.EVALUATE
        last = server_round == self.options.num_rounds
        if server_round % self.options.evaluate_every and not last:
            self._exchange = self.exchange(server_round, phase)
            return []
        present = self._at_hand(server_round, grid)
        fraction = self.options.fraction_evaluate
        profiles = sample_profiles(present, fraction, self.options.seed, server_round, phase)
        return self._ask(profiles, server_round, phase)

    def _at_hand(self, server_round: int, grid: Grid) -> list[NodeProfile]:
        """Return the connected nodes that may be asked in a round.

        Never one that is to stay unseen; one in quarantine only if nobody else is there.
        """
        present = [p for p in self._connected(grid) if p.partition_id not in self.unseen]
        excluded = self.quarantine.excluded(server_round)
        rested = [p for p in present if p.partition_id not in excluded]
        # Under central privacy a node may decide about itself, but never about another.
        return rested if self.options.privacy.kind == "central_dp" else rested or present

    def unseen_at_hand(self, grid: Grid) -> list[NodeProfile]:
        """Return the connected nodes that never train."""
        return [p for p in self._connected(grid) if p.partition_id in self.unseen]

    def _connected(self, grid: Grid) -> list[NodeProfile]:
        return [p for p in self.directory.refresh(grid) if self._serves(p)]

    def _serves(self, profile: NodeProfile) -> bool:
        """Say whether the run can serve a node; one that joins late ends no run, it is left out."""
        known = self._served.get(profile.node_id)
        if known is profile or known == profile:
            return True
        ranks = self._served_ranks.copy()
        ranks.subtract(known.ranks if known else ())
        try:
            # Which ranks occur, not how often: thousands of nodes may join, one after another.
            self.check(sorted({*(+ranks), *profile.ranks}))
            _check_patterns(profile, self.global_adapter.modules)
            self._check_privacy([profile])
        except StrategyError as error:
            self.directory.refuse(profile.node_id, str(error))
            return False
        self._served[profile.node_id] = profile
        ranks.update(profile.ranks)
        self._served_ranks = ranks
        return True

    def exchange(self, server_round: int, phase: str) -> Exchange:
        """Return a fresh exchange of this run."""
        return Exchange(self.ledger, server_round, phase, self.directory.label_names or ())

    def _ask(
        self, profiles: Sequence[NodeProfile], server_round: int, phase: str
    ) -> Iterable[Message]:
        """Return a message for each of these; while streaming they are made one by one."""
        self._exchange, self._asked = self.exchange(server_round, phase), len(profiles)
        streaming = self.options.streaming and phase == MessageType.TRAIN
        if streaming:
            profiles = sorted(profiles, key=lambda profile: profile.partition_id)
        plans = [self.plan(profile, server_round) for profile in profiles]
        make = self._exchange.each_message if streaming else self._exchange.messages
        return make(profiles, plans, self.dispatch, phase)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies and fold the good ones, in partition order, into the next adapter.

        Raises
        ------
        TooFewRepliesError
            If fewer than ``min_replies`` count. Then, as after any error, nothing has changed.
        """
        judged = self._exchange.judge_training(replies)
        judged = reject_outliers(judged, self.options.max_norm_ratio)
        for report in self._exchange.close(judged):
            self._take_note(report)
        updates = [one.update for one in judged if one.update is not None]
        self._check_count(server_round, len(updates))
        self._advance(clip_updates(updates, self.options.clip_ratio))
        self.train_loss = weighted_mean(
            [one.metrics for one in judged if one.update], "loss", NUM_EXAMPLES
        )
        return None, MetricRecord({"loss": self.train_loss})

    def aggregate_stream(self, server_round: int, replies: Iterable[Message]) -> None:
        """Do what `aggregate_train` does, but judge, fold and drop each reply before the next.

        Parameters
        ----------
        replies
            In partition order.

        Raises
        ------
        TooFewRepliesError
            If fewer than ``min_replies`` count. Then, as after any error, nothing has changed.
        """
        counted: list[Mapping[str, float]] = []

        def updates() -> Iterator[ClientUpdate]:
            for judged in self._exchange.judge_each(replies):
                self._take_note(self._exchange.settle(judged))
                if judged.update is not None:
                    counted.append(judged.metrics)
                    yield judged.update
            for report in self._exchange.close([]):
                self._take_note(report)
            self._check_count(server_round, len(counted))

        self._advance(updates())
        self.train_loss = weighted_mean(counted, "loss", NUM_EXAMPLES)

    def _check_count(self, server_round: int, counted: int) -> None:
        private = self.options.privacy.kind == "central_dp"  # then an empty round counts too
        if counted < self.options.min_replies and not private:
            raise TooFewRepliesError(
                f"round {server_round}: the replies of {counted} of {self._asked} clients "
                f"count, federation.min_replies={self.options.min_replies}"
            )

    def _advance(self, updates: Iterable[ClientUpdate]) -> None:
        """Make the next global adapter, or, if that fails, change nothing."""
        memory = self.memory()
        try:
            self.global_adapter = self.fold(updates)
        except BaseException:
            self.recall(memory)
            raise

    def _take_note(self, report: ClientReport) -> None:
        """Tell what became of a client, and let a node that keeps failing rest."""
        partition_id = report.profile.partition_id
        if SECONDS in report.metrics:
            self.seconds[report.profile.node_id] = report.metrics[SECONDS]
        if report.error:
            self._failed.add(partition_id)
        smaller = report.fault == Fault.OUT_OF_MEMORY and self._lower_rank(report.profile)
        self.quarantine.record(partition_id, not report.error or smaller, report.server_round)
        self.on_client(report)

    def _lower_rank(self, profile: NodeProfile) -> bool:
        """Halve the budget of a node that ran out of memory, if the method can serve that."""
        limit = self.rank_limits.get(profile.partition_id, max(profile.ranks)) // 2
        limits = {**self.rank_limits, profile.partition_id: limit}
        ranks = {
            min(rank, limits.get(p.partition_id, rank))
            for p in self.directory.in_order()
            for rank in p.ranks
        }
        try:
            self.check(sorted(ranks))
        except StrategyError as error:
            _LOGGER.warning("node %d keeps its rank: %s", profile.node_id, error)
            return False
        self.rank_limits = limits
        _LOGGER.warning(
            "node %d (partition %d) ran out of memory: rank %d from now on",
            *(profile.node_id, profile.partition_id, limit),
        )
        return True

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' scores by their number of examples."""
        judged = self._exchange.judge_scores(replies)
        self._exchange.close(judged)
        metrics = [one.metrics for one in judged if not one.error]
        if not metrics:
            return None
        self.client_scores = self.task.of_clients(metrics, NUM_EXAMPLES)
        return MetricRecord(dict(self.client_scores))


def _check_patterns(profile: NodeProfile, modules: Iterable[str]) -> None:
    """Refuse a rank pattern without effect: most likely it was written for another model."""
    names = list(modules)
    for pattern in profile.rank_pattern:
        if not any(matches(pattern, name) for name in names):
            raise StrategyError(
                f"partition {profile.partition_id}: rank_pattern {pattern!r} matches none of the "
                f"{len(names)} adapted modules, such as {names[-1]!r}"
            )
