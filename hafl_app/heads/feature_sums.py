"""Sums over examples from which a linear head is solved, whoever has the examples.

With features ``x`` and the class of an example as a one-hot vector ``y``: ``sum x x^T``,
``sum x y^T`` and the number of examples of each class. Sums of clients add up to those of all
their examples, so that what is solved from them does not depend on who has which.

Fanì et al., "Accelerating Heterogeneous Federated Learning with Closed-form Classifiers" (Fed3R),
ICML 2024, arXiv:2406.01116, section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_WIDE = torch.float64


@dataclass(frozen=True)
class FeatureSums:
    """Sums over the examples of one client or of many; float64, of W features and C classes.

    Parameters
    ----------
    class_counts
        Examples of each class, shape ``(C,)``.
    class_sums
        ``sum x y^T``: the sum of the features of each class, shape ``(W, C)``.
    moments
        ``sum x x^T``, shape ``(W, W)``; None where class means are all that is wanted.
    """

    class_counts: Tensor
    class_sums: Tensor
    moments: Tensor | None = None

    @classmethod
    def zeros(cls, width: int, num_classes: int, *, moments: bool = True) -> "FeatureSums":
        """Return the sums over no example."""
        return cls(
            torch.zeros(num_classes, dtype=_WIDE),
            torch.zeros(width, num_classes, dtype=_WIDE),
            torch.zeros(width, width, dtype=_WIDE) if moments else None,
        )

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, num_classes: int, *, moments: bool = True
    ) -> "FeatureSums":
        """Return the sums over these examples, on their device.

        Parameters
        ----------
        features
            Shape ``(examples, W)``, of any precision.
        labels
            Class of each, shape ``(examples,)``.
        """
        x = features.to(_WIDE)
        y = torch.nn.functional.one_hot(labels, num_classes).to(_WIDE)
        return cls(y.sum(0), x.T @ y, x.T @ x if moments else None)

    @property
    def num_examples(self) -> float:
        """How many examples, or what they count as after `scaled`."""
        return float(self.class_counts.sum())

    @property
    def feature_sum(self) -> Tensor:
        """``sum x``, shape ``(W,)``: the row sums of ``class_sums``."""
        return self.class_sums.sum(1)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """Return the sums over the examples of both, which have moments both or neither."""
        moments = self.moments
        if moments is not None and other.moments is not None:
            moments = moments + other.moments
        return FeatureSums(
            self.class_counts + other.class_counts, self.class_sums + other.class_sums, moments
        )

    def scaled(self, factor: float) -> "FeatureSums":
        """Return the sums in which every example counts ``factor`` times."""
        if factor == 1:
            return self
        moments = None if self.moments is None else factor * self.moments
        return FeatureSums(factor * self.class_counts, factor * self.class_sums, moments)

    def cpu(self) -> "FeatureSums":
        """Return the same sums on the CPU."""
        moments = None if self.moments is None else self.moments.cpu()
        return FeatureSums(self.class_counts.cpu(), self.class_sums.cpu(), moments)


def upper_triangle(matrix: Tensor) -> Tensor:
    """Return the numbers of a symmetric matrix on and above its diagonal, row by row."""
    width = len(matrix)
    rows, columns = torch.triu_indices(width, width)
    return matrix[rows, columns]


def symmetric(triangle: Tensor, width: int) -> Tensor:
    """Return the symmetric matrix of an `upper_triangle`, shape ``(width, width)``."""
    matrix = triangle.new_zeros(width, width)
    rows, columns = torch.triu_indices(width, width)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def triangle_size(width: int) -> int:
    """Count the numbers of an `upper_triangle`."""
    return width * (width + 1) // 2


def limit_norm(features: Tensor, most: float) -> Tensor:
    """Return features whose L2 norm is at most ``most``: longer vectors are scaled down to it."""
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    limited: Tensor = features * (most / norms.clamp(min=most))
    return limited
