"""What an opened secure sum says of the updates: mean weights of the clients, mean changes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hafl_app.lowrank.factors import Adapter
from hafl_app.plan import TrainPlan
from hafl_app.privacy.masking import Values
from hafl_app.privacy.pieces import weight_names, with_pieces
from hafl_app.server.update import ClientUpdate


def own_weights(plans: Mapping[int, TrainPlan], sums: Values) -> dict[int, dict[str, float]]:
    """Return each member's weight by module: the mean over those with the same components.

    Empty for members that do not weigh themselves.

    Parameters
    ----------
    plans
        Of the members of the sum.
    sums
        The opened sum, by piece.
    """
    named = {member: weight_names(plan) for member, plan in plans.items()}
    counts = Counter(piece for names in named.values() for piece in set(names.values()))
    return {
        member: {module: float(sums[n][0]) / counts[n] for module, n in names.items()}
        for member, names in named.items()
    }


def mean_changes(
    sums: Values, shares: Iterable[Mapping[str, float]]
) -> dict[str, NDArray[np.float64]]:
    """Return the weighted mean of each piece over its members; 0 where all weights are 0.

    Parameters
    ----------
    shares
        Of each member, what it counts in each of its pieces.
    """
    weight = dict.fromkeys(sums, 0.0)
    for of_member in shares:
        for name, share in of_member.items():
            weight[name] += share
    return {n: piece / weight[n] if weight[n] else 0 * piece for n, piece in sums.items()}


def with_change(update: ClientUpdate, means: Values, own: Mapping[str, float]) -> ClientUpdate:
    """Return an update in which the trained numbers have changed by these means.

    Parameters
    ----------
    own
        Its weight by module, if it weighs itself.
    """
    before = update.before
    trained = before.only(update.plan.uploaded_factors)
    change = with_pieces(trained, update.plan, means).tensors()
    moved = {n: (t.double() + change[n]).to(t.dtype) for n, t in trained.tensors().items()}
    adapter = Adapter.from_tensors(moved).filled(before)
    return replace(update, adapter=adapter, own_weights=own)
