"""ComponentChoice: the rule by which a client itself chooses the components that it trains.

Part of a `hafl_app.plan.TrainPlan`, and standard library only as that is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

MEASURES: Final = ("contribution", "sensitivity", "smoothed", "adalora")
SCOPES: Final = ("module", "model")


@dataclass(frozen=True)
class ComponentChoice:
    """A client scores what it may train in a probe, trains the best of it, and uploads no scores.

    Of the components that a plan calls trainable the client trains as many as the modules' budgets
    say, and names them in its upload. The probe starts from what was received, and training starts
    there again: it costs steps or passes, and changes nothing but the choice.

    Parameters
    ----------
    measure
        ``contribution``: the norm of the change of ``b_i a_i`` in a probe that trains everything
        (LoRA-A2); or ``sensitivity``, ``smoothed``, ``adalora``: from the gradients of a probe
        without a step, see `hafl_app.lowrank.importance`.
    scope
        ``module``: each module's budget holds in it. ``model``: the sum of the budgets is spent on
        the best components of the whole model.
    probe_steps
        Batches of the probe; 0: one pass over the client's data. Never more than the plan's
        ``max_steps``.
    smoothing
        Decay of the moving averages over the probe's batches, in [0, 1).
    exploration
        Share of the components that is drawn at random, in [0, 1].
    drops_rest
        Whether components that were not chosen leave the forward pass.
    """

    measure: str
    scope: str
    probe_steps: int = 0
    smoothing: float = 0.85
    exploration: float = 0.0
    drops_rest: bool = False

    def __post_init__(self) -> None:
        # A plan comes over the wire: a word that no branch knows would silently do something else.
        self._require("measure", self.measure in MEASURES)
        self._require("scope", self.scope in SCOPES)
        steps = self.probe_steps
        self._require("probe_steps", type(steps) is int and steps >= 0)
        self._require("smoothing", _is_share(self.smoothing) and self.smoothing < 1)
        self._require("exploration", _is_share(self.exploration))
        self._require("drops_rest", isinstance(self.drops_rest, bool))

    def _require(self, name: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"choice: {name} is {getattr(self, name)!r}, which no client knows")

    def check(
        self,
        chosen: Mapping[str, Sequence[int]],
        candidates: Mapping[str, Sequence[int]],
        budgets: Mapping[str, int],
    ) -> None:
        """Refuse components that this rule cannot have chosen.

        Parameters
        ----------
        chosen, candidates, budgets
            Module name to the chosen components, to those that could be, in the same order, and to
            the module's budget.

        Raises
        ------
        ValueError
            Naming the module, what was chosen and what may be.
        """
        for name, components in chosen.items():
            rest = iter(candidates[name])
            if not all(component in rest for component in components):  # in order, each once
                raise ValueError(
                    f"{name}: components {_shortened(components)} are not some of "
                    f"{_shortened(candidates[name])}, in that order"
                )
            if self.scope == "module" and len(components) != budgets[name]:
                raise ValueError(
                    f"{name}: {len(components)} components chosen, expected {budgets[name]}"
                )
        count, total = sum(map(len, chosen.values())), sum(budgets.values())
        if count != total:
            raise ValueError(f"{count} components chosen over the model, expected {total}")


def _is_share(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and isfinite(value) and 0 <= value <= 1


def _shortened(components: Sequence[int]) -> str:
    text = ",".join(map(str, components))
    return text if len(text) <= 40 else f"{text[:40]}..."
