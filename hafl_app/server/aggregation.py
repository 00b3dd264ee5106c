"""Aggregate a round's updates: the method's fold, heads, robust rule, privacy, optimizer's step.

The method decides how updates are merged, and does not depend on the rest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hafl_app.lowrank.components import ComponentSums
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.product_sum import ProductSum
from hafl_app.lowrank.robust import RobustSums, robust_mean
from hafl_app.privacy.mechanism import NoiseSource
from hafl_app.server.central_privacy import next_adapter, trainable_counts
from hafl_app.server.compatibility import private_division
from hafl_app.server.heads import HeadMean, RobustHeads
from hafl_app.server.influence import InfluenceMeter
from hafl_app.server.method import Method
from hafl_app.server.options import RunOptions
from hafl_app.server.server_optimizer import ServerOptimizer
from hafl_app.server.trained_components import TrainedComponents
from hafl_app.server.untrained_factors import UntrainedFactors
from hafl_app.server.update import ClientUpdate
from hafl_app.wire.node_profile import NodeProfile

# Of a weight's full rank, kept as factors before they are summed up densely while streaming. The
# result is the same to rounding.
_STREAMED_SHARE = 0.25


def merge(
    method: Method,
    previous: Adapter,
    updates: Iterable[ClientUpdate],
    *,
    nodes: Sequence[NodeProfile] = (),
    server_round: int = 1,
    optimizer: ServerOptimizer | None = None,
    influence: InfluenceMeter | None = None,
) -> Adapter:
    """Merge updates into an adapter by a method's rule; neither the adapter nor they change.

    Parameters
    ----------
    method
        Its rule and options; its memory from round to round advances.
    previous
        The global adapter that the updates started from.
    updates
        In partition order; each is looked at once and can then be dropped.
    nodes
        Every registered node, for the denominators of central privacy.
    server_round
        From 1; names the noise of central privacy.
    optimizer
        With the moments of earlier rounds, which advance; None: those of a first round.
    influence
        Notes the clients' changes, if they are to be compared; not under central privacy.

    Returns
    -------
    Adapter
        The next global adapter; components and factors that no client trained, and a head that does
        not travel, as they were.
    """
    trained = TrainedComponents(previous)
    if method.options.privacy.kind == "central_dp":
        merged = _merge_privately(method, previous, updates, nodes, server_round, trained)
    else:
        merged = _merge(method, previous, updates, trained, influence)
    heads = head_that_travels(previous, method.options)
    masks = trained.masks() | {f"head/{name}": torch.tensor(True) for name in heads}
    settings = method.options.federation.server_optimizer
    return (optimizer or ServerOptimizer()).step(settings, previous, merged, masks)


def _merge(
    method: Method,
    previous: Adapter,
    updates: Iterable[ClientUpdate],
    trained: TrainedComponents,
    influence: InfluenceMeter | None,
) -> Adapter:
    """Return the next global adapter by the method's fold; note what was trained."""
    heads = _empty_heads(previous, method.options)
    untrained = UntrainedFactors()

    def note(update: ClientUpdate) -> None:
        heads.add(update.adapter.head, update.num_examples)
        untrained.note(update.plan)
        trained.note(update)
        if influence is not None:
            influence.note(update, method.weight(update))

    modules = method.finish(_folded(method, previous, updates, note), previous)
    if method.traits.keeps_components:
        modules = untrained.kept(modules, previous.modules)
    return Adapter(modules, heads.mean(previous.head))


def _folded(
    method: Method,
    previous: Adapter,
    updates: Iterable[ClientUpdate],
    note: Callable[[ClientUpdate], None],
) -> Any:
    """Return the state of a method's fold; no update is left in memory but what that holds."""
    state = method.begin(previous)
    for update in updates:
        state = method.accumulate(state, update)
        note(update)
    return state


def _merge_privately(
    method: Method,
    previous: Adapter,
    updates: Iterable[ClientUpdate],
    nodes: Sequence[NodeProfile],
    server_round: int,
    trained: TrainedComponents,
) -> Adapter:
    """Return the next global adapter from clipped changes, noise and expected counts.

    What counts as trained follows from the plans of all nodes: who took part must not show.
    """
    privacy = method.options.privacy
    traveling = previous.with_head(head_that_travels(previous, method.options))
    counts = trainable_counts([method.plan(p, server_round) for p in nodes], traveling)
    trained.note_counts(counts)
    merged = next_adapter(
        traveling,
        updates,
        counts,
        len(nodes),
        method.options.federation.fraction_train,
        privacy,
        NoiseSource(privacy.noise_key),
        server_round,
        private_division(method),
    )
    return merged.with_head(merged.head or previous.head)


def head_that_travels(adapter: Adapter, options: RunOptions) -> Mapping[str, Tensor]:
    """Return the tensors of the head that clients train and upload."""
    return adapter.head if options.head == "averaged" else {}


def _empty_heads(previous: Adapter, options: RunOptions) -> HeadMean | RobustHeads:
    traveling = head_that_travels(previous, options)
    shapes = {name: tuple(tensor.shape) for name, tensor in traveling.items()}
    federation = options.federation
    if federation.robust != "none":
        return RobustHeads(shapes, federation.robust, federation.trim_fraction)
    return HeadMean(shapes)


def empty_sums(like: LoraFactors, options: RunOptions) -> ComponentSums:
    """Return the empty component sums of a module: for a mean, or for the run's robust rule.

    A robust rule needs the whole round, so its state keeps every upload until the end.
    """
    federation = options.federation
    if federation.robust == "none":
        return ComponentSums.zeros(like)
    return RobustSums.empty(like, federation.robust, federation.trim_fraction)


def empty_product_sum(options: RunOptions) -> ProductSum:
    """Return an empty sum of products; while streaming it turns dense earlier, to stay small."""
    return ProductSum(_STREAMED_SHARE if options.federation.streaming else 1.0)


def mean_over_clients(values: Tensor, weights: Tensor, options: RunOptions) -> Tensor:
    """Return the mean of what clients measured, or the run's robust rule over it.

    Parameters
    ----------
    values
        Shape (clients, components), float64; NaN where a client measured nothing.
    weights
        Shape (clients,), at least 0; a robust rule has none.

    Returns
    -------
    Tensor
        Shape (components,); NaN where no client measured.
    """
    federation = options.federation
    if federation.robust != "none":  # a Byzantine client's scores must not steer all plans
        return robust_mean(values, federation.robust, federation.trim_fraction)
    measured = weights[:, None] * values.isfinite()
    sums = torch.where(values.isfinite(), values, 0.0) * weights[:, None]
    return sums.sum(0) / measured.sum(0)
