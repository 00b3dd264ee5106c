"""Nearest class mean: a head that needs one sum of features a class.

Legate et al., "Guiding The Last Layer in Federated Learning with Pre-Trained Models" (FedNCM),
NeurIPS 2023, arXiv:2306.03937.

Differs from the paper: features are centered at the mean of all before the cosine is taken.
"""

import torch

from hafl_app.heads.feature_sums import FeatureSums
from hafl_app.heads.linear_head import LinearHead


def nearest_class_mean(sums: FeatureSums) -> LinearHead:
    """Return the head whose largest logit is the class with the closest mean, by the cosine.

    Logit c is ``(m_c - m)^T (x - m) / ||m_c - m||``, m the mean of all features and m_c that of the
    class. A class without examples gets a logit below those of a typical example.
    """
    mean = sums.feature_sum / sums.num_examples
    known = sums.class_counts > 0
    means = sums.class_sums / sums.class_counts.clamp(min=1e-12)
    directions = torch.where(known, means - mean[:, None], 0.0)
    lengths = torch.linalg.vector_norm(directions, dim=0)
    weight = (directions / torch.where(lengths > 0, lengths, 1.0)).T
    bias = -weight @ mean
    return LinearHead(weight, torch.where(known, bias, -lengths.max()))
