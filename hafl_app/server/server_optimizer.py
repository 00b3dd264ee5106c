"""Server optimizers: a step on a round's aggregated change, in place of the change itself.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295, Algorithm 2 (FedAdam,
FedYogi); momentum: Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", arXiv:1909.06335 (FedAvgM).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.server.settings import ServerOptimizerSettings


@dataclass(frozen=True)
class _Moments:
    """Moments of one tensor, in its shape; momentum has no second one."""

    first: Tensor
    second: Tensor | None = None

    def where(self, mask: Tensor, other: "_Moments") -> "_Moments":
        """Return these where the mask is true, else the other's, in the other's precision."""
        first = self.first.to(other.first.dtype).where(mask, other.first)
        if self.second is None or other.second is None:
            return _Moments(first)
        second = self.second.to(other.second.dtype).where(mask, other.second)
        return _Moments(first, second)


class ServerOptimizer:
    """Moments of the global adapter's change, from round to round.

    With the aggregated change ``d = merged - previous`` of a number, learning rate ``l``, and
    ``m = 0`` and ``v = tau^2`` at the start:

    - ``momentum``: ``m <- beta1 m + d``, step ``l m``
    - ``adam``: ``m <- beta1 m + (1 - beta1) d``, ``v <- beta2 v + (1 - beta2) d^2``,
      step ``l m / (sqrt(v) + tau)``
    - ``yogi``: as adam, with ``v <- v - (1 - beta2) d^2 sign(v - d^2)``

    There is no bias correction, as in the paper. What a round did not train takes no step and its
    moments wait: it is as the method leaves it. So is a component that the method has pruned in
    this round, its lora_B set to 0.
    """

    def __init__(self) -> None:
        self._moments: Mapping[str, _Moments] = {}

    def step(
        self,
        settings: ServerOptimizerSettings,
        previous: Adapter,
        merged: Adapter,
        trained: Mapping[str, Tensor],
    ) -> Adapter:
        """Return the next global adapter; the moments advance last, so an error changes nothing.

        Parameters
        ----------
        previous, merged
            The global adapter before the round, and as the method merged it; same shapes.
        trained
            By the names of `Adapter.tensors`, masks that broadcast to the tensor: where it was
            trained. A tensor without one was not.
        """
        if settings.kind == "none":
            return merged
        before, after = previous.tensors(), merged.tensors()
        moments = dict(self._moments)
        for name, mask in _without_pruned(trained, before, after).items():
            old = moments.get(name) or _start(settings, before[name])
            change = after[name].double() - before[name].double()
            new = _advanced(settings, old, change)
            stepped = before[name].double() + settings.rate * _direction(settings, new)
            after[name] = stepped.to(after[name].dtype).where(mask, after[name])
            moments[name] = new.where(mask, old)
        self._moments = moments
        return Adapter.from_tensors(after)

    def memory(self) -> dict[str, Any]:
        """Return the moments, for a checkpoint: a tree with tensors as leaves."""
        first = {name: moments.first for name, moments in self._moments.items()}
        second = {n: m.second for n, m in self._moments.items() if m.second is not None}
        return {"first": first, "second": second}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restore what `memory` returned; branches without a leaf may be gone."""
        second = memory.get("second", {})
        first = memory.get("first", {})
        self._moments = {name: _Moments(m, second.get(name)) for name, m in first.items()}


def _without_pruned(
    trained: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masks without components whose lora_B has become 0 altogether."""
    masks = dict(trained)
    for name in trained:
        kind, _, module = name.partition("/")
        if kind == "lora_B":
            kept = after[name].any(0) | ~before[name].any(0)  # (rank,)
            masks[name] = trained[name] & kept
            masks[f"lora_A/{module}"] = trained[f"lora_A/{module}"] & kept[:, None]
    return masks


def _start(settings: ServerOptimizerSettings, like: Tensor) -> _Moments:
    first = torch.zeros_like(like)
    if settings.kind == "momentum":
        return _Moments(first)
    return _Moments(first, torch.full_like(like, settings.tau**2))


def _advanced(settings: ServerOptimizerSettings, old: _Moments, change: Tensor) -> _Moments:
    """Return the moments after a change, in float64."""
    if old.second is None:
        return _Moments(settings.beta1 * old.first.double() + change)
    first = settings.beta1 * old.first.double() + (1 - settings.beta1) * change
    second, square = old.second.double(), change.square()
    if settings.kind == "adam":
        second = settings.beta2 * second + (1 - settings.beta2) * square
    else:
        second = second - (1 - settings.beta2) * square * (second - square).sign()
    return _Moments(first, second)


def _direction(settings: ServerOptimizerSettings, moments: _Moments) -> Tensor:
    if moments.second is None:
        return moments.first
    return moments.first / (moments.second.sqrt() + settings.tau)
