"""Gain of each class of devices by the federation, over training alone."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hafl_app.config.schema import Settings
from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.svd import truncated_adapter
from hafl_app.metrics import Metric
from hafl_app.server.local_baseline import AloneResult
from hafl_app.wire.node_profile import NodeProfile


def lone_clients(settings: Settings, profiles: Sequence[NodeProfile]) -> list[NodeProfile]:
    """Select the clients that are also trained alone: some of every budget, by the seed."""
    if settings.model.head == "local":
        return []  # their heads are not comparable with a global one that does not exist
    drawn = []
    for ranks in sorted({profile.ranks for profile in profiles}):
        same = [profile for profile in profiles if profile.ranks == ranks]
        count = min(settings.federation.alone_clients_per_rank, len(same))
        key = "/".join(map(str, ranks))
        drawn += random.Random(f"{settings.seed}/alone/{key}").sample(same, count)
    return sorted(drawn, key=lambda profile: profile.partition_id)


def device_gains(
    global_adapter: Adapter,
    whole_score: float,
    alone: Sequence[AloneResult],
    score_of: Callable[[Adapter], float],
    metric: Metric,
    profiles: Sequence[NodeProfile] = (),
    heads: Mapping[tuple[int, ...], Mapping[str, Tensor]] | None = None,
) -> list[dict[str, Any]]:
    """Score the global adapter cut to every budget, beside clients trained alone, if any.

    Parameters
    ----------
    global_adapter
        The federation's last; a device gets its best approximation of the device's ranks.
    whole_score
        Of the global adapter itself, which a device of the largest ranks gets.
    alone
        Results of clients trained alone.
    score_of
        The metric of an adapter on the test data.
    metric
        Of the scores.
    profiles
        Nodes whose budgets have a row although none of them trained alone.
    heads
        Of the cut adapter, by the ranks of a budget; elsewhere the global adapter's head.

    Returns
    -------
    list
        A row a budget: ``rank`` (``ranks`` too where layer types differ) and the score
        ``federated``; where clients trained alone also ``alone`` (mean over ``clients_alone``),
        and ``gain``, the margin of the first.
    """
    budgets = {p.ranks: p for p in [*profiles, *(result.profile for result in alone)]}
    rows = []
    for ranks, profile in sorted(budgets.items(), key=lambda item: item[0]):
        whole = global_adapter.fits(profile.rank_of)
        head = (heads or {}).get(ranks, global_adapter.head)
        federated = whole_score if whole else score_of(_cut(global_adapter, profile, head))
        row: dict[str, Any] = {"rank": ranks[0], "federated": federated}
        if len(ranks) > 1:
            row["ranks"] = list(ranks)
        if same := [result for result in alone if result.profile.ranks == ranks]:
            row |= _alone(same, federated, score_of, metric)
        rows.append(row)
    return rows


def _alone(
    same: Sequence[AloneResult],
    federated: float,
    score_of: Callable[[Adapter], float],
    metric: Metric,
) -> dict[str, Any]:
    """Return what clients of one budget reach alone, and what the federation gains them."""
    each = [score_of(result.adapter) for result in same if result.at_own_rank]
    at_max = [score_of(result.adapter) for result in same if not result.at_own_rank]
    mean = _mean(each)
    row: dict[str, Any] = {
        "alone": mean,
        "gain": metric.difference(federated, mean),
        "clients_alone": len(each),
        "alone_each": each,
    }
    if at_max:
        row |= {"alone_at_max_rank": _mean(at_max), "alone_at_max_rank_each": at_max}
    return row


def _cut(adapter: Adapter, profile: NodeProfile, head: Mapping[str, Tensor]) -> Adapter:
    return truncated_adapter(adapter, profile.rank_of).with_head(head)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
