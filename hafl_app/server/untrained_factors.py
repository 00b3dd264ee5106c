"""Factors that no client of a round trains: they keep their values in every method."""

from collections import defaultdict
from collections.abc import Mapping

from hafl_app.lowrank.factors import LoraFactors
from hafl_app.plan import TrainPlan


class UntrainedFactors:
    """Factors that a round's plans leave untrained, collected while its updates are folded.

    An update holds an untrained factor as it was sent, so that every method can fold it. A mean
    over those who hold a component then gives it back, but zero padding would shrink it.
    """

    def __init__(self) -> None:
        self._trained: defaultdict[str, set[str]] = defaultdict(set)

    def note(self, plan: TrainPlan) -> None:
        """Record the factors that a client of the round trained."""
        for name, module in plan.modules.items():
            self._trained[name].update("AB" if module.uploads == "both" else module.uploads)

    def kept(
        self, merged: Mapping[str, LoraFactors], previous: Mapping[str, LoraFactors]
    ) -> dict[str, LoraFactors]:
        """Return the merged modules, each factor that no client trained as it was before."""
        return {name: self._kept(name, after, previous[name]) for name, after in merged.items()}

    def _kept(self, name: str, after: LoraFactors, before: LoraFactors) -> LoraFactors:
        trained = self._trained[name]
        if len(trained) == 2:
            return after
        return LoraFactors(
            after.lora_A if "A" in trained else before.lora_A,
            after.lora_B if "B" in trained else before.lora_B,
        )
