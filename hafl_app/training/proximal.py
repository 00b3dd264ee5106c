"""FedProx: a training that stays near what it starts from.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127: the
loss gains ``proximal / 2 * ||w - w_sent||^2``.
"""

from collections.abc import Iterable

from torch import nn


class ProximalTerm:
    """The proximal term of one training; made before its first step.

    Parameters
    ----------
    parameters
        The trained parameters, with the values that were sent. PEFT's scaling is not in lora_B.
    weight
        ``proximal``, at least 0; with 0 there is no term.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight: float) -> None:
        self._weight = weight
        self._sent = [(p, p.detach().clone()) for p in parameters] if weight else []

    def add_gradient(self) -> None:
        """Add ``proximal * (w - w_sent)`` to the gradients that a batch has left."""
        for parameter, sent in self._sent:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - sent, alpha=self._weight)
