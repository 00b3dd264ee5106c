"""The fold of component means beside which clients' importance scores are gathered."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hafl_app.lowrank.factors import Adapter
from hafl_app.server.update import ClientUpdate
from hafl_app.strategies.component_mean import ComponentMean, Sums
from hafl_app.strategies.importance import ImportanceScores


@dataclass(kw_only=True, eq=False)
class ScoredMean(ComponentMean, ABC):
    """Template of a method that chooses components by `scores`; its `finish` ends their round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scores = self.new_scores()

    @abstractmethod
    def new_scores(self) -> ImportanceScores:
        """Return the scores of a run that begins, by the method's settings."""

    def component_importance(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return the scores that the method chooses by, once there are any."""
        if self.scores.values:
            return self.scores.measure, self.scores.values
        return super().component_importance()

    def begin(self, previous: Adapter) -> Sums:
        """Return empty sums, and forget the last round's measurements."""
        self.scores.begin_round()
        return super().begin(previous)

    def accumulate(self, state: Sums, update: ClientUpdate) -> Sums:
        """Add the client's components to their slots, and keep its importance scores."""
        self.scores.add(update)
        return super().accumulate(state, update)
