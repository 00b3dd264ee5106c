"""Ridge regression of classes on standardized features, solved from their sums.

Fanì et al., "Accelerating Heterogeneous Federated Learning with Closed-form Classifiers" (Fed3R),
ICML 2024, arXiv:2406.01116; He et al., "AFL: A Single-Round Analytic Approach for Federated
Learning with Pre-trained Models", CVPR 2025, arXiv:2405.16240. Generalized cross-validation: Golub,
Heath and Wahba, Technometrics 21(2), 1979.

Differs from both papers: features are standardized and the bias is free, which the sums allow as
well, and the strength follows from the same sums.
"""

import torch

from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.heads.linear_head import LinearHead

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (k / 2) for k in range(-12, 3))
"""Strengths that are tried, from 1e-6 to 10."""

# Of a feature's mean square: below, its variance is what rounding to float32 has left.
_CONSTANT = 1e-6


class Ridge:
    """The regressions of all strengths from one decomposition.

    With the standardized features z, the one-hot classes y less their mean, and n examples: the
    weights minimize ``sum ||y - W z||^2 / n + strength ||W||^2``. A feature that is constant has no
    weight.

    Parameters
    ----------
    sums
        With moments, of at least one example.
    """

    def __init__(self, sums: FeatureSums) -> None:
        if sums.moments is None:
            raise ValueError("ridge regression needs the moments of the features")
        n = sums.num_examples
        self._n = n
        self._shares = sums.class_counts / n
        self._mean = sums.feature_sum / n
        mean_square = sums.moments.diagonal() / n
        covariance = sums.moments / n - torch.outer(self._mean, self._mean)
        variance = covariance.diagonal()
        varies = variance > _CONSTANT * mean_square
        self._inverse_std = torch.where(varies, variance, 1.0).rsqrt() * varies
        correlation = covariance * torch.outer(self._inverse_std, self._inverse_std)
        values, self._vectors = torch.linalg.eigh(correlation)
        self._values = values.clamp(min=0)  # rounding may leave some just below
        with_classes = sums.class_sums / n - torch.outer(self._mean, self._shares)
        self._projected = self._vectors.T @ (self._inverse_std[:, None] * with_classes)

    def solve(self, strength: float) -> LinearHead:
        """Return the head of one strength, above 0; its logits are estimates of the classes."""
        weights = self._vectors @ (self._projected / (self._values + strength)[:, None])
        weight = (self._inverse_std[:, None] * weights).T
        return LinearHead(weight, self._shares - weight @ self._mean)

    def gcv(self, strength: float) -> float:
        """Return the score of generalized cross-validation: the lowest is the best.

        ``(RSS / n) / (1 - df / n)^2`` with the residual sum of squares of all classes and
        ``df = 1 + sum_i v_i / (v_i + strength)``, v the eigenvalues; infinite where df reaches n or
        rounding has eaten the RSS: nothing would be better than a fit that cannot be.
        """
        shrunk = self._values + strength
        freedom = 1 - (1 + float((self._values / shrunk).sum())) / self._n
        fit = (self._projected**2).sum(1)
        explained = 2 * fit / shrunk - self._values * fit / shrunk**2
        total = 1 - float((self._shares**2).sum())
        left = total - float(explained.sum())
        return left / freedom**2 if freedom > 0 and left > 0 else float("inf")

    def best_by_gcv(self) -> float:
        """Return the strength of `STRENGTHS` with the lowest score; the largest among equals."""
        return min(reversed(STRENGTHS), key=self.gcv)
