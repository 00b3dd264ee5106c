"""Replication padding: what a client of lower rank lacks is copied from those of the highest.

Byun and Lee, "Towards Federated Low-Rank Adaptation of Language Models with Rank Heterogeneity",
NAACL 2025, arXiv:2406.17477.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.plan import TrainPlan
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.wire.node_profile import NodeProfile


@dataclass(frozen=True)
class Padding:
    """A module's fold: sums over all clients, and over those of the largest rank so far."""

    everyone: ComponentSums
    largest: ComponentSums
    largest_rank: int = 0


@dataclass(kw_only=True, eq=False)
class ReplicationPadding(HeterogeneousLora):
    """Every upload is padded to the round's largest rank, then all are averaged as one rank.

    With R the largest rank of the round, ``K_R`` its clients and ``w_k ~ num_examples``:

    - ``p_i = sum_{k in K_R} w_k b_{k,i} / sum_{k in K_R} w_k``, the pad of component i
    - ``b_i <- sum_{r_k >= i} w_k b_{k,i} + (1 - f_i) p_i``, ``f_i = sum_{r_k >= i} w_k``

    and a_i likewise; components beyond R keep their values. With two ranks the pad is the mean over
    those who hold the component, and the result is `Rbla`'s; with more, the clients of the largest
    rank count more than their examples in every component that another client lacks.

    Reconstruction: the paper was read in its abstract and in accounts of it. It has two ranks, the
    higher one for the tenth of the clients that validates best after round 1; here ranks are the
    devices' own, and its rule is carried over to any number of them. Where scalings differ, lora_B
    has each client's own folded in, see `ZeroPadding`, and so has the pad.
    """

    traits = Traits(
        not_robust="it counts the clients of the largest rank several times",
        coverage_exponent=None,
    )

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the prefix that its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def begin(self, previous: Adapter) -> Mapping[str, Padding]:
        """Return empty sums for every module."""
        return {
            name: Padding(ComponentSums.zeros(factors), ComponentSums.zeros(factors))
            for name, factors in previous.modules.items()
        }

    def accumulate(
        self, state: Mapping[str, Padding], update: ClientUpdate
    ) -> Mapping[str, Padding]:
        """Add the client to the sums over all and, if its rank is the largest, to the pad's."""
        weight, added = float(update.num_examples), {}
        for name, sums in state.items():
            factors, components = update.adapter.modules[name], update.components(name)
            everyone = sums.everyone.add(factors, components, weight)
            largest, rank = sums.largest, sums.largest_rank
            if factors.rank > rank:
                largest, rank = ComponentSums.zeros(factors), factors.rank
            if factors.rank == rank:
                largest = largest.add(factors, components, weight)
            added[name] = Padding(everyone, largest, rank)
        return added

    def finish(self, state: Mapping[str, Padding], previous: Adapter) -> Mapping[str, LoraFactors]:
        """Average over all participants, the pad standing in for what one of them lacks."""
        return {name: _padded_mean(sums, previous.modules[name]) for name, sums in state.items()}


def _padded_mean(sums: Padding, previous: LoraFactors) -> LoraFactors:
    """Return the components up to the largest rank as means over all; the others stay."""
    rank, total = sums.largest_rank, sums.everyone.total_weight
    pad = sums.largest.average_over_contributors(previous.select(range(rank)))
    missing = (total - sums.everyone.weight[:rank]) / total
    dtype = previous.lora_A.dtype
    mean = LoraFactors(
        sums.everyone.lora_A[:rank] / total + missing[:, None] * pad.lora_A,
        sums.everyone.lora_B[:, :rank] / total + missing * pad.lora_B,
    )
    return previous.replace(range(rank), LoraFactors(mean.lora_A.to(dtype), mean.lora_B.to(dtype)))
