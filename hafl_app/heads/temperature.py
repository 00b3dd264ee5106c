"""Temperature of a closed-form head: cross entropy wants another scale than its logits have.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, section 4.2.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

TEMPERATURES: tuple[float, ...] = tuple(2.0 ** (-k / 2) for k in range(-4, 21))
"""Temperatures that are tried, from 4 down to 1/1024: every second one halves."""


def losses_by_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy in nats at each of `TEMPERATURES`, float64.

    Parameters
    ----------
    logits
        Shape ``(examples, classes)``, at temperature 1.
    labels
        Shape ``(examples,)``.
    """
    wide = logits.double()
    sums = [cross_entropy(wide / t, labels, reduction="sum") for t in TEMPERATURES]
    return torch.stack(sums)


def best_temperature(losses: Tensor) -> float:
    """Return the temperature of `TEMPERATURES` with the lowest loss; the highest among equals."""
    return TEMPERATURES[int(losses.argmin())]
