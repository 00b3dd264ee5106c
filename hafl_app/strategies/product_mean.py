"""The fold of every method that averages products of factors: dense updates, never made dense."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import ProductSum
from hafl_app.plan import TrainPlan
from hafl_app.server.aggregation import empty_product_sum
from hafl_app.server.method import Traits
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.base import HeterogeneousLora
from hafl_app.wire.node_profile import NodeProfile

# A share of a component that is left to rounding alone.
_NO_SHARE = 1e-12


@dataclass(frozen=True)
class ProductSums:
    """A round's fold, by module: ``sum_k n_k B_k A_k``, and ``sum_k n_k`` over whom.

    Parameters
    ----------
    sums
        The products.
    trained
        Weight of the clients that trained component i, shape ``(rank,)``, float64.
    total_weight
        Of all clients.
    """

    sums: Mapping[str, ProductSum]
    trained: Mapping[str, Tensor]
    total_weight: float = 0.0


OF_PRODUCTS = Traits(
    homogeneous_form="product mean",
    keeps_components=False,  # each round's SVD makes them anew
    not_robust="it averages products, of which only low-rank factors are kept",
    dp_refusal="privacy=central_dp clips and noises factors, and a mean of products would need "
    "noise on every number of the dense weights: use strategy=zero_padding, or privacy=local_dp",
)
"""Traits of a method that averages products and keeps the largest components of the mean."""


@dataclass(kw_only=True, eq=False)
class ProductMean(HeterogeneousLora, ABC):
    """Weighted sums of products; a client trains the first components, as its rank allows."""

    traits = OF_PRODUCTS

    def plan(self, profile: NodeProfile, server_round: int) -> TrainPlan:
        """Every client holds and trains the first components, as many as its rank allows."""
        return self.prefix_plan(self.budgets(profile))

    def begin(self, previous: Adapter) -> ProductSums:
        """Return empty sums."""
        return empty_products(previous, empty_product_sum(self.options))

    def accumulate(self, state: ProductSums, update: ClientUpdate) -> ProductSums:
        """Add the client's products, and note which components it trained."""
        return add_products(state, update)


def empty_products(previous: Adapter, empty: ProductSum) -> ProductSums:
    """Return the empty sums of every module."""
    modules = previous.modules
    trained = {n: f.lora_A.new_zeros(f.rank).double() for n, f in modules.items()}
    return ProductSums(dict.fromkeys(modules, empty), trained)


def add_products(state: ProductSums, update: ClientUpdate) -> ProductSums:
    """Return the sums with a client's products added by its number of examples."""
    weight = float(update.num_examples)
    for name, weights in state.trained.items():
        weights[list(update.components(name))] += weight
    sums = {n: s.add(update.adapter.modules[n], weight) for n, s in state.sums.items()}
    return ProductSums(sums, state.trained, state.total_weight + weight)


def mean_of_products(state: ProductSums, step: float = 1.0) -> dict[str, ProductSum]:
    """Return ``step * sum_k w_k B_k A_k`` by module, ``w_k`` the client's share of examples."""
    return {name: one.scale(step / state.total_weight) for name, one in state.sums.items()}


def mean_of_changes(
    state: ProductSums, previous: Mapping[str, LoraFactors], step: float = 1.0
) -> dict[str, ProductSum]:
    """Return ``M + step * sum_k w_k (B_k A_k - sent_k)`` by module.

    Parameters
    ----------
    previous
        ``M``: the first components of the adapter that the round started from, with all that were
        trained. ``sent_k`` are those of them that client k trained, as they were.
    """
    means = mean_of_products(state, step)
    for name, before in previous.items():
        shares = 1 - step / state.total_weight * state.trained[name][: before.rank]
        kept = shares.abs() > _NO_SHARE
        if kept.any():
            rest = LoraFactors(
                before.lora_A[kept],
                (before.lora_B * shares.to(before.lora_B.dtype))[:, kept],
            )
            means[name] = means[name].add(rest, 1.0)
    return means
