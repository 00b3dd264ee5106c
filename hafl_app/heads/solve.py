"""A head from sums of features: which ridge strength and which temperature it gets."""

import math
from dataclasses import dataclass

from torch import Tensor

from hafl_app.heads.class_means import nearest_class_mean
from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.heads.linear_head import LinearHead
from hafl_app.heads.ridge import STRENGTHS, Ridge
from hafl_app.heads.temperature import TEMPERATURES, losses_by_temperature


@dataclass(frozen=True)
class ValidationFeatures:
    """Features ``(examples, W)``, projected as those of the sums, and classes ``(examples,)``."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SolvedHead:
    """A head at temperature 1, with the strength that it was solved at.

    Parameters
    ----------
    head
        Of the features that were summed up.
    strength
        Of the ridge regression; None of class means.
    """

    head: LinearHead
    strength: float | None = None


def solve(
    sums: FeatureSums,
    *,
    rule: str,
    strength: float | None = None,
    validation: ValidationFeatures | None = None,
) -> SolvedHead:
    """Solve a head from the sums of all examples.

    Parameters
    ----------
    sums
        Of at least one example.
    rule
        ``ridge`` or ``class_means``.
    strength
        Of the ridge regression; None is chosen: by the cross entropy on ``validation`` at its best
        temperature, without ``validation`` by generalized cross-validation.
    """
    if rule == "class_means":
        return SolvedHead(nearest_class_mean(sums))
    ridge = Ridge(sums)
    if strength is None:
        strength = ridge.best_by_gcv() if validation is None else _best_on(ridge, validation)
    return SolvedHead(ridge.solve(strength), strength)


def _best_on(ridge: Ridge, validation: ValidationFeatures) -> float:
    def loss(strength: float) -> float:
        return float(validation_losses(ridge.solve(strength), validation).min())

    return min(reversed(STRENGTHS), key=loss)


def validation_losses(head: LinearHead, validation: ValidationFeatures) -> Tensor:
    """Return the summed cross entropy of a head at each of `TEMPERATURES`."""
    return losses_by_temperature(head.logits(validation.features), validation.labels)


def is_at_edge(temperature: float) -> bool:
    """Whether a better temperature may lie outside of those that are tried."""
    return temperature in (TEMPERATURES[0], TEMPERATURES[-1])


def bounded_losses(losses: Tensor, num_examples: float, num_classes: int) -> Tensor:
    """Return a client's losses, none above ten times that of a head that knows nothing.

    So that one false statement does not decide the sum over the clients.

    Parameters
    ----------
    losses
        Summed cross entropy of ``num_examples`` examples at each temperature.
    """
    return losses.clamp(max=10 * num_examples * math.log(num_classes))
