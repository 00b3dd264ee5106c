"""The template that every aggregation method shares.

A method says in a plan what each client receives and trains (`FlowerHooks.plan`), what is sent
for it (`dispatch`), and how the uploads become the next global adapter (`begin`, `accumulate`,
`finish`). What is the same for all of them is in `hooks.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from hafl_app.fields import number
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import NUMBER_BYTES, ModulePlan, TrainPlan
from hafl_app.privacy.mechanism import NoiseSource
from hafl_app.server.central_privacy import Division, next_adapter, trainable_counts
from hafl_app.server.heads import HeadMean, RobustHeads
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.hooks import FlowerHooks, StrategyError
from hafl_app.wire.node_profile import NodeProfile

_NEEDS_WHOLE_ROUND = {"robust": "none", "max_norm_ratio": None, "clip_ratio": None}
"""Options that compare the replies of a round with each other, and what switches them off."""


@dataclass(kw_only=True, eq=False)
class HeterogeneousLora(FlowerHooks, ABC):
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
    # Whether component i of one round is component i of the next. Where every round makes new ones,
    # what rounding lost of the old ones has nothing to be added to.
    keeps_components: ClassVar[bool] = True
    breaks: ClassVar[Mapping[str, str]] = {}

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
        self._check_streaming()
        if self.options.robust != "none" and (reason := self.robust_reason()):
            raise StrategyError(
                f"federation.robust={self.options.robust} is refused for {type(self).__name__}: "
                f"{reason}"
            )
        if self.options.error_feedback and (reason := self.feedback_reason()):
            raise StrategyError(
                f"federation.error_feedback=true is refused for {type(self).__name__}: {reason}"
            )

    def _check_streaming(self) -> None:
        """Refuse to stream what must see a whole round."""
        for name, off in _NEEDS_WHOLE_ROUND.items() if self.options.streaming else ():
            if (value := getattr(self.options, name)) != off:
                raise StrategyError(
                    f"federation.streaming=true needs federation.{name}={off or 'null'}, not "
                    f"{value}: it compares all replies of a round, and streaming drops each at once"
                )

    def robust_reason(self) -> str:
        """Return why ``federation.robust`` has no meaning for this method; empty if it has."""
        return "it does not average components over those who trained them"

    def feedback_reason(self) -> str:
        """Return why rounding errors are not carried over to later rounds; empty if they are."""
        if self.options.upload == "fp32":
            return "federation.upload=fp32 rounds nothing"
        if self.options.privacy.kind == "local_dp":
            return "under privacy=local_dp what is kept of one round would leak into the next"
        if not self.keeps_components:
            return "it makes new components in every round"
        return ""

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

    def fold(self, updates: Iterable[ClientUpdate]) -> Adapter:
        """Fold the updates, in their order, into the next global adapter."""
        if self.options.privacy.kind == "central_dp":
            return self._fold_privately(updates)
        state, heads = self.begin(), self._begin_heads()
        for update in updates:
            state = self.accumulate(state, update)
            heads.add(update.adapter.head, update.num_examples)
        return Adapter(self.finish(state), heads.mean(self.global_adapter.head))

    def private_division(self) -> Division:
        """Return what divides a component's sum under central privacy.

        Raises
        ------
        StrategyError
            If more than clipped changes and fixed denominators decides; the message says what.
        """
        raise StrategyError(
            f"strategy={type(self).__module__.rpartition('.')[2]}: privacy=central_dp needs "
            "weights and denominators that the plans fix, and this method does not say so of its"
        )

    def _fold_privately(self, updates: Iterable[ClientUpdate]) -> Adapter:
        """Return the next global adapter from clipped changes, noise and expected counts."""
        nodes, privacy = self.directory.in_order(), self.options.privacy
        traveling = self.global_adapter if self.head_shapes else self.global_adapter.with_head({})
        plans = [self.plan(profile, self._server_round) for profile in nodes]
        merged = next_adapter(
            traveling,
            updates,
            trainable_counts(plans, traveling),
            len(nodes),
            self.options.fraction_train,
            privacy,
            NoiseSource(privacy.noise_key),
            self._server_round,
            self.private_division(),
        )
        return merged.with_head(merged.head or self.global_adapter.head)

    # ---- helpers for methods ---------------------------------------------------------------

    def scaling_of(self, rank: int) -> float:
        """Return PEFT's scaling for a client of this rank."""
        alpha = self.options.lora_alpha
        if self.options.scaling == "constant":
            return alpha / self.max_rank
        return alpha / (rank if self.options.scaling == "per_rank" else math.sqrt(rank))

    def budgets(self, profile: NodeProfile) -> dict[str, int]:
        """Return a client's rank budget by module."""
        limit = self.rank_limits.get(profile.partition_id, self.max_rank)
        return {name: min(profile.rank_of(name), limit) for name in self.global_adapter.modules}

    def prefix_plan(self, rank: int | Mapping[str, int], **changes: Any) -> TrainPlan:
        """Plan for a client that holds and trains the first components of every module.

        Parameters
        ----------
        rank
            How many of them: one number, or by module. Also decides the scaling.
        """
        names = self.global_adapter.modules
        ranks = dict.fromkeys(names, rank) if isinstance(rank, int) else rank
        modules = {name: _prefix(ranks[name], self.scaling_of(ranks[name])) for name in names}
        return self.train_plan(modules, **changes)

    def train_plan(self, modules: Mapping[str, ModulePlan], **changes: Any) -> TrainPlan:
        """Plan with the run's settings around these components."""
        settings: dict[str, Any] = {
            "head": self.options.head,
            "local_epochs": self.options.local_epochs,
            "max_steps": self.options.max_steps,
            "upload": self.options.upload,
            "error_feedback": self.options.error_feedback is not False
            and not self.feedback_reason(),
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
        number = NUMBER_BYTES["fp32"]
        return number * (down + head), NUMBER_BYTES[plan.upload] * up + number * head

    def _layer_shapes(self) -> dict[str, tuple[int, int]]:
        return {
            name: (factors.out_features, factors.in_features)
            for name, factors in self.global_adapter.modules.items()
        }

    def _begin_heads(self) -> HeadMean | RobustHeads:
        if self.options.robust != "none":
            return RobustHeads(self.head_shapes, self.options.robust, self.options.trim_fraction)
        return HeadMean(self.head_shapes)


@lru_cache(maxsize=1024)
def _prefix(rank: int, scaling: float) -> ModulePlan:
    """Return a plan for the first components; the same object for the same arguments."""
    return ModulePlan(tuple(range(rank)), tuple(range(rank)), scaling)
