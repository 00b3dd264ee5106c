"""Size of an adapter's change in training: norms, the usual norm of a round, and clipping."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite, sqrt
from statistics import median

import torch
from torch import Tensor

from hafl_app.lowrank.factors import Adapter

# Fewer norms have no usual size: two wrong ones among four are half of them.
_FEWEST_NORMS = 5
# Of a normal distribution, the median absolute deviation times this is the standard deviation.
_DEVIATIONS_PER_MAD = 1.4826
# Clients that happen to agree closely do not turn all others into outliers.
_LEAST_DEVIATION = 0.2


def change_of(after: Adapter, before: Adapter) -> Adapter:
    """Return ``after - before``, factors and head, in float64; nothing is broadcast.

    Of the factors and not of their products.

    Parameters
    ----------
    after, before
        Adapters of the same modules, ranks and head.

    Raises
    ------
    ValueError
        If the two differ in modules, shapes or head; the message names the tensor.
    """
    new, old = after.tensors(), before.tensors()
    _check_alike(new, old)
    return Adapter.from_tensors({n: tensor.double() - old[n].double() for n, tensor in new.items()})


def _check_alike(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    if new.keys() != old.keys():
        odd = sorted(new.keys() ^ old.keys())
        raise ValueError(f"the adapters before and after differ in {odd[:3]}")
    for name in sorted(new):
        got, expected = tuple(new[name].shape), tuple(old[name].shape)
        if got != expected:
            raise ValueError(f"{name}: shape {got}, expected {expected}")


def total_norm(adapter: Adapter) -> float:
    """Return the L2 norm of all numbers of an adapter together, of factors and head alike."""
    return sqrt(sum(float(tensor.square().sum()) for tensor in adapter.tensors().values()))


def change_size(after: Adapter, before: Adapter, scaling: Mapping[str, float]) -> float:
    """Return the root mean square change of the trained numbers, comparable over ranks.

    The change's `total_norm` over the square root of how many numbers there are, with lora_B as
    the optimizer sees it. A norm grows with the number of components, and under
    ``lora.scaling=per_rank`` the folded lora_B of a low rank moves further for the same steps;
    neither has information about a client.

    Parameters
    ----------
    after, before
        As in `change_of`. Without any number in them the size is 0; it is finite if and only if
        all of them are.
    scaling
        Module name to the PEFT scaling that is folded into its lora_B, above 0.
    """
    squares, count = 0.0, 0
    for new, old, divisor in _paired(after, before, scaling):
        if new.shape != old.shape:
            _check_alike(after.tensors(), before.tensors())
        squares += (_distance(new, old) / divisor) ** 2
        count += new.numel()
    return sqrt(squares / count) if count else 0.0


def _paired(
    after: Adapter, before: Adapter, scaling: Mapping[str, float]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield every tensor of two adapters, and what its numbers are folded with."""
    if after.head.keys() != before.head.keys() or after.modules.keys() != before.modules.keys():
        _check_alike(after.tensors(), before.tensors())
    for name, tensor in after.head.items():
        yield tensor, before.head[name], 1.0
    for name, factors in after.modules.items():
        yield factors.lora_A, before.modules[name].lora_A, 1.0
        yield factors.lora_B, before.modules[name].lora_B, scaling[name]


def _distance(new: Tensor, old: Tensor) -> float:
    """Return ``||new - old||``, in float32 unless that is too narrow for its square."""
    distance = float(torch.dist(new, old))
    return distance if isfinite(distance) else float(torch.dist(new.double(), old.double()))


def norm_bound(norms: Sequence[float], ratio: float) -> float:
    """Return the largest norm that is no outlier among these.

    ``median + ratio * max(1.4826 MAD, 0.2 median)``, MAD being the median absolute deviation from
    the median. It holds while less than half of the norms are wrong, whatever those are.

    Parameters
    ----------
    norms
        One a client, finite, at least 0. Fewer than five have no bound: the result is infinite.
        If their median is 0, most clients changed nothing and do not show how far one moves that
        does: then the others alone are looked at, and again there must be five.
    ratio
        Robust standard deviations that an honest norm may lie above the median, above 0.
    """
    if median(norms or [0.0]) == 0:
        norms = [norm for norm in norms if norm > 0]
    if len(norms) < _FEWEST_NORMS:
        return inf
    middle = median(norms)
    deviation = _DEVIATIONS_PER_MAD * median(abs(norm - middle) for norm in norms)
    return middle + ratio * max(deviation, _LEAST_DEVIATION * middle)


def clip_factors(norms: Sequence[float], ratio: float) -> list[float]:
    """Return the factor for each change so that none exceeds ``ratio * median``.

    Parameters
    ----------
    norms
        One a client, finite, at least 0. If their median is 0, nothing is clipped.
    ratio
        Multiple of the median norm that is left alone, above 0.

    Returns
    -------
    list of float
        One a norm, in (0, 1]: 1 leaves a change as it is.
    """
    limit = ratio * median(norms or [0.0])
    return [limit / norm if 0 < limit < norm else 1.0 for norm in norms]


def shrink_change(after: Adapter, before: Adapter, factor: float) -> Adapter:
    """Return ``before + factor * (after - before)``, factors and head alike.

    Parameters
    ----------
    after, before
        As in `change_of`; the result has the dtype of ``before``.
    factor
        In [0, 1]. 1 returns ``after`` bit for bit.
    """
    if factor == 1:
        return after
    change = change_of(after, before).tensors()
    shrunk = {
        name: (old.double() + factor * change[name]).to(old.dtype)
        for name, old in before.tensors().items()
    }
    return Adapter.from_tensors(shrunk)
