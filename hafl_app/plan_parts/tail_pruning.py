"""TailPruning: a client's last components are regularized, and dropped if they shrank.

Part of a `hafl_app.plan.TrainPlan`, and standard library only as that is.
"""

from dataclasses import dataclass
from math import floor

from hafl_app.plan_parts.ranges import is_finite, is_whole, require


@dataclass(frozen=True)
class TailPruning:
    """Regularize a client's last components, and drop them if they shrank.

    The loss gains ``weight * ||B_tail||_F * ||A_tail||_F``, with the scaling unfolded, where the
    tail starts at ``floor(decay * rank)`` of a module's trainable components, but never below
    ``min_rank``. If, after training, the tail's norm product is below its value before, only the
    components before the tail are uploaded.

    Parameters
    ----------
    decay
        Share of the components before the tail, in [0, 1].
    weight
        Factor of the regularizer in the loss, at least 0.
    min_rank
        Lowest rank that pruning leaves, at least 0.
    prune
        Whether a tail that shrank is dropped.
    """

    decay: float
    weight: float
    min_rank: int
    prune: bool = True

    def __post_init__(self) -> None:
        share = is_finite(self.decay) and 0 <= self.decay <= 1
        require(share, "tail decay", "in [0, 1]", self.decay)
        weighs = is_finite(self.weight) and self.weight >= 0
        require(weighs, "tail weight", "at least 0 and finite", self.weight)
        whole = is_whole(self.min_rank, at_least=0)
        require(whole, "tail min_rank", "a whole number from 0", self.min_rank)
        require(isinstance(self.prune, bool), "tail prune", "true or false", self.prune)

    def start(self, rank: int) -> int:
        """First component of the tail of a module with ``rank`` components."""
        # 0.29 * 100 is 28.999...96 in binary.
        return min(rank, max(self.min_rank, floor(self.decay * rank + 1e-9)))

    def uploads(self, rank: int) -> set[int]:
        """Return the ranks that a module of ``rank`` trained components may be uploaded with."""
        return {rank, self.start(rank)} if self.prune else {rank}
