"""Norms of what a client adds to the base, by module: HetLoRA's weights."""

import torch

from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.svd import WeightedStack, singular_values
from hafl_app.plan_parts.own_weight import OwnWeight


def product_norms(after: Adapter, sent: Adapter, rule: OwnWeight) -> dict[str, float]:
    """Return the Frobenius norms of a client's products, scaling included.

    Parameters
    ----------
    after
        What it has trained.
    sent
        What it received, for ``norm_of=change``; components that are only there count as changed
        to zero.

    Returns
    -------
    dict
        Module name to a norm, at least 0; with ``scope=client`` to the sum over all modules.
    """
    norms = {name: _norm(after, sent, name, rule) for name in after.modules}
    return dict.fromkeys(norms, sum(norms.values())) if rule.scope == "client" else norms


def _norm(after: Adapter, sent: Adapter, name: str, rule: OwnWeight) -> float:
    factors = after.modules[name]
    if rule.norm_of == "state":
        return float(factors.norm())
    change = WeightedStack().append(factors, 1.0).append(sent.modules[name], -1.0)
    # Gram matrices would turn the rounding error of two equal products into its square root.
    return float(torch.linalg.vector_norm(singular_values(change.factors())))
