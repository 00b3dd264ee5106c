"""The template that every aggregation method shares: Flower's `Strategy` over plans and folds.

A method decides in a plan what each client receives and trains (`plan`), and how the updates become
the next global adapter (`begin`, `accumulate`, `finish`). Everything else it has, and does not
inherit: its `coordinator` selects clients, sends, validates, and aggregates.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.importance import magnitude_scores
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan, TrainedFactors
from hafl_app.plan_parts.number_formats import NUMBER_BYTES
from hafl_app.server.compatibility import check_method, no_error_feedback
from hafl_app.server.coordinator import Coordinator
from hafl_app.server.method import Traits
from hafl_app.server.options import RunOptions
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.node_profile import NodeProfile

_LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class HeterogeneousLora(Strategy, ABC):
    """Template of a method that serves clients of different rank.

    Parameters
    ----------
    max_rank
        Rank of the global adapter, at least 1. No client exceeds it.

    Attributes
    ----------
    traits
        Properties that the method declares.
    options
        The run's settings.
    global_adapter
        The shared adapter, of rank ``max_rank`` in every module.
    coordinator
        Runs the rounds.
    """

    max_rank: int = number(8, at_least=1)

    traits = Traits()

    def __post_init__(self) -> None:
        self.options = RunOptions()
        self.global_adapter = Adapter({})
        self.coordinator = Coordinator(self)

    # ---- what a method decides -------------------------------------------------------------

    @abstractmethod
    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Decide what a client receives and trains in this round."""

    @abstractmethod
    def begin(self, previous: Adapter) -> Any:
        """Return the empty state of a round's fold, which starts from the adapter ``previous``."""

    @abstractmethod
    def accumulate(self, state: Any, update: ClientUpdate) -> Any:
        """Fold one update in and return the new state; called in partition order."""

    @abstractmethod
    def finish(self, state: Any, previous: Adapter) -> Mapping[str, LoraFactors]:
        """Return the factors of the next global adapter; components that no client trained stay."""

    def weight(self, update: ClientUpdate) -> float:
        """Return a client's weight in averages, by default its `planned_weight`."""
        return self.planned_weight(update.plan, update.num_examples)

    def planned_weight(self, plan: TrainPlan, num_examples: int) -> float:
        """Return a client's weight as far as it is known before training: its examples."""
        del plan
        return float(num_examples)

    def check(self, ranks: Sequence[int]) -> None:
        """Refuse a federation of these rank budgets, or do nothing.

        Parameters
        ----------
        ranks
            Every rank that occurs, also those of single layer types.

        Raises
        ------
        hafl_app.server.method.StrategyError
            If the method cannot serve them, with the reason.
        """
        check_method(self, ranks)

    def dispatch(self, plan: TrainPlan) -> Adapter:
        """Cut the global adapter to the components a client holds, with the head if it travels.

        Without lora_B where the client has its own. A module of which it holds everything is the
        global one itself, which must not be written to.
        """
        modules = {}
        for name, factors in self.global_adapter.modules.items():
            module = plan.modules[name]
            is_whole = module.held == tuple(range(factors.rank))
            held = factors if is_whole else factors.select(module.held)
            modules[name] = held.only("A") if module.own_lora_B else held
        return Adapter(modules, self.global_adapter.head if plan.sends_head else {})

    def memory(self) -> dict[str, Any]:
        """Return the method's own state beside the global adapter.

        A tree of dictionaries with tensors as leaves, which later changes must not touch; it goes
        into checkpoints.
        """
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Forget everything since `memory` returned this; branches without a leaf may be gone."""

    def component_importance(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return what the components' importance is measured by, and its values by module.

        Shape (rank,) each, NaN where a component was never measured. Of a method that measures
        nothing itself it is the norm of the component, ``||b_i|| ||a_i||``.
        """
        modules = self.global_adapter.modules
        return "norm", {name: magnitude_scores(factors) for name, factors in modules.items()}

    # ---- Flower's hooks --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Select clients, plan for each, and send each its slice of the global adapter."""
        del arrays, config  # the adapter lives here, as tensors
        return self.coordinator.ask_to_train(server_round, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the replies and merge the good ones; see `Coordinator.aggregate`."""
        self.coordinator.aggregate(server_round, replies)
        return None, MetricRecord({"loss": self.coordinator.train_loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to score their next slice of the global adapter on held-out data."""
        del arrays, config
        return self.coordinator.ask_to_evaluate(server_round, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' scores by their number of examples."""
        scores = self.coordinator.average_scores(replies)
        return MetricRecord(dict(scores)) if scores else None

    def summary(self) -> None:
        """Log the method and its settings."""
        _LOGGER.info("%r", self)

    # ---- helpers for plans -----------------------------------------------------------------

    def scaling_of(self, rank: int) -> float:
        """Return PEFT's scaling for a client of this rank."""
        alpha, scaling = self.options.lora.lora_alpha, self.options.lora.scaling
        if scaling == "constant":
            return alpha / self.max_rank
        return alpha / (rank if scaling == "per_rank" else math.sqrt(rank))

    def budgets(self, profile: NodeProfile) -> dict[str, int]:
        """Return a client's rank budget by module."""
        limits = self.coordinator.participation.rank_limits
        limit = limits.get(profile.partition_id, self.max_rank)
        return {name: min(profile.rank_of(name), limit) for name in self.global_adapter.modules}

    def prefix_plan(
        self,
        rank: int | Mapping[str, int],
        factors: TrainedFactors = "both",
        **changes: Any,
    ) -> TrainPlan:
        """Plan for a client that holds and trains the first components of every module.

        Parameters
        ----------
        rank
            Number of components: one, or by module. Also decides the scaling.
        factors
            Which factors are trained.
        """
        names = self.global_adapter.modules
        ranks = dict.fromkeys(names, rank) if isinstance(rank, int) else rank
        modules = {
            name: _prefix(ranks[name], self.scaling_of(ranks[name]), factors) for name in names
        }
        return self.train_plan(modules, **changes)

    def train_plan(self, modules: Mapping[str, ModulePlan], **changes: Any) -> TrainPlan:
        """Plan with the run's settings around these components."""
        federation, client = self.options.federation, self.options.client
        settings: dict[str, Any] = {
            "head": self.options.head,
            "local_epochs": client.local_epochs,
            "max_steps": client.max_steps,
            "proximal": client.proximal,
            "logit_adjustment": client.logit_adjustment,
            "upload": federation.upload,
            "error_feedback": federation.error_feedback is not False
            and not no_error_feedback(self),
        }
        return TrainPlan(modules, **(settings | changes))

    def payload_bytes(self, profile: NodeProfile) -> tuple[int, int]:
        """Return the bytes of factors and head that a round sends this client and gets from it.

        Of the first round's plan, without the message's overhead; the ledger has what was sent.
        """
        plan, shapes = self.plan(profile, 1), self.layer_shapes()
        if self.options.privacy.secure_aggregation:
            plan = plan.without_choice()  # what is masked does not show what was chosen
        head = sum(tensor.numel() for tensor in self.global_adapter.head.values())
        head_bytes = NUMBER_BYTES["fp32"] * head
        down = plan.held_bytes(shapes) + plan.sends_head * head_bytes
        return down, plan.upload_bytes(shapes) + plan.uploads_head * head_bytes

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return ``(out_features, in_features)`` of every adapted module."""
        return {
            name: (factors.out_features, factors.in_features)
            for name, factors in self.global_adapter.modules.items()
        }


@lru_cache(maxsize=1024)
def _prefix(rank: int, scaling: float, factors: TrainedFactors) -> ModulePlan:
    """Return a plan for the first components; the same object for the same arguments."""
    return ModulePlan(tuple(range(rank)), tuple(range(rank)), scaling, factors=factors)
