"""Interface of an aggregation method to the server, and the traits that it declares."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.options import RunOptions
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.node_profile import NodeProfile

Division = Literal["contributors", "participants"]
"""Divisor of a component's sum: the weight of those who trained it, or of all participants."""


class StrategyError(ValueError):
    """A federation that a method cannot serve, with the reason."""


@dataclass(frozen=True)
class Traits:
    """Properties that a method declares; checked in `hafl_app.server.compatibility`.

    Parameters
    ----------
    homogeneous_form
        Result of a federation of equal ranks, weighted by the number of examples: the mean of the
        factors, the best approximation of rank ``max_rank`` of the mean of their products, or all
        of that mean. The conformance suite holds the method to it.
    keeps_components
        Whether component i of one round is component i of the next. Where every round makes new
        ones, what rounding lost of the old ones has nothing to be added to, and moments of a server
        optimizer and SCAFFOLD's variates say nothing.
    serves_mixed_ranks
        Whether clients may have different ranks.
    not_robust
        Reason why ``federation.robust`` has no meaning; empty if the method averages each
        component over the clients that trained it, whose values can be compared.
    dp_division
        Divisor of a component's sum under central privacy; None if it cannot cover the method.
    dp_refusal
        Reason for None: the influences beside clipped changes and the plans' denominators.
    allocates_bits
        Whether its plans give each component bits of its own (``federation.upload=mixed``).
    changes_base
        Whether its global adapter has frozen components behind the first ``max_rank``, which every
        client holds and none trains: a change of the base, see `hafl_app.strategies.base_change`.
    uploads_importance
        Whether its plans ask clients for importance scores, which they measure on their data, or
        for a choice of components by them.
    uploads_sparsely
        Whether its plans upload the largest numbers alone (``upload=sparse``), so that
        ``federation.upload`` must leave them as they are.
    trains_global_rank
        Whether every client trains ``max_rank`` components, in a probe or all along, whatever its
        own rank: a rank that a node derives from its memory would then mean nothing.
    coverage_exponent
        ``e``, if a component's divisor in the mean of the clients' changes is ``N_i^(1-e) N^e``:
        1 over all participants, as in a mean of products; 0 over those who trained it; 2 where both
        factors are averaged with zeros for the missing, so that a change also meets a factor that
        has shrunk by ``N_i / N``. None: the step is no such mean. See `hafl_app.server.influence`.
    trains_cores
        Whether its plans train cores between frozen bases, see `hafl_app.plan_parts.trained_core`:
        its lora_B must then stay what cores make of a basis.
    sums_updates
        Whether its fold takes of the updates only weighted sums of each component over those who
        trained it, so that each of these may upload their mean: what secure aggregation needs. The
        weights are the method's `planned_weight`, or the clients' own, see
        `hafl_app.plan_parts.own_weight`. Where clients choose, the sums are over all who could have
        chosen a component.
    sum_refusal
        Reason why ``sums_updates`` is false, and what would be accepted.
    breaks
        Laws of the conformance suite that the method breaks by its paper, with the source.
    """

    homogeneous_form: Literal["factor mean", "product mean", "exact mean"] = "factor mean"
    keeps_components: bool = True
    serves_mixed_ranks: bool = True
    not_robust: str = "it does not average components over those who trained them"
    dp_division: Division | None = None
    dp_refusal: str = (
        "privacy=central_dp needs weights and denominators that the plans fix, and this method "
        "does not declare them"
    )
    allocates_bits: bool = False
    changes_base: bool = False
    uploads_importance: bool = False
    uploads_sparsely: bool = False
    trains_global_rank: bool = False
    coverage_exponent: float | None = 1.0
    trains_cores: bool = False
    sums_updates: bool = False
    sum_refusal: str = "it needs single updates, not their sums"
    breaks: Mapping[str, str] = field(default_factory=dict)


class Method(Protocol):
    """A strategy as the server sees it; `hafl_app.strategies.base.HeterogeneousLora` is one."""

    options: RunOptions
    global_adapter: Adapter
    max_rank: int
    traits: Traits

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse a federation of these rank budgets."""

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Decide what a client receives and trains."""

    def dispatch(self, plan: TrainPlan) -> Adapter:
        """Cut the global adapter to the slice that a client receives."""

    def begin(self, previous: Adapter) -> Any:
        """Return the empty state of a round's fold."""

    def accumulate(self, state: Any, update: ClientUpdate) -> Any:
        """Fold one update in."""

    def finish(self, state: Any, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Return the next global factors."""

    def weight(self, update: ClientUpdate) -> float:
        """Return a client's weight in its averages."""

    def planned_weight(self, plan: TrainPlan, num_examples: int) -> float:
        """Return the weight as far as it follows from a plan and a number of examples."""

    def memory(self) -> dict[str, Any]:
        """Return the method's own state beside the global adapter."""

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore a state that `memory` returned."""

    def budgets(self, profile: NodeProfile) -> dict[str, int]:
        """Return a client's rank budget by module."""

    def prefix_plan(self, rank: int | Mapping[str, int], **changes: Any) -> TrainPlan:
        """Plan for a client that holds and trains the first components."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's hook."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's hook."""

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's hook."""

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Flower's hook."""
