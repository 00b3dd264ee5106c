"""The client's step between training and upload under a plan's `Alignment`."""

from hafl_app.lowrank.factors import Adapter
from hafl_app.lowrank.procrustes import rotated_toward
from hafl_app.plan_parts.alignment import Alignment


def aligned(trained: Adapter, received: Adapter, align: Alignment) -> Adapter:
    """Return the trained adapter, its components rotated toward the received ones.

    Every product stays what it was, to rounding. A module that trains one factor alone stays as it
    is: the other factor could not follow.

    Parameters
    ----------
    trained
        All components that the client holds, as its plan's alignment demands.
    received
        The same components, as they were sent.
    """
    modules = dict(trained.modules)
    for name, factors in trained.modules.items():
        if factors.in_features and factors.out_features and factors.rank:
            modules[name] = rotated_toward(
                factors, received.modules[name], align.factor, align.weight
            )
    return Adapter(modules, trained.head)
