"""The rounds of one method: select clients, ask them, validate their replies, aggregate."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.metrics import CLASSIFICATION, weighted_mean
from hafl_app.plan import TrainPlan
from hafl_app.printable import printable
from hafl_app.privacy.masking import SecureSumError
from hafl_app.server.aggregation import head_that_travels, merge
from hafl_app.server.closed_form import ClosedFormHead
from hafl_app.server.control_variates import ControlVariates
from hafl_app.server.influence import Influence, InfluenceMeter
from hafl_app.server.method import Method
from hafl_app.server.node_directory import NodeDirectory
from hafl_app.server.outliers import clip_updates, reject_outliers
from hafl_app.server.participation import Participation
from hafl_app.server.replies import UNWATCHED, Watch
from hafl_app.server.round_messages import STATED_EXAMPLES, Reply, RoundMessages
from hafl_app.server.secure_sum import SecureSum
from hafl_app.server.server_optimizer import ServerOptimizer
from hafl_app.server.simulated_clock import SimulatedClock
from hafl_app.server.traffic import Ledger
from hafl_app.server.update import ClientUpdate
from hafl_app.server.weights import ExampleBound
from hafl_app.wire.node_profile import NodeProfile
from hafl_app.wire.records import NUM_EXAMPLES

_EXACT_INFLUENCES = 10  # clients; each with all others takes its time


class TooFewRepliesError(RuntimeError):
    """A training phase in which fewer replies count than the round needs; nothing has changed."""


class Coordinator:
    """State and steps of a run, the same for every strategy.

    The global adapter lives in the strategy, as tensors; the arrays that Flower passes around
    stay empty.

    Parameters
    ----------
    method
        The strategy that this belongs to.

    Attributes
    ----------
    method
        The strategy.
    participation
        Nodes that take part, and their selection.
    ledger
        Bytes and rejections of every exchange.
    server_optimizer
        Moments of the global adapter's changes.
    control_variates
        The clients' mean gradients; none without ``federation.scaffold``.
    closed_form
        The head, where it is solved from sums of features.
    task
        Metrics of the clients' scores.
    clock
        Seconds of clients and rounds on simulated devices; None without any.
    train_loss
        Mean over the last round's clients by number of examples; NaN before the first.
    client_scores
        Means over the clients that evaluated last; empty if none did.
    scored_examples
        On how many examples those were, as the clients state it.
    scored
        Replies that those scores come from, in partition order.
    influences
        How much of the last round's step each client decided; empty where that is not known, as
        under a robust rule, or must not be, under central privacy.
    round_started
        When the current round was configured first, on the performance counter; 0 before round 1.
    watch
        Follows the exchanges while they go on.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.participation = Participation(method)
        self.ledger = Ledger()
        self.server_optimizer = ServerOptimizer()
        self.control_variates = ControlVariates()
        self.closed_form = ClosedFormHead(method, self.participation, self.messages)
        self.task = CLASSIFICATION
        self.clock: SimulatedClock | None = None
        self.train_loss = math.nan
        self.client_scores: Mapping[str, float] = {}
        self.scored_examples = 0
        self.scored: Sequence[Reply] = ()
        self.influences: Sequence[Influence] = ()
        self.round_started = 0.0
        self.watch: Watch = UNWATCHED
        self._on_reply: Callable[[Reply], None] = lambda _: None
        self._messages = RoundMessages(self.ledger, 0, "train")
        self._server_round, self._attempt, self._num_asked = 0, 0, 0
        self._errors: list[str] = []  # of the current attempt
        self._secure: SecureSum | None = None

    def prepare(self, initial: Adapter, on_reply: Callable[[Reply], None]) -> None:
        """Get ready for the first round with the nodes that are known.

        Parameters
        ----------
        initial
            Global adapter of rank ``max_rank``, with the head's initial tensors.
        on_reply
            Called with every client's reply, or lack of one, to a training request.

        Raises
        ------
        StrategyError
            If the method cannot serve these nodes with this adapter.
        """
        self.method.global_adapter, self._on_reply = initial, on_reply
        self.participation.prepare()

    @property
    def directory(self) -> NodeDirectory:
        """All nodes that have answered."""
        return self.participation.directory

    # ---- training --------------------------------------------------------------------------

    def ask_to_train(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Select clients, plan for each, and make its message; the same round again is a repeat."""
        if server_round == self._server_round:
            self._attempt += 1
        else:
            self._server_round, self._attempt = server_round, 0
            self.round_started = time.perf_counter()
        self.client_scores, self.scored, self._errors = {}, (), []
        selected = self.participation.select_for_training(server_round, self._attempt, grid)
        if self.method.options.privacy.secure_aggregation:
            selected = self._agree(selected, server_round, grid)
        return self._ask(selected, server_round, MessageType.TRAIN)

    def aggregate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Validate the replies and merge the good ones, in partition order.

        Raises
        ------
        TooFewRepliesError
            If fewer than ``min_replies`` count. Then, as after any error, nothing has changed.
        """
        federation = self.method.options.federation
        timed = self._timed(self._messages.validate_training(replies))
        checked = reject_outliers(timed, federation.max_norm_ratio)
        self._record(self._messages.close(checked))
        counted = [reply for reply in checked if reply.update is not None]
        self._check_count(server_round, len(counted))
        updates = [reply.update for reply in counted if reply.update is not None]
        if self._secure is not None:
            with _failing(server_round):
                updates = self._secure.opened(updates)
        self._advance(server_round, clip_updates(updates, federation.clip_ratio))
        self.train_loss = weighted_mean([r.metrics for r in counted], "loss", NUM_EXAMPLES)

    def aggregate_stream(self, server_round: int, replies: Iterable[Message]) -> None:
        """Aggregate as `aggregate` does, but validate, merge and drop each reply before the next.

        Parameters
        ----------
        replies
            In partition order.

        Raises
        ------
        TooFewRepliesError
            See `aggregate`.
        """
        counted: list[Mapping[str, float]] = []

        def updates() -> Iterator[ClientUpdate]:
            for validated in self._messages.validate_each(replies):
                [reply] = self._timed([validated])
                self._record([self._messages.settle(reply)])
                if reply.update is not None:
                    counted.append(reply.metrics)
                    yield reply.update
            self._record(self._messages.close([]))
            self._check_count(server_round, len(counted))

        self._advance(server_round, updates())
        self.train_loss = weighted_mean(counted, "loss", NUM_EXAMPLES)

    def _timed(self, replies: list[Reply]) -> list[Reply]:
        """Return the replies with their simulated seconds, if there is a clock."""
        return self.clock.timed(replies) if self.clock else replies

    def _record(self, replies: Sequence[Reply]) -> None:
        if self.clock:
            self.clock.wait_for(replies)
        for reply in replies:
            self.participation.record([reply])
            if reply.error:
                self._errors.append(reply.error)
            self._on_reply(reply)

    def _check_count(self, server_round: int, counted: int) -> None:
        options = self.method.options
        private = options.privacy.kind == "central_dp"  # then an empty round counts too
        if counted < options.federation.min_replies and not private:
            raise TooFewRepliesError(
                f"round {server_round}: the replies of {counted} of {self._num_asked} clients "
                f"count, federation.min_replies={options.federation.min_replies}"
                f"{_most_common(self._errors)}"
            )

    def _advance(self, server_round: int, updates: Iterable[ClientUpdate]) -> None:
        """Make the next global adapter, or, if that fails, change nothing."""
        memory, meter = self.method.memory(), self._influence_meter()
        variates = dict(self.control_variates.own)
        try:
            merged = merge(
                self.method,
                self.method.global_adapter,
                self._noting(updates, variates),
                nodes=self.directory.in_order(),
                server_round=server_round,
                optimizer=self.server_optimizer,
                influence=meter,
            )
            self.influences = () if meter is None else meter.result()
        except BaseException:
            self.method.recall(memory)
            raise
        self.method.global_adapter = merged
        self.control_variates = ControlVariates(variates)

    def _influence_meter(self) -> InfluenceMeter | None:
        """Return a meter for a round's changes; None where a client's must not, or cannot, show."""
        options, exponent = self.method.options, self.method.traits.coverage_exponent
        federation = options.federation
        hidden = options.privacy.kind == "central_dp" or options.privacy.secure_aggregation
        if hidden or federation.robust != "none" or exponent is None:
            return None
        many = self._num_asked > _EXACT_INFLUENCES
        return InfluenceMeter(exponent, projects=federation.streaming or many)

    def _noting(
        self, updates: Iterable[ClientUpdate], variates: dict[int, Mapping[str, Tensor]]
    ) -> Iterator[ClientUpdate]:
        """Pass on the updates, and put the next control variate of each client there."""
        options = self.method.options
        for update in updates:
            if options.federation.scaffold:
                variates[update.partition_id] = self.control_variates.after(
                    update, self.method.global_adapter, options.client
                )
            yield update

    # ---- evaluation ------------------------------------------------------------------------

    def ask_to_evaluate(self, server_round: int, grid: Grid) -> Iterable[Message]:
        """Ask clients to score their next slice of the global adapter on held-out data."""
        if not self.method.options.is_evaluated(server_round):
            self._messages = self.messages(server_round, MessageType.EVALUATE)
            return []
        selected = self.participation.select_for_evaluation(server_round, grid)
        return self._ask(selected, server_round, MessageType.EVALUATE)

    def average_scores(self, replies: Iterable[Message]) -> Mapping[str, float]:
        """Average the clients' scores by their number of examples; empty if none counts."""
        checked = self._timed(self._messages.validate_scores(replies))
        settled = self._messages.close(checked)
        if self.clock:
            self.clock.wait_for(settled)
        self.scored = [reply for reply in checked if not reply.error]
        metrics = [reply.metrics for reply in self.scored]
        if metrics:
            self.client_scores = self.task.of_clients(metrics, NUM_EXAMPLES)
            self.scored_examples = sum(int(one[STATED_EXAMPLES]) for one in metrics)
        return self.client_scores if metrics else {}

    # ---- messages --------------------------------------------------------------------------

    def messages(self, server_round: int, phase: str) -> RoundMessages:
        """Return the messages of one phase, to be made and answered."""
        label_names = self.directory.label_names or ()
        federation = self.method.options.federation
        bound = ExampleBound.of(federation, self.participation.trainable())
        return RoundMessages(self.ledger, server_round, phase, label_names, bound)

    def _ask(
        self, profiles: Sequence[NodeProfile], server_round: int, phase: str
    ) -> Iterable[Message]:
        """Return a message for each of these; while streaming they are made one by one."""
        self._messages, self._num_asked = self.messages(server_round, phase), len(profiles)
        if self.clock:
            self.clock.begin()
        streaming = self.method.options.federation.streaming and phase == MessageType.TRAIN
        if streaming:
            profiles = sorted(profiles, key=lambda profile: profile.partition_id)
        plans = [self.method.plan(profile, server_round) for profile in profiles]
        if phase == MessageType.TRAIN:
            plans = self._with_rate(plans, server_round)
        if self._secure is not None and phase == MessageType.TRAIN:
            with _failing(server_round):
                self._mask(self._secure, profiles, plans)
        make = self._messages.each_message if streaming else self._messages.messages
        if self.method.options.federation.scaffold and phase == MessageType.TRAIN:
            self._messages.correct(self.control_variates.correction)
        return make(profiles, plans, self.method.dispatch, phase)

    def _with_rate(self, plans: list[TrainPlan], server_round: int) -> list[TrainPlan]:
        """Return the plans with the round's learning rate, which is the same for all."""
        rate = self.method.options.rate(server_round)
        return plans if rate == 1 else [replace(plan, rates=(rate,)) for plan in plans]

    # ---- secure sums -----------------------------------------------------------------------

    def _agree(
        self, selected: Sequence[NodeProfile], server_round: int, grid: Grid
    ) -> list[NodeProfile]:
        """Let the selected clients exchange keys and shares; return those that have."""
        options = self.method.options
        timeout_s, largest = options.federation.round_timeout_s, options.privacy.largest_change
        self._secure = SecureSum(grid, self.ledger, server_round, timeout_s, largest)
        with _failing(server_round):
            return self._secure.agree(selected)

    def _mask(
        self, secure: SecureSum, profiles: Sequence[NodeProfile], plans: Sequence[TrainPlan]
    ) -> None:
        """Ask these clients for masked uploads, weighted by their plans and profiles' examples."""
        federation = self.method.options.federation
        bound = ExampleBound.of(federation, self.participation.trainable())
        examples = [bound.count(profile.num_examples, profile) for profile in profiles]
        weights = [
            self.method.planned_weight(plan, count)
            for plan, count in zip(plans, examples, strict=True)
        ]
        head = head_that_travels(self.method.global_adapter, self.method.options)
        secure.plan(profiles, plans, examples, weights, list(head))
        self._messages.mask(secure)


@contextmanager
def _failing(server_round: int) -> Iterator[None]:
    """Let a secure sum that cannot be made or opened fail the round."""
    try:
        yield
    except SecureSumError as error:
        raise TooFewRepliesError(f"round {server_round}: {error}") from error


def _most_common(errors: Sequence[str]) -> str:
    """Return the reason that most clients failed for, to be appended to a message."""
    if not errors:
        return ""
    reason, count = Counter(errors).most_common(1)[0]
    return f"; {count} of {len(errors)} failed alike: {printable(reason)}"


class Strategy(Method, Protocol):
    """A method with its coordinator, as the loop over the rounds drives it."""

    coordinator: Coordinator
