"""Cross entropy under label skew: a client's logits adjusted by how often it has each class.

With ``n_c`` examples of class c on the client, the loss reads ``z_c + tau log n_c`` in place of the
logit ``z_c``, and minus infinity for a class that the client does not have: its skew explains part
of its labels, and what is left for the model to learn is the same on all clients. With ``tau = 1``
it is the balanced softmax of Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual
Recognition", NeurIPS 2020, arXiv:2007.10740; other ``tau`` as in Menon et al., "Long-Tail Learning
via Logit Adjustment", ICLR 2021, arXiv:2007.07314. With ``tau = 0`` it is a softmax over the
client's own classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class OwnClasses:
    """The classes of one client's training examples, and the adjustment of logits by them.

    Parameters
    ----------
    labels
        Class of each training example: shape ``(rows,)``, at least 0.
    tau
        At least 0.
    """

    def __init__(self, labels: NDArray[np.int64], tau: float) -> None:
        self._counts, self._tau = torch.from_numpy(np.bincount(labels)), tau

    def adjust(self, logits: Tensor) -> Tensor:
        """Return the logits ``(rows, classes)`` as the loss reads them."""
        counts = logits.new_zeros(logits.shape[-1])
        counts[: len(self._counts)] = self._counts.to(counts)
        shift = torch.where(counts > 0, self._tau * counts.clamp(min=1).log(), -torch.inf)
        return logits + shift
